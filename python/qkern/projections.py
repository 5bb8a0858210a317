"""Layers that are given the same input, such as q, k and v of a block, multiplied in one launch.

``fuse_projections`` leaves model and modules as they are: the layers keep their weights, names and
adapters, and the model's own code calls one after the other. The first that is called computes all;
the others hand out what is there if they are called with the same tensor, unchanged, and nothing
else that counts has changed. Each output is handed out once. What nobody has asked for is dropped
when the module that owns the layers has ended, or when its thread computes the next group.

Whether layers share a launch depends on them and on x alone, never on who calls: what checkpointing
computes again must save the same tensors.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkern import operands, ops
from qkern.activation_checkpointing import innermost_checkpoint
from qkern.errors import FormatError, QkernError
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.module_tree import module_paths
from qkern.name_patterns import matches
from qkern.ops import Layer
from qkern.tensor import QuantizedTensor

# Names of siblings that read one input, as transformers' models have them.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_projections(
    model: nn.Module,
    groups: Sequence[Sequence[str]] = GROUPS,
    *,
    exclude: str | Sequence[str] = (),
) -> list[tuple[str, ...]]:
    """Let sibling layers of one input share a launch where kernels run; in place, undone by unfuse.

    On a GPU with kernels the layers of a group become one launch forward and one for the input's
    gradient; x is cast and saved once, and read once for all of their adapters. Numbers are those
    of the layers alone within rounding: sums may be taken in another order, and the gradient of x
    is rounded once. One by one, as if nothing had been done, run: layers on a CPU, where there is
    little to gain; compiled code (``torch.compile`` sees the single layers); layers of different
    formats; active ``lora_dropout`` and ``lora_mode="merged"``; and under
    ``torch.inference_mode``, where a change of x could not be seen (``torch.no_grad`` is served).

    Siblings that the model calls with different inputs (cross-attention) give right results, but
    each launch computes all: a warning says so once. Exclude them.

    Call it once the model is quantized, before or after adapters are added, by ``add_lora`` or by
    PEFT. Nothing of it is in a ``state_dict`` or a file; copies and pickles of a model are not
    fused.

    Args:
        model: after ``quantize_model``.
        groups: names of sibling modules.
        exclude: paths of layers or of their owners, ends of paths, or globs, as in
            ``quantize_model``.

    Returns:
        The paths of each group's layers.

    Raises:
        FormatError: if the model has no quantized siblings of these names, or an ``exclude``
            matches none.

    Example:
        >>> import qkern, torch
        >>> names = ("q_proj", "k_proj", "v_proj")
        >>> model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in names})
        >>> report = qkern.quantize_model(model)
        >>> qkern.fuse_projections(model)
        [('q_proj', 'k_proj', 'v_proj')]
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    unmatched, fused = set(patterns), []
    for owner, paths in module_paths(model):
        for names in groups:
            found = _Siblings(owner, tuple(names))
            if len(names) < 2 or not found.are_free():
                continue
            members = tuple(f"{paths[0]}.{name}" if paths[0] else name for name in names)
            hits = {p for p in patterns if any(matches(m, p) for m in (*paths, *members))}
            unmatched -= hits
            if not hits:
                fused.append(members)
                found.attach()
    if unmatched:
        msg = (
            f"exclude={min(unmatched)!r} matches no group of layers: paths, their ends or globs do"
        )
        raise FormatError(msg)
    if not fused and not patterns:
        wanted = "; ".join(", ".join(names) for names in groups)
        msg = f"the model has no quantized siblings named {wanted}: call quantize_model first"
        raise FormatError(msg)
    return fused


def unfuse_projections(model: nn.Module) -> None:
    """Undo ``fuse_projections``: every layer is multiplied by itself again."""
    for module in model.modules():
        _remove_hooks(module)
        if isinstance(module, QuantizedLinear):
            module.siblings = None


class _Held(NamedTuple):
    """An output that was computed with its siblings', and what it was computed from."""

    y: Tensor
    state: _State


class _State(NamedTuple):
    """What the output of a layer depends on. Tensors count by identity and by version."""

    mode: tuple[Any, ...]
    settings: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def holds(self, other: _State) -> bool:
        """Whether nothing has changed."""
        if (self.mode, self.settings, self.versions) != (
            other.mode,
            other.settings,
            other.versions,
        ):
            return False
        return len(self.tensors) == len(other.tensors) and all(
            mine is theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True)
        )


class _Pending(threading.local):
    """What a thread has computed and not handed out yet: of one group, for one input."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self.siblings: _Siblings | None = None
        self.x: Tensor | None = None
        self.held: dict[int, _Held] = {}


_pending = _Pending()


class _Siblings:
    """Layers of one owner that share their input."""

    def __init__(self, owner: nn.Module, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names
        self.has_warned = False

    def __reduce__(self) -> Any:
        """A copy or a pickle of a layer is not fused: its siblings may not be there."""
        return type(None), ()

    def layers(self) -> list[QuantizedLinear | None]:
        """The layers as they are now, below PEFT's wrappers; None for what is not quantized."""
        found: list[QuantizedLinear | None] = []
        for name in self.names:
            module: Any = self.owner._modules.get(name)
            while module is not None and not isinstance(module, QuantizedLinear):
                module = module._modules.get("base_layer")
            found.append(module)
        return found

    def are_free(self) -> bool:
        """Whether all are there, of one format and input, and none has other siblings."""
        layers = self.layers()
        kinds = set()
        for layer in layers:
            if layer is None or not isinstance(layer.weight, QuantizedTensor):
                return False
            other = layer.siblings
            if other is not None and (other.owner, other.names) != (self.owner, self.names):
                return False
            kinds.add((layer.weight.format, layer.in_features))
        return len(kinds) == 1

    def attach(self) -> None:
        """Tell the layers, and watch the calls of the owner; again, if it was done before."""
        for layer in self.layers():
            if layer is not None:
                layer.siblings = self
        _remove_hooks(self.owner, self.names)
        self.owner.register_forward_hook(_OwnerHasEnded(self), always_call=True)

    def output(self, layer: QuantizedLinear, x: Any) -> Tensor | None:
        """What ``layer`` makes of x, computed with its siblings; None where it runs by itself."""
        is_served = isinstance(x, Tensor) and ops.has_kernels(x.device)
        if not is_served or x.is_inference():
            return None
        layers = self.layers()
        own = next((i for i, each in enumerate(layers) if each is layer), None)
        if own is None:  # of a replica
            return None
        mine = _layer_of(layer, x)
        held = self.take(own, x)
        if held is not None and mine is not None and held.state.holds(_state(mine, x)):
            return held.y
        taken = [None if each is None else _layer_of(each, x) for each in layers]
        present = [each for each in taken if each is not None]
        if len(present) < len(layers) or not ops.share_a_launch(x, present):
            return None
        if _pending.siblings is self and _pending.x is not x:
            self.warn_if(_pending.held)
        _pending.clear()
        states = [_state(each, x) for each in present]
        outputs = ops.projections(x, present)
        pairs = enumerate(zip(outputs, states, strict=True))
        _pending.held = {i: _Held(y, state) for i, (y, state) in pairs if i != own}
        _pending.siblings, _pending.x = self, x
        return outputs[own]

    def take(self, own: int, x: Tensor) -> _Held | None:
        """What is there for x of the layer at place ``own``; not a second time."""
        if _pending.siblings is not self or _pending.x is not x:
            return None
        held = _pending.held.pop(own, None)
        if not _pending.held:
            _pending.clear()
        return held

    def end(self, *, well: bool) -> None:
        """Drop what was not asked for; that is worth a word if the owner has ended well."""
        if _pending.siblings is self:
            if well:
                self.warn_if(_pending.held)
            _pending.clear()

    def warn_if(self, held: dict[int, _Held]) -> None:
        """Say once that outputs were computed in vain."""
        if not held or self.has_warned:
            return
        self.has_warned = True
        names = ", ".join(self.names[i] for i in sorted(held))
        layer = next((each for each in self.layers() if each is not None), None)
        where = getattr(layer, "path", "").rpartition(".")[0] or type(self.owner).__name__
        warnings.warn(
            f"{where}: {names} was not called with the input of its siblings, so each launch"
            " computes outputs in vain: exclude it from fuse_projections",
            stacklevel=2,
        )


class _OwnerHasEnded:
    """A hook after the owner's forward, called after errors too: outputs are held no longer."""

    def __init__(self, siblings: _Siblings | None) -> None:
        self.siblings = siblings  # None in a copy

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> None:
        if self.siblings is not None and not torch.compiler.is_compiling():
            self.siblings.end(well=output is not None)


def _remove_hooks(owner: nn.Module, names: tuple[str, ...] | None = None) -> None:
    """Remove the hooks of these siblings, or of all, and those that a copy has without use."""
    hooks = owner._forward_hooks
    for key, hook in list(hooks.items()):
        if not isinstance(hook, _OwnerHasEnded):
            continue
        if names is None or hook.siblings is None or hook.siblings.names == names:
            del hooks[key]
            owner._forward_hooks_always_called.pop(key, None)


def _layer_of(layer: QuantizedLinear, x: Tensor) -> Layer | None:
    """The operands of a layer's product; None if it is not one that can be shared."""
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, QuantizedTensor) or layer.compute != "exact":
        return None
    A = B = None
    scaling = 1.0
    adapter = layer.adapter if isinstance(layer, QLoRALinear) and not layer.merged else None
    if isinstance(layer, QLoRALinear) and layer.rows is not None and not layer.merged:
        return None
    if isinstance(layer, QLoRALinear) and adapter is not None:
        dropped = layer.training and adapter.lora_dropout > 0.0
        if layer.lora_mode != "separate" or dropped or adapter.use_dora:
            return None
        if adapter.merge_into is not None:
            return None
        A, B, scaling = adapter.lora_A, adapter.lora_B, adapter.scaling
    with torch._C.DisableTorchFunctionSubclass():
        try:
            operands.check_linear(x, weight, bias, A, B, layer)
        except QkernError:  # the layer will say so when it is called
            return None
        if operands.need_dense_weight(x, weight):
            return None
        found = Layer(weight.parts, weight.format, weight.shape[0], bias, A, B, scaling)
    # Those have no version that tells of a change.
    return None if any(t.is_inference() for t in found.tensors) else found


def _state(layer: Layer, x: Tensor) -> _State:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    # Checkpointing saves what is computed within it by hooks of its own.
    saving = _saving_hooks(True)
    mode = (torch.is_grad_enabled(), x.requires_grad, autocast, stream, saving)
    tensors = tuple(layer.tensors)
    versions = tuple(t._version for t in (x, *tensors))
    trained = tuple(t.requires_grad for t in tensors)
    return _State(mode, (layer.fmt, layer.scaling, *trained), tensors, versions)


# The hooks cannot be asked for in torch 2.6: there the calls on the stack tell of checkpointing.
_saving_hooks: Any = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", innermost_checkpoint
)
