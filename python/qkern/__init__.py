"""qkern: frozen weights in 4 or 8 bits, with LoRA in the same kernel.

    q = qkern.quantize(w, "nf4")              torch tensor or NumPy array
    w = qkern.dequantize(q)
    report = qkern.quantize_model(model)      in place
    qkern.add_lora(model, r=16)

Importing this package imports nothing else: NumPy, torch and the native extension load on first
use, and only where they are needed.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from qkern.errors import (
    AdapterMismatchError,
    ArgumentError,
    CorruptFileError,
    CoverageError,
    DataError,
    DeviceError,
    DTypeError,
    FormatError,
    FrozenWeightError,
    LockedError,
    LostDeltaError,
    MissingDependencyError,
    NativeError,
    NonFiniteError,
    OutOfSpaceError,
    OutputError,
    QkernError,
    ShapeError,
    StateDictError,
)

if TYPE_CHECKING:
    from qkern.adapters import load_adapter, save_adapter
    from qkern.arrays import QuantizedArray
    from qkern.checkpoint.converting import convert_checkpoint
    from qkern.checkpoint.inspection import inspect_checkpoint
    from qkern.checkpoint.merging import merge_checkpoint
    from qkern.checkpoint.quantizing import quantize_checkpoint
    from qkern.checkpoint.save import save
    from qkern.formats import QuantFormat
    from qkern.functional import grouped_linear, linear
    from qkern.integrations.pretrained import load
    from qkern.layers import QLoRALinear, QuantizedLinear
    from qkern.lora_plus import lora_plus_groups
    from qkern.merge_dense import merge_to_dense
    from qkern.merge_target import MergeTarget
    from qkern.merging import merge_adapter, set_merge_into, unmerge_adapter
    from qkern.model import CoverageReport, add_lora, memory_footprint, quantize_model
    from qkern.named_adapters import (
        adapter_names,
        adapter_rows,
        delete_adapter,
        disable_adapter,
        set_adapter,
    )
    from qkern.projections import fuse_projections, unfuse_projections
    from qkern.sharding import fsdp_ready
    from qkern.tensor import QuantizedTensor

__all__ = [
    "AdapterMismatchError",
    "ArgumentError",
    "CorruptFileError",
    "CoverageError",
    "CoverageReport",
    "DTypeError",
    "DataError",
    "DeviceError",
    "FormatError",
    "FrozenWeightError",
    "LockedError",
    "LostDeltaError",
    "MergeTarget",
    "MissingDependencyError",
    "NativeError",
    "NonFiniteError",
    "OutOfSpaceError",
    "OutputError",
    "QLoRALinear",
    "QkernError",
    "QuantFormat",
    "QuantizedArray",
    "QuantizedLinear",
    "QuantizedTensor",
    "ShapeError",
    "StateDictError",
    "__version__",
    "adapter_names",
    "adapter_rows",
    "add_lora",
    "convert_checkpoint",
    "delete_adapter",
    "dequantize",
    "disable_adapter",
    "fsdp_ready",
    "fuse_projections",
    "grouped_linear",
    "inspect_checkpoint",
    "linear",
    "load",
    "load_adapter",
    "lora_plus_groups",
    "memory_footprint",
    "merge_adapter",
    "merge_checkpoint",
    "merge_to_dense",
    "quantize",
    "quantize_checkpoint",
    "quantize_model",
    "save",
    "save_adapter",
    "set_adapter",
    "set_merge_into",
    "unfuse_projections",
    "unmerge_adapter",
]

# Where each name that is not defined here lives; resolved by __getattr__ on first use.
_HOMES = {
    "CoverageReport": "qkern.model",
    "MergeTarget": "qkern.merge_target",
    "QLoRALinear": "qkern.layers",
    "QuantFormat": "qkern.formats",
    "QuantizedArray": "qkern.arrays",
    "QuantizedLinear": "qkern.layers",
    "QuantizedTensor": "qkern.tensor",
    "adapter_names": "qkern.named_adapters",
    "adapter_rows": "qkern.named_adapters",
    "add_lora": "qkern.model",
    "convert_checkpoint": "qkern.checkpoint.converting",
    "delete_adapter": "qkern.named_adapters",
    "disable_adapter": "qkern.named_adapters",
    "fsdp_ready": "qkern.sharding",
    "fuse_projections": "qkern.projections",
    "grouped_linear": "qkern.functional",
    "inspect_checkpoint": "qkern.checkpoint.inspection",
    "linear": "qkern.functional",
    "load": "qkern.integrations.pretrained",
    "load_adapter": "qkern.adapters",
    "lora_plus_groups": "qkern.lora_plus",
    "memory_footprint": "qkern.model",
    "merge_adapter": "qkern.merging",
    "merge_checkpoint": "qkern.checkpoint.merging",
    "merge_to_dense": "qkern.merge_dense",
    "quantize_checkpoint": "qkern.checkpoint.quantizing",
    "quantize_model": "qkern.model",
    "save": "qkern.checkpoint",
    "save_adapter": "qkern.adapters",
    "set_adapter": "qkern.named_adapters",
    "set_merge_into": "qkern.merging",
    "unfuse_projections": "qkern.projections",
    "unmerge_adapter": "qkern.merging",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("qkern._native").__version__
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'qkern' has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "qkern":
            raise
        msg = f'qkern.{name} needs {error.name}: pip install "qkern[torch]" or "qkern[train]"'
        raise MissingDependencyError(msg) from error
    found = globals()[name] = getattr(module, name)  # so that the next use does not come here
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


def quantize(values: Any, quant_type: Any = "nf4", **settings: Any) -> Any:
    """Quantize a torch tensor or a NumPy array of any shape and strides.

    A tensor whose scales 8 bits cannot hold (a decoded scale with another sign, or off by more
    than 1/8) keeps fp32 scales: look at ``.format.double_quant``.

    Args:
        values: float32, float16 or bfloat16; for NumPy, bfloat16 of ``ml_dtypes`` or uint16 bit
            patterns with ``dtype="bfloat16"``. Read-only memory is taken. They must not change
            meanwhile: each code is then of an old or a new value.
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
        **settings: ``blocksize=64``, ``double_quant=True`` (both unused by int8_row: a row of the
            last dimension has one fp32 scale), ``method="absmax"``, ``nonfinite="error"`` (or
            "keep": NaN and infinity stay in their own block).

    Returns:
        ``QuantizedTensor`` or ``QuantizedArray``, with ``packed``, ``absmax``, ``nested_absmax``,
        ``offset``, ``format`` and ``shape``.

    Raises:
        DTypeError: for any other dtype or type, sparse and wrapped tensors (``DTensor``), and
            inside of ``torch.func``'s transforms.
        FormatError: for an unknown format or setting.
        NonFiniteError: for NaN or infinity, unless kept.
    """
    if _is_tensor(values):
        return importlib.import_module("qkern.functional").quantize(values, quant_type, **settings)
    if not _is_array(values):
        kind = type(values).__name__
        what = "is quantized already" if kind == "QuantizedArray" else "cannot be quantized"
        msg = f"a {kind} {what}: pass a torch tensor or a NumPy array"
        raise DTypeError(msg)
    return importlib.import_module("qkern.arrays").quantize(values, quant_type, **settings)


def dequantize(q: Any, dtype: Any = None, *, out: Any = None) -> Any:
    """The dense values of what ``quantize`` returned, rounded once.

    Args:
        q: ``QuantizedTensor`` or ``QuantizedArray``.
        dtype: a torch dtype for a tensor, a name for an array; that of the quantized value if
            None.
        out: a tensor, or a C-contiguous array, of q's shape to write into.

    Raises:
        DTypeError: for anything else than ``quantize`` returned, and for any other dtype.
        ShapeError: for an ``out`` that does not fit.
    """
    if _is_tensor(q):
        return importlib.import_module("qkern.functional").dequantize(q, dtype, out=out)
    arrays = importlib.import_module("qkern.arrays")
    if not isinstance(q, arrays.QuantizedArray) or not (out is None or _is_array(out)):
        msg = (
            "dequantize takes what quantize returned, and an out of the same kind: got "
            f"{type(q).__name__} and {type(out).__name__}"
        )
        raise DTypeError(msg)
    return arrays.dequantize(q, dtype, out=out)


def _is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor, without importing torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    """Whether ``value`` is a NumPy array or scalar, without importing NumPy to find out."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
