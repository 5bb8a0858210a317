"""The streaming engine in NumPy, until the native one is there: the same jobs, the same bytes."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

import numpy as np

from qkern import arrays
from qkern.checkpoint import stream
from qkern.checkpoint.stream import CopyJob, Dense, Done, Errors

_CHUNK = 1 << 20
DELAY = float(os.environ.get("SLOW_ENGINE_DELAY", "0"))


def run(
    jobs: Any,
    inputs: Any,
    outputs: Any,
    *,
    threads: int = 0,
    done: Any = lambda _: None,
    progress: Any = lambda _: None,
) -> None:
    for i, job in enumerate(jobs):
        time.sleep(DELAY)
        if isinstance(job, CopyJob):
            crc = 0
            with inputs[job.source.file].open("rb") as file:
                file.seek(job.source.offset)
                for start in range(0, job.nbytes, _CHUNK):
                    chunk = file.read(min(_CHUNK, job.nbytes - start))
                    crc = zlib.crc32(chunk, crc)
                    _write(outputs, job.target._replace(offset=job.target.offset + start), chunk)
            progress(job.nbytes)
            done(Done(i, False, 0.0, crc, 0, None))
            continue
        assert isinstance(job.source, Dense)
        item = 4 if job.source.dtype == "float32" else 2
        numel = int(np.prod(job.shape))
        with inputs[job.source.at.file].open("rb") as file:
            file.seek(job.source.at.offset)
            raw = file.read(item * numel)
        kind = np.float32 if item == 4 else np.uint16
        values = np.frombuffer(raw, kind).reshape(job.shape)
        name = None if item == 4 else job.source.dtype
        try:
            q = arrays.quantize(values, job.target.format, method=job.method, dtype=name)
        except stream_errors() as error:
            msg = f"{job.name}: {error}"
            raise type(error)(msg) from error
        codes = q.packed.tobytes()
        scales = q.absmax.tobytes() + (
            b"" if q.nested_absmax is None else q.nested_absmax.tobytes()
        )
        _write(outputs, job.target.codes, codes)
        _write(outputs, job.target.scales, scales)
        dense = np.empty(q.shape, np.float32)
        arrays.dequantize(q, "float32", out=dense)
        w = values if item == 4 else _widen(values, job.source.dtype)
        d = dense.astype(np.float64) - w
        errors = Errors(
            numel,
            float((w.astype(np.float64) ** 2).sum()),
            float((d**2).sum()),
            float(np.abs(d).max()),
        )
        progress(item * numel)
        offset = 0.0 if q.offset is None else float(q.offset[0])
        crcs = zlib.crc32(codes), zlib.crc32(scales)
        done(Done(i, q.format.double_quant, offset, *crcs, errors if job.measure else None))


def stream_errors() -> Any:
    from qkern.errors import QkernError

    return QkernError


def _widen(bits: Any, dtype: str) -> Any:
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _write(outputs: Any, span: Any, content: bytes) -> None:
    with outputs[span.file].open("r+b") as file:
        file.seek(span.offset)
        file.write(content)


def install() -> None:
    try:
        stream.run([], [], [])
    except NotImplementedError:
        stream.run = run
