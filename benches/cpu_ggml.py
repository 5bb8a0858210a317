"""ggml's ``mul_mat`` on 4-bit weights, through the shared libraries of the package ggml-python.

Its AMX kernels load their tile configuration once a thread and trust that nobody else touches it;
torch's do. So ggml runs on a thread of its own. Built by GCC 12 they die of an illegal instruction:
the compiler drops the stores into that configuration; ``CXXFLAGS="-fno-tree-dse -fno-dse"`` helps.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cpu_engines import Linear
from cpu_timing import Effort
from torch import Tensor

_Pointer, _Size, _Int, _Long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
TYPES = {"Q4_0": 2, "Q4_K": 12, "IQ4_NL": 20}
_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _Size), ("mem_buffer", _Pointer), ("no_alloc", ctypes.c_bool))


# Result, then arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_backend_alloc_ctx_tensors_from_buft": (_Pointer, _Pointer, _Pointer),
    "ggml_backend_buffer_free": (None, _Pointer),
    "ggml_backend_buft_name": (ctypes.c_char_p, _Pointer),
    "ggml_backend_cpu_buffer_type": (_Pointer,),
    "ggml_backend_cpu_init": (_Pointer,),
    "ggml_backend_cpu_reg": (_Pointer,),
    "ggml_backend_cpu_set_n_threads": (None, _Pointer, _Int),
    "ggml_backend_graph_compute": (_Int, _Pointer, _Pointer),
    "ggml_backend_reg_dev_get": (_Pointer, _Pointer, _Size),
    "ggml_backend_reg_get_proc_address": (_Pointer, _Pointer, ctypes.c_char_p),
    "ggml_backend_supports_op": (ctypes.c_bool, _Pointer, _Pointer),
    "ggml_backend_tensor_get": (None, _Pointer, _Pointer, _Size, _Size),
    "ggml_backend_tensor_set": (None, _Pointer, _Pointer, _Size, _Size),
    "ggml_build_forward_expand": (None, _Pointer, _Pointer),
    "ggml_free": (None, _Pointer),
    "ggml_init": (_Pointer, _InitParams),
    "ggml_log_set": (None, _Pointer, _Pointer),
    "ggml_mul_mat": (_Pointer, _Pointer, _Pointer, _Pointer),
    "ggml_new_graph_custom": (_Pointer, _Pointer, _Size, ctypes.c_bool),
    "ggml_new_tensor_2d": (_Pointer, _Pointer, _Int, _Long, _Long),
    "ggml_quantize_chunk": (_Size, _Int, _Pointer, _Pointer, _Long, _Long, _Long, _Pointer),
    "ggml_row_size": (_Size, _Int, _Long),
    "dequantize_row_iq4_nl": (None, _Pointer, _Pointer, _Long),
    "dequantize_row_q4_0": (None, _Pointer, _Pointer, _Long),
    "dequantize_row_q4_K": (None, _Pointer, _Pointer, _Long),
}
_LOG = ctypes.CFUNCTYPE(None, _Int, ctypes.c_char_p, _Pointer)(lambda *_: None)


class _Ggml:
    """The libraries' functions by their names, and one backend of the CPU."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ggml")
        if spec is None or spec.origin is None:
            msg = "ggml-python is not installed"
            raise ImportError(msg)
        folder = Path(spec.origin).parent / "lib"
        names = [f"libggml{part}.so" for part in ("-base", "-cpu", "")]
        libraries = [ctypes.CDLL(str(folder / n), mode=ctypes.RTLD_GLOBAL) for n in names]
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_LOG, None)
        # Each backend has threads of its own; one executor thread owns its tiles.
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="ggml")
        self.backend = self.backend_cpu_init()
        self.buffers = self._buffer_types()
        self.threads(torch.get_num_threads())

    def __getattr__(self, name: str) -> Callable[..., Any]:  # the functions that are set above
        raise AttributeError(name)

    def threads(self, count: int) -> None:
        """Of the computation."""
        self.backend_cpu_set_n_threads(self.backend, count)

    def _buffer_types(self) -> dict[str, int]:
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        found = {"CPU": self.backend_cpu_buffer_type()}
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(_Pointer), _Pointer)(address)
            listed = extra(self.backend_reg_dev_get(registry, 0))
            i = 0
            while listed[i]:
                found[self.backend_buft_name(listed[i]).decode()] = listed[i]
                i += 1
        return found

    def context(self) -> int:
        """For names and shapes of tensors; their values are allocated apart."""
        context: int = self.init(_InitParams(1 << 20, None, True))
        return context


@functools.cache
def ggml() -> _Ggml:
    """Loaded once."""
    return _Ggml()


# In a process of its own: what may die there must not take the bench along.
_PROBE = """
import torch, cpu_ggml
from cpu_engines import Inputs
from cpu_timing import QUICK
w = torch.ones(256, 256)
layer = cpu_ggml.with_ggml(w, QUICK, quant_type="Q4_0", buffer="AMX", probe=False)
layer.engine(Inputs(w, 32), 32)
"""


@functools.cache
def _amx_dies() -> str:
    """Why the AMX kernels cannot be used, or nothing."""
    command = [sys.executable, "-c", _PROBE]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if run.returncode == -signal.SIGILL:
        return "its AMX kernels die of an illegal instruction: see cpu_ggml.py for the build flags"
    return "" if run.returncode == 0 else f"AMX fails: {(run.stderr.splitlines() or ['?'])[-1]}"


def with_ggml(
    w: Tensor, effort: Effort, *, quant_type: str, buffer: str, probe: bool = True
) -> Linear:
    """``mul_mat``, fp32 in and out, the weight in one of ggml's kinds of buffers."""
    lib = ggml()
    if buffer not in lib.buffers:
        msg = f"this build of ggml has no buffer {buffer}, only {', '.join(lib.buffers)}"
        raise NotImplementedError(msg)
    if buffer == "AMX" and probe and (reason := _amx_dies()):
        raise NotImplementedError(reason)
    (rows, cols), kind = w.shape, TYPES[quant_type]
    nbytes = lib.row_size(kind, cols) * rows
    packed, dense = torch.empty(nbytes, dtype=torch.uint8), torch.empty(rows, cols)
    source = w.float().contiguous()
    lib.quantize_chunk(kind, source.data_ptr(), packed.data_ptr(), 0, rows, cols, None)
    names = {"Q4_0": "q4_0", "Q4_K": "q4_K", "IQ4_NL": "iq4_nl"}
    decode = getattr(lib, f"dequantize_row_{names[quant_type]}")
    decode(packed.data_ptr(), dense.data_ptr(), rows * cols)
    context = lib.context()
    count = effort.copies(nbytes)
    weights = [lib.new_tensor_2d(context, kind, cols, rows) for _ in range(count)]
    owned = lib.backend_alloc_ctx_tensors_from_buft(context, lib.buffers[buffer])
    for weight in weights:
        lib.backend_tensor_set(weight, packed.data_ptr(), 0, nbytes)
    layer = Linear(
        f"ggml {quant_type} {buffer}",
        weights,
        lambda *_: torch.empty(0),
        dense,
        torch.float32,
        3e-2,
        slow_above=512,
        executor=lib.executor,
        bind_with=functools.partial(_bind, lib, weights, rows),
    )
    _release_with(layer, lib, context, owned)
    return layer


def _bind(
    lib: _Ggml, weights: list[int], rows: int, x: Tensor
) -> tuple[list[Callable[[], Any]], Callable[[], Tensor]]:
    """A graph for each copy, all with the same x."""
    context = lib.context()
    M, cols = x.shape
    source = lib.new_tensor_2d(context, _F32, cols, M)
    outputs = [lib.mul_mat(context, weight, source) for weight in weights]
    graphs = []
    for output in outputs:
        graphs.append(lib.new_graph_custom(context, 8, False))
        lib.build_forward_expand(graphs[-1], output)
    owned = lib.backend_alloc_ctx_tensors_from_buft(context, lib.buffers["CPU"])
    if not lib.backend_supports_op(lib.backend, outputs[-1]):
        msg = "its kernels do not take this shape"
        raise NotImplementedError(msg)
    x = x.contiguous()
    lib.backend_tensor_set(source, x.data_ptr(), 0, x.nbytes)

    def result() -> Tensor:
        y = torch.empty(M, rows)
        lib.backend_tensor_get(outputs[-1], y.data_ptr(), 0, y.nbytes)
        return y

    _release_with(result, lib, context, owned)
    calls: list[Callable[[], Any]] = []
    for graph in graphs:
        call = functools.partial(lib.backend_graph_compute, lib.backend, graph)
        vars(call)["keeps"] = result  # the graphs live as long as any call
        calls.append(call)
    return calls, result


def _release_with(holder: object, lib: _Ggml, context: int, owned: int) -> None:
    def release() -> None:
        lib.backend_buffer_free(owned)
        lib.free(context)

    weakref.finalize(holder, release).atexit = False
