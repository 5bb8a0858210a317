"""qkern with NumPy alone: run by test_imports.py (torch hidden) and test_wheel.py (torch absent).

    python without_torch.py [module to hide ...]

Any failure is an error; the last line says what ran.
"""

from __future__ import annotations

import sys

for name in sys.argv[1:]:
    sys.modules[name] = None  # type: ignore[assignment]  # `import name` then says: not found

import numpy as np  # noqa: E402 - what is hidden must be hidden first

import qkern  # noqa: E402

# largest error in units of the largest value
FORMATS = {"nf4": 0.2, "fp4": 0.2, "int8": 0.005, "int8_row": 0.005}


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Upper halves of fp32 bits: bfloat16, rounded towards zero."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as fp32."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def check(values: np.ndarray, expected: np.ndarray, quant_type: str, **dtype: str) -> None:
    """Quantize, dequantize and compare with the fp32 values that ``values`` stands for."""
    q = qkern.quantize(values, quant_type, **dtype)
    assert q.shape == values.shape
    dense = qkern.dequantize(q)
    assert dense.shape == values.shape
    assert q.nbytes < expected.nbytes / 3
    wide = from_bits(dense) if dense.dtype.name in ("bfloat16", "uint16") else dense
    error = np.abs(wide.astype(np.float32) - expected).max() / np.abs(expected).max()
    assert error < FORMATS[quant_type], (quant_type, values.dtype, error)
    out = np.empty(values.shape, np.float32)
    assert qkern.dequantize(q, "float32", out=out) is out


def why_missing(name: str) -> str:
    """What a name that needs torch says."""
    try:
        getattr(qkern, name)
    except qkern.MissingDependencyError as error:
        return str(error)
    return "it is there"


def main() -> None:
    """Every format on every dtype; then what needs torch."""
    values = np.random.default_rng(0).standard_normal((24, 100)).astype(np.float32)
    half, bits = values.astype(np.float16), bfloat16_bits(values)
    ran = []
    for quant_type in FORMATS:
        check(values, values, quant_type)
        check(values[::2, 1:], values[::2, 1:], quant_type)  # strides of a view
        check(half, half.astype(np.float32), quant_type)
        check(bits, from_bits(bits), quant_type, dtype="bfloat16")
        ran += ["float32", "float16", "uint16"]
        try:
            import ml_dtypes
        except ImportError:
            continue
        check(bits.view(ml_dtypes.bfloat16), from_bits(bits), quant_type)
        ran.append("bfloat16")
    assert issubclass(qkern.MissingDependencyError, ImportError)
    assert 'pip install "qkern[torch]"' in why_missing("quantize_model")
    assert 'pip install "qkern[torch]"' in why_missing("add_lora")
    print(f"works: {' '.join(dict.fromkeys(ran))} with qkern {qkern.__version__}")


if __name__ == "__main__":
    main()
