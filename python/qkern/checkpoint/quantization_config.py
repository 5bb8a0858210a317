"""What ``config.json`` says of a quantized checkpoint, so that transformers opens it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qkern.formats import QuantFormat


def quantization_config(
    fmt: QuantFormat, skipped: Sequence[str], dtype: str, *, bitsandbytes: bool = True
) -> dict[str, Any]:
    """Entries of ``config.json``.

    Args:
        fmt: of most weights, before ``for_shape``.
        skipped: paths of linear layers that are dense.
        dtype: of the dense weights, as torch names it.
        bitsandbytes: whether transformers can open the files with it, as far as the caller knows;
            int8 blocks it cannot.
    """
    quantization: dict[str, Any]
    if not bitsandbytes or not (fmt.kind.state or "bitsandbytes").startswith("bitsandbytes"):
        quantization = {
            "quant_method": "qkern",
            **_as_fields(fmt),
            "modules_to_not_convert": list(skipped),
        }
    elif fmt.kind.state is None:
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list(skipped),
        }
    else:
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": fmt.quant_type,
            "bnb_4bit_use_double_quant": fmt.double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(skipped),
        }
    # Entries of int8 rows do not hold the dtype of the weights.
    named = {"dtype": dtype} if fmt.kind.state is None else {}
    return {**named, "quantization_config": quantization}


def _as_fields(fmt: QuantFormat) -> dict[str, Any]:
    return {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        "double_quant": fmt.double_quant,
    }
