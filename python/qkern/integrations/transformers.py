"""transformers opens and quantizes by qkern once this module is imported: the line that registers.

import qkern.integrations.transformers
from qkern.integrations.transformers import QkernConfig

model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QkernConfig("nf4"))
"""

from __future__ import annotations

import importlib.util
from typing import Final

from qkern.errors import MissingDependencyError

# The first whose loader asks quantizers as it is done here.
_NEEDED: Final = "5.0"

try:
    import transformers
except ModuleNotFoundError as error:
    _msg = f'this needs transformers {_NEEDED} or newer: pip install "transformers>={_NEEDED}"'
    raise MissingDependencyError(_msg) from error

if importlib.util.find_spec("transformers.core_model_loading") is None:
    _msg = (
        f"transformers {transformers.__version__} is installed, whose loader cannot be extended as "
        f'qkern needs: pip install "transformers>={_NEEDED}"; with the installed one, '
        "qkern.load(path, quant_type=...) and qkern.quantize_model work"
    )
    raise MissingDependencyError(_msg)

from transformers.quantizers.auto import (  # noqa: E402 - after the check
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from qkern.integrations.hf_config import METHOD, QkernConfig, model_config  # noqa: E402
from qkern.integrations.hf_quantizer import QkernQuantizer  # noqa: E402

__all__ = ["QkernConfig", "QkernQuantizer", "model_config"]

if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reload finds it there
    register_quantization_config(METHOD)(QkernConfig)
    register_quantizer(METHOD)(QkernQuantizer)
