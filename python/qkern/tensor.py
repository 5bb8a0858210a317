"""``QuantizedTensor``: packed codes and scales that act as the dense tensor they stand for.

A wrapper subclass: shape and dtype are those of the dense tensor, the inner tensors hold the
bytes. ``F.linear`` multiplies the packed bytes; every other operation without a rule in
``tensor_dispatch`` works on the dequantized value; in-place ones quantize their result again.

Inner tensors, for ``shape = (rows, ...)`` whose rows are whole blocks:

    packed         uint8 (rows, row / 2)  or  int8 (rows, row)     sharded by rows (FSDP2)
    absmax         fp32 or uint8 (rows, row / blocksize)           sharded by rows
    nested_absmax  fp32 (groups,), offset fp32 (1,)                whole in every shard

Where blocks cross rows, packed and absmax are flat and a shard holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import operands, ops, reference, tensor_dispatch
from qkern.codec import COMPUTE, check_choice, check_method
from qkern.errors import DTypeError, ShapeError
from qkern.formats import QuantFormat
from qkern.ops import host
from qkern.reference import Parts
from qkern.undo import Undo

# Method wrappers are new objects at each access: compare them with ==, never with `is`.
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class QuantizedTensor(torch.Tensor):
    """A frozen dense tensor, stored in 4 or 8 bits a value.

    Build it with ``qkern.quantize`` or ``from_dense``; the constructor takes finished parts.

    Args:
        packed: codes, see the module's docstring.
        absmax: scales, fp32 or 8-bit codes.
        nested_absmax: second-level scales, with 8-bit ``absmax`` only.
        offset: (1,) fp32, with 8-bit ``absmax`` only.
        fmt: how the bytes are read.
        shape: of the dense tensor.
        dtype: that the dense tensor reports and dequantizes to by default.
        whole_shape: shape of the tensor that was quantized, for a shard of it.
        start: flat index, in ``whole_shape``, of this tensor's first value.
        undo: what the last in-place addition replaced.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: QuantFormat
    whole_shape: torch.Size
    start: int
    undo: Undo
    is_copy: bool = False  # made by clone()

    @staticmethod
    def __new__(  # noqa: PYI034 - typing.Self needs Python 3.11
        cls,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        fmt: QuantFormat,
        shape: Sequence[int],
        dtype: torch.dtype,
        whole_shape: Sequence[int] | None = None,
        start: int = 0,
        undo: Undo | None = None,
    ) -> QuantizedTensor:
        """The wrapper, without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device, requires_grad=False
        )

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        fmt: QuantFormat,
        shape: Sequence[int],
        dtype: torch.dtype,
        whole_shape: Sequence[int] | None = None,
        start: int = 0,
        undo: Undo | None = None,
    ) -> None:
        self.packed = packed
        self.absmax = absmax
        self.nested_absmax = nested_absmax
        self.offset = offset
        self.format = fmt
        self.whole_shape = torch.Size(shape if whole_shape is None else whole_shape)
        self.start = start
        self.undo = Undo() if undo is None else undo

    @classmethod
    def from_dense(
        cls,
        values: Tensor,
        fmt: QuantFormat,
        *,
        method: str = "absmax",
        importance: Tensor | None = None,
        nonfinite: str = "error",
    ) -> QuantizedTensor:
        """Quantize a dense tensor of any shape and strides, on its device; meta stays meta.

        The result is an ordinary tensor under ``torch.inference_mode`` too: it can be trained on.
        """
        if isinstance(values, QuantizedTensor):
            msg = "the tensor is quantized already: dequantize it first to change its format"
            raise DTypeError(msg)
        check_method(method, fmt, importance is not None)
        operands.check_dense(values)
        fmt = fmt.for_shape(values.shape)
        with torch.inference_mode(False):
            parts, fmt = ops.to_parts(values.detach(), fmt, method, importance, nonfinite)
            return cls.from_parts(parts, fmt, values.shape, values.dtype)

    @classmethod
    def from_parts(
        cls, parts: Parts, fmt: QuantFormat, shape: Sequence[int], dtype: torch.dtype
    ) -> QuantizedTensor:
        """Wrap parts of any layout; rows that are whole blocks become rows of the parts."""
        packed, absmax = parts.packed.reshape(-1), parts.absmax.reshape(-1)
        if _rows_are_blocks(shape, fmt):
            packed, absmax = packed.reshape(shape[0], -1), absmax.reshape(shape[0], -1)
        return cls(packed, absmax, parts.nested_absmax, parts.offset, fmt, shape, dtype)

    @property
    def parts(self) -> Parts:
        """The inner tensors."""
        return Parts(self.packed, self.absmax, self.nested_absmax, self.offset)

    @property
    def is_whole(self) -> bool:
        """Whether this is no shard of a larger tensor."""
        return self.start == 0 and self.numel() == self.whole_shape.numel()

    @property
    def has_rows(self) -> bool:
        """Whether packed and absmax have this tensor's rows, so that a shard holds its own only."""
        return self.packed.dim() == 2

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch declares an attribute
        """Bytes of codes and scales, not of the dense tensor."""
        return sum(p.numel() * p.element_size() for p in self.parts if p is not None)

    def like(
        self,
        parts: Sequence[Tensor | None] | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        start: int | None = None,
        undo: Undo | None = None,
    ) -> QuantizedTensor:
        """This tensor with some of its fields changed; parts are shared unless given."""
        packed, absmax, nested_absmax, offset = self.parts if parts is None else parts
        return QuantizedTensor(
            packed,  # type: ignore[arg-type]
            absmax,  # type: ignore[arg-type]
            nested_absmax,
            offset,
            self.format,
            self.shape if shape is None else shape,
            self.dtype if dtype is None else dtype,
            self.whole_shape,
            self.start if start is None else start,
            undo,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor: ``code * absmax`` in fp32, rounded once.

        Args:
            dtype: float32, float16 or bfloat16, or float64 for the float32 value; the reported
                dtype if None.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype == torch.float64:
            return self.dequantize(torch.float32).double()
        host.dtype_name(dtype)
        fmt = self.format
        if self.start == tensor_dispatch.UNKNOWN_START:
            msg = "this is one rank's shard of a weight: gather it (unshard()) to dequantize it"
            raise ShapeError(msg)
        if self.is_whole:
            return ops.decoded(self.parts, fmt, self.shape, dtype)
        if self.has_rows:
            return ops.decoded(
                ops.parts_of_shard(self.parts, fmt, self.start), fmt, self.shape, dtype
            )
        flat = ops.decoded(self.parts, fmt, self.whole_shape, dtype).reshape(-1)
        return flat[self.start : self.start + self.numel()].reshape(self.shape)

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """``q += other``: of a ``clone()`` a dense sum, as SHiRA's forward needs; else quantized.

        A copy is made to compute with. ``add_`` quantizes its result always.
        """
        if self.is_copy:
            return tensor_dispatch.dense_sum(self, lambda total: total.add_(other))
        return self.add_(other)

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc]
        """``q -= other``, as ``+=``."""
        if self.is_copy:
            return tensor_dispatch.dense_sum(self, lambda total: total.sub_(other))
        return self.sub_(other)

    def assign(self, values: Tensor) -> QuantizedTensor:
        """Quantize dense ``values`` into this tensor's own bytes.

        Raises:
            NonFiniteError: for NaN or infinity; the tensor stays as it was.
            FormatError: where 8-bit scales cannot hold the result; the tensor stays as it was.
        """
        tensor_dispatch.assign(self, values)
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [name for name, part in self.parts._asdict().items() if part is not None]
        return names, (self.format, self.dtype, tuple(self.whole_shape), self.start)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, size: Sequence[int], stride: Sequence[int]
    ) -> QuantizedTensor:
        fmt, dtype, whole_shape, start = context
        parts = (inner["packed"], inner["absmax"], inner.get("nested_absmax"), inner.get("offset"))
        return cls(*parts, fmt, size, dtype, whole_shape, start)

    def __repr__(  # type: ignore[override]  # torch's has no types
        self, *, tensor_contents: Any = None
    ) -> str:
        fmt = self.format
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, {fmt.quant_type}, blocksize={fmt.blocksize}, "
            f"double_quant={fmt.double_quant})"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.nn.functional.embedding:
            return _embedding(*args, **kwargs)
        if func in tensor_dispatch.METHODS and isinstance(args[0], QuantizedTensor):
            return tensor_dispatch.METHODS[func](*args, **kwargs)
        if func == _SET_DATA and isinstance(args[0], QuantizedTensor):
            with torch._C.DisableTorchFunctionSubclass():
                return tensor_dispatch.set_data(*args)
        if func in (torch.Tensor.requires_grad_, _SET_REQUIRES_GRAD):
            tensor_dispatch.refuse_grad(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return tensor_dispatch.dispatch(cls, func, args, kwargs or {})

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """FSDP2: this rank's rows, padded to the same number on every rank.

        The one-argument form of the hook: FSDP then leaves sizes and padding to the tensor.
        """
        if not self.has_rows:  # every rank holds everything: nothing to gather
            return (self.packed.new_zeros(1),), self
        rows = -(-self.whole_shape[0] // mesh.size())
        pad = [0, 0, 0, rows - self.packed.shape[0]]
        gathered = (torch.nn.functional.pad(t, pad) for t in (self.packed, self.absmax))
        return tuple(gathered), self

    def fsdp_post_all_gather(
        self, gathered: Any, shard: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """FSDP2: the whole weight from all ranks' rows; scales keep their dtype."""
        if out is not None:
            return None
        parts: Parts = shard.parts
        if shard.has_rows:
            rows = shard.whole_shape[0]
            parts = parts._replace(packed=gathered[0][:rows], absmax=gathered[1][:rows])
        whole = QuantizedTensor(*parts, shard.format, shard.whole_shape, param_dtype)
        return whole, gathered


def linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    lora_dropout: float = 0.0,
    lora_mode: str = "separate",
    compute: str = "exact",
    layer: torch.nn.Module | None = None,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T`` on the packed bytes of W.

    The weight is dequantized to x's dtype, the bias is cast to it, whatever their own; sums are
    fp32, of an adapter too. float64, forward-mode derivatives and ``torch.func``'s transforms work
    on a dense copy of the weight, with the adapter's part in the adapter's dtype.

    Args:
        x: (..., in_features), float32, float16, bfloat16 or float64.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
        lora_dropout: probability of zeroing an input of the adapter's part; for training.
        lora_mode: "separate", or on a GPU "merged": for many tokens, which a dense copy of the
            weight multiplies, the adapter is added to it before it is rounded. Saves passes over x
            and y; the noise of that rounding hides small updates (docs/kernels.md).
        compute: "exact", or on a CPU "int8": x is rounded to 8 bits for the product, and W where
            this is faster, an error of about one per cent of y; gradients stay exact.
        layer: what errors name.

    Returns:
        (..., out_features) in x's dtype, or in autocast's.

    Raises:
        ShapeError: if the last dimension of x is not in_features, another size does not fit, or
            ``lora_dropout`` is not in [0, 1).
        DTypeError: for anything but floating-point tensors, or a weight that is not quantized.
        DeviceError: for operands on different devices, "int8" for those not on a CPU, or "merged"
            for those on one.
        FormatError: for another ``compute`` or ``lora_mode``, and for "merged" with dropout.
    """
    if not isinstance(weight, QuantizedTensor):
        msg = f"the weight is a {type(weight).__name__}: qkern.quantize it, or call F.linear"
        raise DTypeError(msg)
    with torch._C.DisableTorchFunctionSubclass():  # a call for each property of the weight
        operands.check_linear(x, weight, bias, lora_A, lora_B, layer)
        dense = operands.need_dense_weight(x, weight)
        out_features = weight.shape[0]
    check_choice("compute", compute, COMPUTE)
    if lora_mode != "separate":
        operands.check_lora_mode(lora_mode, lora_dropout, x, layer)
    adapter = (lora_A, lora_B)
    dropped = None
    if lora_dropout != 0.0 and lora_A is not None and lora_B is not None:
        operands.check_dropout(lora_dropout)
        if dense or not ops.drops_in_kernel(x):
            dropped, adapter = (lora_A, lora_B), (None, None)
    if dense:
        bias = None if bias is None else bias.to(x.dtype)
        y = reference.linear(x, weight.dequantize(x.dtype), bias, *adapter, scaling)
    else:
        product = (weight.parts, weight.format, out_features, bias, *adapter, scaling)
        y = ops.linear(x, *product, compute, lora_dropout, lora_mode)
    return y if dropped is None else ops.add_dropped(y, x, *dropped, scaling, lora_dropout)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """``F.linear`` where an argument is quantized."""
    if isinstance(input, QuantizedTensor):
        input = input.dequantize()  # noqa: A001
    if isinstance(weight, QuantizedTensor):
        with torch._C.DisableTorchFunctionSubclass():
            is_trained = weight.requires_grad
        if not is_trained:
            return linear(input, weight, bias)
        weight = weight + 0  # something trained was added in place: its gradient goes on
    return torch.nn.functional.linear(input, weight, bias)


def _embedding(input: Tensor, weight: QuantizedTensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
    """``F.embedding`` with a quantized weight: with a scale a row, the rows that are asked for."""
    if not (weight.format.kind.per_row and weight.is_whole and weight.dim() == 2):
        return torch.nn.functional.embedding(input, weight.dequantize(), *args, **kwargs)
    # Not by indexing, which takes -1 for the last row.
    parts = (weight.packed, weight.absmax.reshape(-1, 1))
    codes, absmax = (torch.nn.functional.embedding(input, part) for part in parts)
    values = codes.float() * (absmax * absmax.new_tensor(1 / 127))  # as ``reference.dequantize``
    return values.to(weight.dtype)


def _rows_are_blocks(shape: Sequence[int], fmt: QuantFormat) -> bool:
    rows = shape[0] if len(shape) >= 2 else 0
    return rows > 0 and fmt.rows_are_blocks(torch.Size(shape).numel() // rows)
