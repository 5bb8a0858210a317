"""What torch operators do to a ``QuantizedTensor``.

Structural ones (detach, clone, move, slice rows, copy) act on the inner tensors. All others run
on the dequantized value, and an in-place one quantizes its result again. A view that is not whole
rows is a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qkern import ops
from qkern.errors import DTypeError, FormatError, FrozenWeightError, ShapeError
from qkern.operands import FLOATS
from qkern.undo import Kept, put_back

if TYPE_CHECKING:
    from qkern.tensor import QuantizedTensor

aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {}
# Of rows that were made empty and filled from elsewhere, as FSDP2 makes its padded shards.
UNKNOWN_START = -1
# On a dense sum that took the place of a copy: what the copy was. See dense_sum.
_SUM_OF = "_qkern_sum_of"


def dispatch(cls: type[QuantizedTensor], func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func``: by its rule, else on dequantized arguments."""
    rule = _RULES.get(func)
    if rule is not None and isinstance(args[0], cls):
        result = rule(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    arguments = func._schema.arguments
    if arguments and arguments[0].is_write and isinstance(args[0], cls):
        return _in_place(func, args, kwargs)
    written = [
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(arguments)
        if a.is_write
    ]
    if any(isinstance(value, cls) for value in pytree.tree_leaves(written)):
        msg = f"{func} would write into a quantized weight: write into q.dequantize() instead"
        raise FrozenWeightError(msg)

    def dense(value: Any) -> Any:
        return value.dequantize() if isinstance(value, cls) else value

    return func(*pytree.tree_map(dense, args), **pytree.tree_map(dense, kwargs))


def assign(q: QuantizedTensor, values: Tensor) -> None:
    """Quantize dense ``values`` into the bytes of ``q``; nothing is written on an error."""
    _write(q, values)
    q.undo.clear()


def _write(q: QuantizedTensor, values: Tensor) -> None:
    if values.shape != q.shape or not q.is_whole:
        msg = f"cannot assign {tuple(values.shape)} to a quantized tensor of {tuple(q.shape)}"
        if values.dim() == q.dim() and q.is_whole:
            msg += ", which keeps its shape: quantize the model after it is resized"
        if values.dim() == 1 < q.dim():
            msg += (
                ": packed bytes cannot be part of a flat parameter, as FSDP1 makes them; use FSDP2 "
                "(fully_shard), or give FullyShardedDataParallel qkern.fsdp_ready(model).frozen "
                "as ignored_states"
            )
        raise ShapeError(msg)
    for old, new in zip(q.parts, _quantize_like(q, values), strict=True):
        if old is not None:
            old.copy_(new.reshape(old.shape))
    q.undo.writes += 1


def set_data(q: QuantizedTensor, value: Tensor) -> None:
    """``q.data = value``: take over quantized parts, quantize dense ones."""
    if type(value) is not type(q):
        before: Kept | None = getattr(value, _SUM_OF, None)
        if before is not None and not _same_bytes(q, before):
            before = None
        _write(q, value)
        if before is None:
            q.undo.clear()
        else:
            q.undo.push(before, q.format)
        return
    if value.shape != q.shape:
        msg = f"cannot set data of {tuple(value.shape)} on a quantized {tuple(q.shape)}"
        raise ShapeError(msg)
    q.packed, q.absmax, q.nested_absmax, q.offset = value.parts
    q.format, q.undo = value.format, value.undo
    q.whole_shape, q.start = value.whole_shape, value.start
    if value.dtype != q.dtype or value.device != q.device:
        # dtype and device live in the C++ half, which only a swap of the whole tensor changes.
        torch.Tensor.data.__set__(q, value)  # type: ignore[attr-defined]


def _quantize_like(q: QuantizedTensor, values: Tensor) -> tuple[Tensor, ...]:
    fmt = q.format
    values = values.detach().float() if values.dtype == torch.float64 else values.detach()
    packed, absmax = ops.quantize(values, fmt.quant_type, fmt.blocksize, "error")
    if not fmt.double_quant:
        return packed, absmax, absmax, absmax
    codes, nested_absmax, offset, safe = ops.quantize_absmax(absmax)
    if not bool(safe):
        msg = (
            "8-bit scales cannot hold the new values (a decoded scale changes its sign or is off "
            "by more than 1/8): quantize the weight with double_quant=False"
        )
        raise FormatError(msg)
    return packed, codes, nested_absmax, offset


def _in_place(func: Any, args: Any, kwargs: Any) -> QuantizedTensor:
    q = args[0]
    before = q.dequantize()
    rest = [a.dequantize() if isinstance(a, type(q)) else a for a in args[1:]]
    after = func(before.clone(), *rest, **kwargs)
    inverse = _INVERSE.get(func)
    if inverse is not None and q.undo.parts is not None and q.undo.format == q.format:
        old = q.like([None if p is None else p.clone() for p in q.undo.parts])
        redone = inverse(old.dequantize(), *rest, **kwargs)
        if _same_bytes(q, _quantize_like(q, redone)):
            put_back(q)
            return q  # type: ignore[no-any-return]
    kept = tuple(None if p is None else p.clone() for p in q.parts)
    if not torch.equal(after, before):  # quantizing the same values again would change bytes
        _write(q, after)
    if inverse is None:
        q.undo.clear()
    else:
        q.undo.push(kept, q.format)
    return q  # type: ignore[no-any-return]


_INVERSE = {aten.add_.Tensor: aten.sub_.Tensor, aten.sub_.Tensor: aten.add_.Tensor}


def _same_bytes(q: QuantizedTensor, parts: Kept) -> bool:
    return all(
        old is None or new is None or torch.equal(old.reshape(-1), new.reshape(-1))
        for old, new in zip(q.parts, parts, strict=True)
    )


def _rule(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(overloads, rule))
        return rule

    return register


def _map(q: QuantizedTensor, fn: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    return [None if part is None else fn(part) for part in q.parts]


@_rule(aten.detach.default, aten.alias.default)
def _(func: Any, q: QuantizedTensor) -> Any:
    return q.like(undo=q.undo)


@_rule(aten.clone.default)
def _(func: Any, q: QuantizedTensor, *, memory_format: Any = None) -> Any:
    copy = q.like(_map(q, torch.clone), undo=q.undo.map(lambda part: part))
    copy.is_copy = True
    return copy


@_rule(aten._to_copy.default)
def _(func: Any, q: QuantizedTensor, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or q.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype not in FLOATS:
        allowed = ", ".join(str(float_).removeprefix("torch.") for float_ in FLOATS)
        msg = f"a quantized weight cannot report {dtype}: {allowed} can be"
        raise DTypeError(msg)
    device = kwargs.get("device") or q.device
    non_blocking = kwargs.get("non_blocking", False)

    def moved(part: Tensor) -> Tensor:
        return part.to(device, non_blocking=non_blocking, copy=True)

    # A dtype changes what is reported and dequantized to; codes and scales stay.
    return q.like(_map(q, moved), dtype=dtype, undo=q.undo.map(moved))


@_rule(aten.empty_like.default)
def _(func: Any, q: QuantizedTensor, **kwargs: Any) -> Any:
    device = kwargs.get("device") or q.device
    dtype = kwargs.get("dtype") or q.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    return q.like(_map(q, lambda t: torch.empty_like(t, device=device)), dtype=dtype)


@_rule(aten.new_zeros.default)
def _(func: Any, q: QuantizedTensor, size: Any, **kwargs: Any) -> Any:
    """Rows for a shard (FSDP2); any other size is an ordinary dense tensor."""
    if len(size) != q.dim() or list(size[1:]) != list(q.shape[1:]) or q.dim() < 2:
        return torch.zeros(size, dtype=kwargs.get("dtype") or q.dtype, device=q.device)
    if not q.has_rows:
        return q.like(_map(q, torch.zeros_like), shape=size, start=UNKNOWN_START)
    packed, absmax = (t.new_zeros(size[0], t.shape[1]) for t in (q.packed, q.absmax))
    return q.like((packed, absmax, q.nested_absmax, q.offset), shape=size, start=UNKNOWN_START)


@_rule(aten.split.Tensor)
def _(func: Any, q: QuantizedTensor, size: int, dim: int = 0) -> Any:
    if dim != 0 or q.dim() < 2:
        return NotImplemented
    return [_slice_rows(q, i, min(i + size, q.shape[0])) for i in range(0, q.shape[0], size)]


@_rule(aten.slice.Tensor)
def _(
    func: Any, q: QuantizedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if dim != 0 or step != 1 or q.dim() < 2:
        return NotImplemented
    first, last, _ = slice(start, end).indices(q.shape[0])
    return _slice_rows(q, first, max(first, last))


@_rule(aten.select.int)
def _(func: Any, q: QuantizedTensor, dim: int, index: int) -> Any:
    """One of stacked experts, an ordinary weight: a view where its scales are fp32.

    With 8-bit scales it has codes of its own. A write would change the offset of all experts, so it
    is lost instead, as in every view that is a dense copy.
    """
    experts = q.shape[0]
    if q.dim() != 3 or dim not in (0, -3) or not (q.is_whole and q.has_rows):
        return NotImplemented
    parts, fmt = ops.parts_of_expert(q.parts, q.format, experts, range(experts)[index])
    if q.format.double_quant:
        copies = (None if part is None else part.clone() for part in parts)
        parts = type(parts)(*copies)  # type: ignore[arg-type]
    return type(q).from_parts(parts, fmt, q.shape[1:], q.dtype)


@_rule(aten.view.default, aten._unsafe_view.default)
def _(func: Any, q: QuantizedTensor, size: Any) -> Any:
    if list(size) in ([-1], [q.numel()]):
        return q.like(shape=(q.numel(),), undo=q.undo)
    return q.like(undo=q.undo) if list(size) == list(q.shape) else NotImplemented


@_rule(aten.as_strided.default)
def _(func: Any, q: QuantizedTensor, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    same = list(size) == list(q.shape) and list(stride) == list(q.stride())
    return q.like(undo=q.undo) if same else NotImplemented


@_rule(aten.copy_.default)
def _(
    func: Any,
    q: QuantizedTensor,
    source: Tensor,
    non_blocking: bool = False,  # noqa: FBT001 - torch's signature
) -> Any:
    if isinstance(source, type(q)) and _same_layout(q, source):
        for mine, theirs in zip(q.parts, source.parts, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=non_blocking)
        q.undo.writes += 1
        q.start = source.start
        return q
    dense = source.dequantize() if isinstance(source, type(q)) else source
    dense = dense.to(device=q.device, dtype=q.dtype).expand(q.shape)
    # DDP spreads rank 0's parameters as dense values: bytes that already say so stay.
    if not torch.equal(q.dequantize(), dense):
        assign(q, dense)
    return q


@_rule(aten.is_pinned.default)
def _(func: Any, q: QuantizedTensor, device: Any = None) -> bool:
    return q.packed.is_pinned()


@_rule(aten._pin_memory.default)
def _(func: Any, q: QuantizedTensor, device: Any = None) -> Any:
    return q.like(_map(q, lambda t: t.pin_memory()))


def refuse_grad(
    tensor: Tensor,
    requires_grad: bool = True,  # noqa: FBT001 - torch's signature
) -> None:
    """Refuse ``requires_grad`` of a quantized tensor."""
    if requires_grad and hasattr(tensor, "packed"):
        msg = (
            "a quantized weight cannot require a gradient: train an adapter on it "
            "(qkern.add_lora), or dequantize the layer to train it whole"
        )
        raise FrozenWeightError(msg)


def _share_memory(q: Any) -> Any:
    for part in (*(part for part in q.parts if part is not None), *q.undo.tensors()):
        part.share_memory_()
    return q


def _is_shared(q: Any) -> Any:
    return q.packed.is_shared()


def _no_memory(q: Any, *args: Any, **kwargs: Any) -> Any:
    msg = "a quantized tensor has no dense memory to hand out: call dequantize() first"
    raise DTypeError(msg)


def _set_item(q: QuantizedTensor, index: Any, value: Any) -> None:
    """``q[index] = value``: a view of the dense value would take the write and be lost."""
    dense = q.dequantize()
    dense[index] = value
    q.copy_(dense)


def dense_sum(q: QuantizedTensor, add: Callable[[Tensor], Any]) -> Tensor:
    """What ``+=`` makes of a clone: the dense sum, with its gradient, not rounded again."""
    total = q.dequantize()
    add(total)
    setattr(total, _SUM_OF, q.parts)
    return total


# Methods that go to a tensor's memory without asking an operator.
METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.share_memory_: _share_memory,
    Tensor.is_shared: _is_shared,
    Tensor.apply_: _no_memory,
    Tensor.__dlpack__: _no_memory,
    Tensor.__setitem__: _set_item,
}


def _same_layout(q: QuantizedTensor, other: QuantizedTensor) -> bool:
    shapes = [[None if p is None else p.shape for p in t.parts] for t in (q, other)]
    return q.format == other.format and q.shape == other.shape and shapes[0] == shapes[1]


def _slice_rows(q: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    """Rows ``first`` to ``last`` as a view; where blocks cross rows, a window on all parts."""
    row = q.numel() // max(q.shape[0], 1)
    start = UNKNOWN_START if q.start == UNKNOWN_START else q.start + first * row
    shape = (last - first, *q.shape[1:])
    if not q.has_rows:
        return q.like(shape=shape, start=start)
    packed, absmax = q.packed[first:last], q.absmax[first:last]
    return q.like((packed, absmax, q.nested_absmax, q.offset), shape=shape, start=start)
