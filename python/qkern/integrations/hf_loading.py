"""How transformers fills quantized layers: from dense weights, or from a quantized file's entries.

While it does, a layer's ``state_dict`` names its weight alone, as that of a dense layer does:
transformers looks each of its keys up as a parameter of the model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from qkern import entry_keys, flat_keys
from qkern.checkpoint.source import Source
from qkern.errors import CorruptFileError
from qkern.flat_weight import FlatWeight
from qkern.formats import KINDS, QuantFormat
from qkern.integrations.hf_names import Renaming
from qkern.layers import QuantizedLinear
from qkern.module_tree import module_at, module_paths, replace_module
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qkern.integrations.hf_quantizer import QkernQuantizer

# Keys of a quantized weight beside its own, as regular expressions.
_COMPANIONS: Final = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *(f"quant_state.{kind.state}" for kind in KINDS.values() if kind.state),
)


# -- layers that are filled ------------------------------------------------------------------


class _Filled(FlatWeight):
    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 - torch's signature
    ) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


@functools.cache
def _filled(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Filled, kind), {"__doc__": kind.__doc__})


def begin_filling(model: nn.Module) -> None:
    """Have the quantized layers, which are on meta, name their weights alone."""
    for module in model.modules():
        if isinstance(module, FlatWeight):
            # Hooks and attributes stay.
            module.__class__ = _filled(type(module))  # type: ignore[assignment, arg-type]


def end_filling(model: nn.Module) -> None:
    """Make them what they were."""
    for module in model.modules():
        if isinstance(module, _Filled):
            module.__class__ = type(module).__bases__[1]


# -- quantized files -------------------------------------------------------------------------


def open_source(files: list[str] | None) -> Source:
    """The quantized checkpoint that transformers reads, checked.

    Raises:
        CorruptFileError: if it holds no safetensors, no quantized weight, or contradicts itself.
    """
    found = [Path(file) for file in files or []]
    if not found or any(file.suffix != ".safetensors" for file in found):
        msg = f"config.json says that qkern quantized it, which writes safetensors: got {files}"
        raise CorruptFileError(msg)
    source = Source(found[0] if len(found) == 1 else found[0].parent)
    if not source.is_quantized:
        msg = f"{source.path}: config.json says that qkern quantized it, but no weight is"
        raise CorruptFileError(msg)
    return source


def place_layers(model: PreTrainedModel, source: Source) -> dict[str, bool]:
    """Put ``QuantizedLinear`` on meta wherever the file holds a quantized weight.

    Args:
        model: on meta.
        source: of the checkpoint.

    Returns:
        For the name of each tensor, as it stands after transformers' renamings and before it adds
        or takes off the base model's prefix, whether it is quantized.

    Raises:
        CorruptFileError: if the file does not fit the model.
    """
    paths = {name: names for _, names in module_paths(model) for name in names}
    renaming, names = Renaming(model), {}
    for stored in source.tensors.values():
        key = renaming.parameter(stored.name)
        names[renaming.renamed(stored.name)] = stored.format is not None
        if stored.format is None:
            _check_dense(source, stored.name, key, renaming.state)
            continue
        name, _, parameter = key.rpartition(".")
        layer = module_at(model, name) if name in paths else None
        if type(layer) is not nn.Linear or parameter != "weight":
            what = "none" if layer is None else f"a {type(layer).__name__}"
            msg = (
                f"{stored.file}: {stored.name} is quantized, for an nn.Linear {name}; found {what}"
            )
            raise CorruptFileError(msg)
        if tuple(layer.weight.shape) != stored.shape:
            needed = tuple(layer.weight.shape)
            msg = f"{stored.file}: {stored.name} is {stored.shape}, the model needs {needed}"
            raise CorruptFileError(msg)
        made = QuantizedLinear.from_linear(layer, quant_type=stored.format.template)
        replace_module(model, paths[name], made)
    return names


def main_format(source: Source) -> QuantFormat:
    """The format, before ``for_shape``, that most of the quantized weights have."""
    formats = [t.format.template for t in source.tensors.values() if t.format is not None]
    return max(set(formats), key=formats.count)


def _check_dense(source: Source, name: str, key: str, state: Mapping[str, Tensor]) -> None:
    """Refuse what transformers would take for weights, or pass over with a warning."""
    stored = source.tensors[name]
    if key in state and state[key].is_floating_point() and stored.dtype in ("int8", "uint8"):
        msg = f"{stored.file}: {name} holds {stored.dtype} codes without scales beside them"
        raise CorruptFileError(msg)
    if key not in state and name.rpartition(".")[2].startswith("lora_"):
        msg = (
            f"{stored.file}: {name} is an adapter's, kept with its base, as a Trainer does: build "
            "the model as it was (qkern.add_lora) and give the Trainer resume_from_checkpoint, or "
            "keep adapters by qkern.save_adapter"
        )
        raise CorruptFileError(msg)


def converter(quantizer: QkernQuantizer, names: Mapping[str, bool]) -> WeightConverter:
    """What has transformers collect the entries of each quantized weight.

    Args:
        quantizer: whose errors are kept.
        names: of weights, and whether they are quantized, as ``place_layers`` returns them.
    """
    stems: dict[bool, list[str]] = {True: [], False: []}
    for name, quantized in names.items():
        stems[quantized].append(name.removesuffix(".weight"))
    # Its patterns: "(a|b).weight" is what all sources become, "\\1" the group in each of them.
    group = "|".join(_alternatives(stems[True], stems[False]))
    # Of two that match, transformers takes the longer one, or in older versions the first.
    suffixes = [rf"\.weight\.{re.escape(name)}" for name in _COMPANIONS]
    suffixes += [rf"\.{name}" for name in (entry_keys.LAYOUT, entry_keys.SCALES, entry_keys.WEIGHT)]
    # Else a layer "vision.a" would be taken for "a".
    sources = [rf"^\1{suffix}" for suffix in suffixes]
    return WeightConverter(sources, f"({group}).weight", [Unflatten(quantizer)])


def _alternatives(stems: list[str], names: Iterable[str]) -> list[str]:
    """Patterns that match ``stems`` and nothing else of ``names``.

    One for all layers of a kind, where all of them are quantized: few patterns are matched fast.
    """
    kinds: dict[str, list[str]] = {}
    for stem in stems:
        kinds.setdefault(_kind(stem), []).append(stem)
    wanted = set(stems)
    mixed = {_kind(name) for name in names if name not in wanted}
    patterns: list[str] = []
    for kind, members in kinds.items():
        patterns += map(re.escape, members) if kind in mixed else [kind]
    return patterns


def _kind(name: str) -> str:
    """The pattern of a layer's name with any numbers."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", r"[0-9]+", re.escape(name).replace(r"\.", ".")).replace(
        ".", r"\."
    )


# -- operations ------------------------------------------------------------------------------


class _Operation(ConversionOps):
    """What a weight goes through.

    Args:
        hf_quantizer: whose errors are kept; transformers looks for it, and casts no entry then.
    """

    def __init__(self, hf_quantizer: QkernQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Operation:
        """Itself: copies are made for each entry, and all are to have the same quantizer."""
        return self


class Unflatten(_Operation):
    """A file's entries of a quantized weight, as the weight."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Entries by their patterns, each a list of one, to the parameter by its name."""
        name = kwargs["full_layer_name"]
        module = name.removesuffix(entry_keys.WEIGHT)
        entries = {
            module + _suffix(pattern): found[0] if isinstance(found, list) else found
            for pattern, found in input_dict.items()
        }
        empty = kwargs["model"].get_parameter(name)

        def make() -> Tensor:
            q = flat_keys.unflatten(entries, name, empty.dtype)
            return q.to(empty.dtype)

        device = next(iter(entries.values())).device
        return {name: self.hf_quantizer.attempt(make, empty, device)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Layers flatten their weights themselves."""
        return _Unchanged()


class _Unchanged(ConversionOps):
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        return dict.fromkeys([kwargs["full_layer_name"]], *input_dict.values())


class Quantize(_Operation):
    """A dense weight, quantized on the device where it is; on a CPU by all threads."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Dense tensors by the names of parameters, to what these are to be."""
        quantizer, model = self.hf_quantizer, kwargs["model"]
        result = {}
        for name, found in input_dict.items():
            value = found[0] if isinstance(found, list) else found
            empty = model.get_parameter(name)
            if isinstance(empty, QuantizedTensor):
                make = functools.partial(quantizer.quantize, name, value)
                value = quantizer.attempt(make, empty, value.device)
            result[name] = value
        return result


def _suffix(pattern: str) -> str:
    """The part of a pattern of ``converter`` after its group, as it stands in a file."""
    return pattern.rpartition(r")\.")[2].replace("\\", "")
