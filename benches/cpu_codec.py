"""Quantize and dequantize for bench_cpu.py, as shares of what memory allows, beside other packages.

A share of 1.0 means as fast as reading the input (quantize) or as filling the output past the
caches (dequantize into an output that is there), each on the very same buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import limits
import numpy as np
import torch
from cpu_timing import Effort, Engine, absent, add_ratios, interleaved, random_weight
from torch import Tensor

import qkern
from qkern import _native, codec
from qkern.formats import resolve_format
from qkern.ops import host

Row = dict[str, Any]
EXPAND = "limit: read codes, NT write"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def each(call: Callable[..., object], inputs: list[Any], **options: Any) -> list[Any]:
    """One call for each input."""
    return [partial(call, item, **options) for item in inputs]


def copies(w: Tensor, effort: Effort) -> list[Tensor]:
    """As many as leave the caches."""
    return [w.clone() for _ in range(effort.copies(w.nbytes))]


def forced_body(w: Tensor, body: str) -> Callable[[Tensor], object]:
    """NF4 with 8-bit scales by one SIMD body, on raw buffers that are there."""
    packed, absmax = np.empty(w.numel() // 2, np.uint8), np.empty(w.numel() // 64, np.float32)
    codes, nested = np.empty(absmax.size, np.uint8), np.empty(-(-absmax.size // 256), np.float32)
    offset = np.empty(1, np.float32)
    table, nested_table = codec.code_array("nf4"), codec.nested_code_array()
    name = str(w.dtype).removeprefix("torch.")

    def run(x: Tensor) -> object:
        bits = x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy()
        flat = bits.reshape(-1) if x.dtype == torch.float32 else bits.reshape(-1).view(np.uint16)
        _native.quantize_4bit(flat, name, table, 64, packed, absmax, simd=body)
        return _native.quantize_absmax(absmax, nested_table, codes, nested, offset)

    return run


def check(w: Tensor, bnb: Any) -> None:
    """The bytes of bitsandbytes, before anything is timed."""
    q = qkern.quantize(w, "nf4", double_quant=False)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    same = torch.equal(q.packed.reshape(-1), packed.reshape(-1))
    if not (same and torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))):
        msg = f"qkern and bitsandbytes differ on {tuple(w.shape)} {w.dtype}"
        raise AssertionError(msg)


def bitsandbytes() -> Any:
    """Its functions, or an ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional

    return bitsandbytes.functional


def quantize_rows(w: Tensor, effort: Effort) -> Iterator[Row]:
    """NF4 with 8-bit scales; the search; int8."""
    inputs = copies(w, effort)
    engines = [
        Engine("limit: read", [limits.reader(x) for x in inputs]),
        Engine("limit: read, prefetched", [limits.reader(x, ahead=limits.AHEAD) for x in inputs]),
        Engine("qkern", each(qkern.quantize, inputs)),
        Engine("qkern, int8", each(partial(qkern.quantize, quant_type="int8"), inputs)),
        Engine("qkern, search", each(partial(qkern.quantize, method="search"), inputs)),
    ]
    for body in _native.available_simd():
        run, name = forced_body(w, body), f"qkern, {body} forced"
        try:
            run(inputs[0])
        except (TypeError, ValueError) as error:  # a body of other operations alone
            yield absent(name, error, case="quantize")
            continue
        engines.append(Engine(name, each(run, inputs)))
    try:
        bnb = bitsandbytes()
        check(w, bnb)
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        engines.append(Engine("bitsandbytes", each(bnb.quantize_4bit, inputs, **options)))
        eight_bit = each(bnb.quantize_blockwise, inputs, blocksize=64)
        engines.append(Engine("bitsandbytes, 8 bit", eight_bit))
    except ImportError as error:
        yield absent("bitsandbytes", error, case="quantize")
    rows = interleaved(engines, effort)
    add_ratios(rows, "bitsandbytes", "times faster than bitsandbytes")
    yield from finish(rows, "quantize", w, "read")


def dequantize_rows(w: Tensor, effort: Effort) -> Iterator[Row]:
    """NF4 with 8-bit scales, into a fresh output and into one that is there."""
    sources = [qkern.quantize(w) for _ in range(effort.copies(w.numel() // 2))]
    outputs = [torch.zeros_like(w) for _ in range(effort.copies(w.nbytes))]
    pairs = [(q, outputs[i % len(outputs)]) for i, q in enumerate(sources)]
    engines = [
        Engine("limit: NT write", [limits.writer(out) for out in outputs]),
        Engine("limit: copy", [limits.copier(*p) for p in pairwise(outputs)]),
        Engine(EXPAND, [limits.expander(out, q.packed.reshape(-1)) for q, out in pairs]),
        Engine("qkern, reused output", [partial(qkern.dequantize, q, out=out) for q, out in pairs]),
        Engine("qkern, fresh output", each(qkern.dequantize, sources)),
    ]
    engines = [engine for engine in engines if engine.calls]
    try:
        bnb = bitsandbytes()
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        theirs = [packed.clone() for _ in sources]
        engines.append(Engine("bitsandbytes", each(bnb.dequantize_4bit, theirs, quant_state=state)))
    except ImportError as error:
        yield absent("bitsandbytes", error, case="dequantize")
    rows = interleaved(engines, effort)
    add_ratios(rows, "bitsandbytes", "times faster than bitsandbytes")
    found = {row["engine"]: row["median"] for row in rows}
    reused = next(row for row in rows if row["engine"] == "qkern, reused output")
    reused["share of reading codes and NT write"] = found[EXPAND] / reused["median"]
    yield from finish(rows, "dequantize", w, "NT write")


def small_rows(w: Tensor, effort: Effort) -> Iterator[Row]:
    """Both ways in the caches, where what a call costs by itself shows."""
    inputs, q = copies(w, effort), qkern.quantize(w)
    outputs = [torch.zeros_like(x) for x in inputs]
    cases = {
        "quantize, small": {
            "qkern": each(qkern.quantize, inputs),
            "qkern, int8": each(partial(qkern.quantize, quant_type="int8"), inputs),
            "qkern, search": each(partial(qkern.quantize, method="search"), inputs),
        },
        "dequantize, small": {
            "qkern, reused output": [partial(qkern.dequantize, q, out=out) for out in outputs],
            "qkern, fresh output": [partial(qkern.dequantize, q)],
        },
    }
    try:
        bnb = bitsandbytes()
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
        packed, state = bnb.quantize_4bit(w, **options)
        theirs = each(bnb.quantize_4bit, inputs, **options)
        cases["quantize, small"]["bitsandbytes"] = theirs
        theirs = [partial(bnb.dequantize_4bit, packed, quant_state=state)]
        cases["dequantize, small"]["bitsandbytes"] = theirs
    except ImportError as error:
        yield absent("bitsandbytes", error, case="quantize, small")
    for case, engines in cases.items():
        rows = interleaved([Engine(name, calls) for name, calls in engines.items()], effort)
        add_ratios(rows, "bitsandbytes", "times faster than bitsandbytes")
        yield from finish(rows, case, w, "")


def in_l2(w: Tensor, effort: Effort) -> Iterator[Row]:
    """Raw buffers that stay in L2: what the arithmetic alone can do.

    The rate between two sizes has no fixed cost of a call in it. Where it is about the limit of
    memory, or below, the share of that limit cannot come near 1.
    """
    codes, fmt = host.lend(w), resolve_format("int8")
    packed, absmax = np.empty(w.numel(), np.int8), np.empty(w.numel() // 64, np.float32)
    dtype, q, out = host.dtype_name(w.dtype), qkern.quantize(w), torch.zeros_like(w)
    engines = [
        Engine("qkern", [partial(forced_body(w, _native.simd()), w)]),
        Engine(
            "qkern, int8",
            [partial(_native.quantize_int8, codes, dtype, fmt.blocksize, packed, absmax)],
        ),
        Engine("qkern, dequantize", [partial(host.dequantize_into, q.parts, q.format, out)]),
    ]
    yield from finish(interleaved(engines, effort), "codec, values in L2", w, "")


def peer_rows(w: Tensor, effort: Effort) -> Iterator[Row]:
    """Quantize by packages that take seconds for what takes milliseconds: a smaller weight."""
    builders: dict[str, Callable[[], Callable[[], object]]] = {
        "qkern": lambda: partial(qkern.quantize, w),
        "bitsandbytes": lambda: partial(
            bitsandbytes().quantize_4bit, w, quant_type="nf4", compress_statistics=True
        ),
        "torchao NF4Tensor": lambda: _torchao(w),
        "HQQ": lambda: _hqq(w, optimize=True),
        "HQQ, no optimizer": lambda: _hqq(w, optimize=False),
        "optimum-quanto qint4": lambda: _quanto(w, "qint4"),
        "optimum-quanto qint8": lambda: _quanto(w, "qint8"),
    }
    engines = []
    for name, builder in builders.items():
        try:
            call = builder()
            call()
        except Exception as error:  # whatever a peer raises is its reason
            yield absent(name, error, case="quantize, peers")
            continue
        engines.append(Engine(name, [call]))
    rows = interleaved(engines, effort)
    add_ratios(rows, "qkern", "times faster than qkern")
    yield from finish(rows, "quantize, peers", w, "")


def _torchao(w: Tensor) -> Callable[[], object]:
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError:  # before 0.17
        from torchao.dtypes.nf4tensor import to_nf4
    return partial(to_nf4, w, block_size=64, scaler_block_size=256)


def _hqq(w: Tensor, *, optimize: bool) -> Callable[[], object]:
    from hqq.core.quantize import Quantizer

    options = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "optimize": optimize}
    return partial(Quantizer.quantize, w, **options)


def _quanto(w: Tensor, kind: str) -> Callable[[], object]:
    import optimum.quanto as quanto

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    q = quanto.QLinear.from_module(layer, weights=getattr(quanto, kind))

    def run() -> object:
        return q.qweight

    return run


def finish(rows: list[Row], case: str, w: Tensor, limit: str) -> list[Row]:
    """What the rows are about, and their shares of the limit; GB/s of the dense side."""
    statistic = "minimum" if rows and rows[0]["clock"] == "wall" else "median"
    found = {row["engine"]: row[statistic] for row in rows}
    for row in rows:
        row.update(case=case, dtype=SHORT[w.dtype], N=w.shape[0], K=w.shape[1])
        row["GB/s"] = w.nbytes / row[statistic] / 1e9
        if limit and not row["engine"].startswith("limit"):
            row[f"share of {limit}"] = found[f"limit: {limit}"] / row[statistic]
            if f"limit: {limit}, prefetched" in found:
                fastest = min(found[f"limit: {limit}"], found[f"limit: {limit}, prefetched"])
                row[f"share of fastest {limit}"] = fastest / row[statistic]
    return rows


def run(
    sizes: list[tuple[int, int]], small: list[int], effort: Effort, *, peers: bool
) -> Iterator[Row]:
    """All rows of the section; ``small``: N of N x N."""
    for N, K in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            w = random_weight(N, K).to(dtype)
            yield from quantize_rows(w, effort)
            yield from dequantize_rows(w, effort)
            for rows in (16, 64):
                yield from in_l2(w[:rows].clone(), effort)
    for N in small:
        for dtype in (torch.float32, torch.bfloat16):
            yield from small_rows(random_weight(N, N).to(dtype), effort)
    if peers:
        yield from peer_rows(random_weight(min(sizes[0][0], 1024), sizes[0][1]), effort)
