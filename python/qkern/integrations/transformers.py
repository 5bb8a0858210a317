"""transformers opens and quantizes by qkern once this module is imported: the line that registers.

import qkern.integrations.transformers
from qkern.integrations.transformers import QkernConfig

model = AutoModelForCausalLM.from_pretrained(path, quantization_config=QkernConfig("nf4"))
"""

from __future__ import annotations

from typing import Final

from qkern.errors import MissingDependencyError

# The first whose loader asks quantizers for all that is asked of them here.
_NEEDED: Final = "5.10"

_ADVICE: Final = (
    f'transformers {_NEEDED} or newer is needed: pip install "transformers>={_NEEDED}"; without it '
    "qkern.load(path, quant_type=...) and qkern.quantize_model do the same to a model"
)

try:
    import transformers
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
except ImportError as error:
    _msg = f"{_ADVICE}; found: {error}"
    raise MissingDependencyError(_msg) from error

if not hasattr(HfQuantizer, "update_weight_conversions"):
    _msg = f"{_ADVICE}; found: {transformers.__version__}"
    raise MissingDependencyError(_msg)

from qkern.integrations.hf_config import METHOD, QkernConfig, model_config  # noqa: E402
from qkern.integrations.hf_quantizer import QkernQuantizer  # noqa: E402

__all__ = ["QkernConfig", "QkernQuantizer", "model_config"]

if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reload finds it there
    register_quantization_config(METHOD)(QkernConfig)
    register_quantizer(METHOD)(QkernQuantizer)
