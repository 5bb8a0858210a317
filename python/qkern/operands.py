"""What the tensor and the layers take: checks whose errors name what was found and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qkern.codec import check_choice
from qkern.errors import DeviceError, DTypeError, FormatError, ShapeError
from qkern.ops import device as devices

if TYPE_CHECKING:
    from qkern.tensor import QuantizedTensor

LORA_MODES = ("separate", "merged")
# float64 is for checking gradients: it computes on a dense copy of the weight.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dense(values: Any) -> None:
    """Refuse what is no plain dense tensor; its dtype is checked where it is read.

    Raises:
        DTypeError: for another type, a sparse or nested layout, a tensor subclass that wraps
            others (``DTensor``), or a tensor inside of a ``torch.func`` transform.
    """
    kind = type(values).__name__
    if not isinstance(values, Tensor):
        msg = f"a {kind} cannot be quantized: pass a torch tensor or a NumPy array"
        raise DTypeError(msg)
    if values.layout != torch.strided or values.is_nested:
        layout = "nested" if values.is_nested else str(values.layout).removeprefix("torch.")
        msg = f"a tensor of {layout} layout cannot be quantized: pass a dense one (to_dense())"
        raise DTypeError(msg)
    if is_traceable_wrapper_subclass(values):
        msg = (
            f"a {kind} cannot be quantized as it is: pass the plain tensor that it stands for "
            "(full_tensor() of a DTensor), or quantize before it is wrapped"
        )
        raise DTypeError(msg)
    if torch.compiler.is_compiling():  # which cannot look into the following
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        msg = (
            "quantize has no derivative and no batching rule: call it outside of torch.func's "
            "transforms (vmap, grad, jvp)"
        )
        raise DTypeError(msg)


def check_linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    layer: object,
) -> None:
    """Refuse operands of a linear layer that do not fit each other.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        layer: the module that errors name, by its ``path`` or its class; None outside of one.

    Raises:
        ShapeError: for a size that does not fit, or half an adapter.
        DTypeError: for anything but floating-point tensors.
        DeviceError: for operands on different devices.
    """
    shape, device = weight.shape, weight.packed.device  # each property of a subclass costs a call
    if len(shape) != 2:
        msg = f"{_name(layer)} needs a weight of 2 dimensions, got {tuple(shape)}"
        raise ShapeError(msg)
    out_features, in_features = shape
    _check_tensor(x, "x", device, layer)
    if x.dim() == 0 or x.shape[-1] != in_features:
        msg = f"{_name(layer)} expects x of (..., {in_features}), got {tuple(x.shape)}"
        raise ShapeError(msg)
    if bias is not None:
        _check_tensor(bias, "bias", device, layer)
        check_bias(bias, out_features, layer)
    if lora_A is None and lora_B is None:
        return
    shapes = [None if t is None else t.shape for t in (lora_A, lora_B)]
    r = shapes[0][0] if shapes[0] else 0
    if shapes != [(r, in_features), (out_features, r)]:
        found = [None if size is None else tuple(size) for size in shapes]
        msg = (
            f"{_name(layer)} expects lora_A of (r, {in_features}) and lora_B of "
            f"({out_features}, r), got {found[0]} and {found[1]}"
        )
        raise ShapeError(msg)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check_tensor(tensor, name, device, layer)


def check_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    transposed: bool,  # noqa: FBT001
    layer: object = None,
) -> None:
    """Refuse operands of stacked experts that do not fit each other.

    Args:
        x: (M, K).
        offsets: (E,), int32 or int64.
        weight: (E, N, K), or (E, K, N) if ``transposed``.
        bias: (E, N) or None.
        lora_A: (E, r, K) or None.
        lora_B: (E, N, r) or None.
        transposed: which of the two the weight is.
        layer: what errors name, as in ``check_linear``.

    Raises:
        ShapeError: for a size that does not fit, or half an adapter.
        DTypeError: for an x, a bias or an adapter that is no floating-point tensor, and for
            offsets that are no integers.
        DeviceError: for operands on different devices.
    """
    shape, device = weight.shape, weight.packed.device
    if len(shape) != 3:
        msg = f"{_name(layer)} needs stacked weights of 3 dimensions, got {tuple(shape)}"
        raise ShapeError(msg)
    E, N, K = (shape[0], shape[2], shape[1]) if transposed else shape
    for name, tensor in (("x", x), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is not None:
            _check_tensor(tensor, name, device, layer)
    if not isinstance(offsets, Tensor):
        msg = f"{_name(layer)} expects offsets as a tensor, got a {type(offsets).__name__}"
        raise DTypeError(msg)
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.device != device:
        msg = (
            f"{_name(layer)} expects offsets as int32 or int64 on {device}, got {offsets.dtype} on "
            f"{offsets.device}"
        )
        raise DTypeError(msg) if offsets.device == device else DeviceError(msg)
    r = lora_A.shape[1] if lora_A is not None and lora_A.dim() == 3 else 0
    wanted = {"x": (x.shape[0] if x.dim() else 0, K), "offsets": (E,)}
    given: dict[str, Tensor | None] = {"x": x, "offsets": offsets}
    if bias is not None:
        wanted["bias"], given["bias"] = (E, N), bias
    if lora_A is not None or lora_B is not None:
        wanted |= {"lora_A": (E, r, K), "lora_B": (E, N, r)}
        given |= {"lora_A": lora_A, "lora_B": lora_B}
    for name, tensor in given.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != wanted[name]:
            msg = f"{_name(layer)} expects {name} of {wanted[name]}, got {found}"
            raise ShapeError(msg)


def check_dropout(lora_dropout: float) -> None:
    """Refuse a probability outside of [0, 1).

    Raises:
        ShapeError: naming it.
    """
    if not 0.0 <= lora_dropout < 1.0:
        msg = f"lora_dropout must be in [0, 1), got {lora_dropout}"
        raise ShapeError(msg)


def check_lora_mode(lora_mode: str, lora_dropout: float, x: Tensor, layer: object) -> None:
    """Refuse a way of applying an adapter that there is not, or not here.

    Args:
        lora_mode: see ``qkern.linear``.
        lora_dropout: what the adapter's input is dropped by.
        x: what is multiplied.
        layer: what errors name, as in ``check_linear``.

    Raises:
        FormatError: for an unknown one, and for "merged" with dropout.
        DeviceError: for "merged" on a CPU, where the adapter is part of the same sums already.
    """
    check_choice("lora_mode", lora_mode, LORA_MODES)
    if lora_mode == "merged":
        if lora_dropout > 0.0:
            msg = (
                f"{_name(layer)} has lora_dropout={lora_dropout:g}, which drops inputs of the "
                "adapter alone: a merged weight has none of its own; set one of them back"
            )
            raise FormatError(msg)
        if not devices.serves(x):
            msg = (
                f'{_name(layer)} has lora_mode="merged", which is for GPUs: on a {x.device.type} '
                'the adapter is added to the same sums and costs next to nothing; set "separate"'
            )
            raise DeviceError(msg)


def need_dense_weight(x: Tensor, weight: QuantizedTensor) -> bool:
    """Whether a product has to be made of ordinary torch operations on the dequantized weight.

    Shards and slices (outside of training), nothing to multiply, float64, and derivatives for
    which the operators have no rules: forward-mode, and those of ``torch.func``.
    """
    numel = weight.shape.numel()
    whole = weight.start == 0 and numel == weight.whole_shape.numel()
    if not whole or numel == 0 or x.dtype == torch.float64:
        return True
    if torch.compiler.is_compiling():
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or torch.autograd.forward_ad._current_level >= 0


def check_layer(layer: Any) -> None:
    """Refuse a layer that another one cannot stand in for.

    Raises:
        DTypeError: for anything but an ``nn.Linear``.
        FormatError: if it computes something else than ``nn.Linear`` does, or its weight or bias
            is computed from other parameters.
    """
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear):
        msg = f"an nn.Linear is needed, got a {kind}"
        raise DTypeError(msg)
    own = type(layer).forward.__get__(layer)
    if vars(layer).get("forward", own) != own:  # accelerate leaves the class's own behind
        msg = "the layer's forward was replaced on the instance (by accelerate?): undo that first"
        raise FormatError(msg)
    if type(layer).forward is not nn.Linear.forward and not hasattr(layer, "quantized_weight"):
        msg = f"a {kind} has a forward of its own, which would be lost: an nn.Linear is needed"
        raise FormatError(msg)
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            msg = (
                f"the layer's {name} is computed from others (weight norm, pruning): make it a "
                f"parameter first, as parametrize.remove_parametrizations(layer, {name!r}), "
                "remove_weight_norm and prune.remove do"
            )
            raise FormatError(msg)


def check_bias(bias: Tensor, out_features: int, layer: object) -> None:
    """Refuse a bias that is not (out_features,)."""
    if bias.shape != (out_features,):
        msg = f"{_name(layer)} expects a bias of ({out_features},), got {tuple(bias.shape)}"
        raise ShapeError(msg)


def _check_tensor(tensor: Any, name: str, device: torch.device, layer: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        msg = f"{_name(layer)} expects {name} as a tensor of {allowed}, got {found}"
        raise DTypeError(msg)
    if tensor.layout != torch.strided:
        msg = f"{_name(layer)} expects a dense {name} (to_dense()), got layout {tensor.layout}"
        raise DTypeError(msg)
    if tensor.device != device:
        msg = (
            f"{_name(layer)} has its weight on {device}, {name} is on {tensor.device}: move one "
            "of them with .to()"
        )
        raise DeviceError(msg)


def _name(layer: object) -> str:
    """What errors call a layer; read for an error only, or compiled code had a guard on it."""
    if layer is None:
        return "linear"
    return getattr(layer, "path", "") or type(layer).__name__
