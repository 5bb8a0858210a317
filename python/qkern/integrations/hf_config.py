"""``QkernConfig``: what transformers is told by ``quantization_config=``, and writes again."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final, NoReturn

from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkern.checkpoint.load import is_quantized
from qkern.checkpoint.quantization_config import quantization_config
from qkern.codec import check_choice, check_method
from qkern.errors import ArgumentError, FormatError
from qkern.formats import KINDS, QuantFormat, resolve_format

METHOD: Final = "qkern"
_SAVE_AS: Final = (METHOD, "bitsandbytes")
# Of the arguments, those that config.json holds, and the others.
_STORED: Final = ("quant_type", "blocksize", "double_quant", "modules_to_not_convert")
_ARGUMENTS: Final = (*_STORED, "method", "min_coverage", "save_as")
_BITSANDBYTES: Final = "bitsandbytes"
# What a BitsAndBytesConfig writes, and does not take.
_NOT_GIVEN: Final = ("quant_method", "_load_in_4bit", "_load_in_8bit")
# What is meant by the names that other packages have.
_MEANT: Final = {
    "load_in_4bit": 'QkernConfig("nf4")',
    "load_in_8bit": 'QkernConfig("int8_row")',
    "bnb_4bit_quant_type": 'QkernConfig("nf4") or QkernConfig("fp4")',
    "bnb_4bit_use_double_quant": "double_quant=",
    "llm_int8_skip_modules": "modules_to_not_convert=",
    "exclude": "modules_to_not_convert=",
    "block_size": "blocksize=",
    "group_size": "blocksize=",
}
_UNUSED: Final = "leave it out: layers compute in the dtype of their input, codes are bytes"


class QkernConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a dense checkpoint; formats as ``qkern.quantize_model``.

    Of a checkpoint that is quantized already the files say it all, and nothing here is used.

    Args:
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: store the scales in 8 bits; unused by int8_row.
        method: "absmax" or "search", see ``qkern.quantize``.
        modules_to_not_convert: paths, ends of paths, or globs of modules whose linear layers stay
            dense, beside those that always do: the output head, tied weights, and what the model's
            class keeps in float32.
        min_coverage: least share of the values that must be quantized, 0 to 1; checked before any
            weight is read.
        save_as: whom ``save_pretrained`` names in ``config.json`` as the one who opens the files:
            "qkern", or "bitsandbytes", which reads nf4, fp4 and int8_row. The weights are the same.
            int8_row is always bitsandbytes'.

    Raises:
        FormatError: for an unknown format or setting.
        ArgumentError: for any other argument, ``load_in_4bit`` for one, with the one that is meant.
    """

    def __init__(
        self,
        quant_type: str | QuantFormat = "nf4",
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        method: str = "absmax",
        modules_to_not_convert: str | Sequence[str] | None = None,
        min_coverage: float | None = None,
        save_as: str = METHOD,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise _not_taken(unknown)
        fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
        check_method(method, fmt, has_importance=False)
        check_choice("save_as", save_as, _SAVE_AS)
        if save_as == _BITSANDBYTES and not _is_bitsandbytes(fmt):
            msg = f"save_as='bitsandbytes': it has no {fmt.quant_type}; nf4, fp4, int8_row are its"
            raise FormatError(msg)
        names = modules_to_not_convert or ()
        self.quant_method = METHOD  # type: ignore[assignment] # an enum of transformers' own
        self.quant_type = fmt.quant_type
        self.blocksize = fmt.blocksize
        self.double_quant = fmt.double_quant
        self.method = method
        self.modules_to_not_convert = [names] if isinstance(names, str) else list(names)
        self.min_coverage = min_coverage
        self.save_as = save_as
        self._format = fmt
        self._dtype = "float32"
        self._plain = True

    @property
    def format(self) -> QuantFormat:
        """The format, before ``for_shape``."""
        return self._format

    @classmethod
    def from_bitsandbytes(
        cls, config: BitsAndBytesConfig | Mapping[str, Any], **settings: Any
    ) -> QkernConfig:
        """The format of a ``BitsAndBytesConfig``: nf4 or fp4 in blocks of 64, or int8 rows.

        Its compute dtype, storage dtype and outlier threshold have no counterpart: layers compute
        in the dtype of their input, and int8 rows are multiplied without rounding it.

        Args:
            config: the object, or the entries of a ``config.json``.
            **settings: other arguments of the class, ``method`` for one.

        Raises:
            FormatError: if neither 4 nor 8 bits are asked for, or 8 bits with dense main weights.
        """
        given: Any = config
        if isinstance(config, Mapping):
            fields = {key: value for key, value in config.items() if key not in _NOT_GIVEN}
            given = BitsAndBytesConfig(**fields)  # type: ignore[no-untyped-call]
        kept = {"modules_to_not_convert": given.llm_int8_skip_modules, **settings}
        if given.load_in_4bit:
            double_quant = given.bnb_4bit_use_double_quant
            return cls(given.bnb_4bit_quant_type, double_quant=double_quant, **kept)
        if not given.load_in_8bit or given.llm_int8_has_fp16_weight:
            msg = (
                f"load_in_4bit={given.load_in_4bit}, load_in_8bit={given.load_in_8bit}, "
                f"llm_int8_has_fp16_weight={given.llm_int8_has_fp16_weight}: one of the first two "
                "is needed, without the third"
            )
            raise FormatError(msg)
        return cls("int8_row", **kept)

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,  # noqa: FBT001 - transformers' signature
        **kwargs: Any,
    ) -> Any:
        """From the arguments of the class by name, or the entries of a ``config.json``.

        Raises:
            FormatError: for a name that is none of them.
        """
        given = {key: value for key, value in config_dict.items() if key != "quant_method"}
        unknown = sorted(set(given).difference(_ARGUMENTS))
        if unknown:
            msg = (
                f"quantization_config has {unknown[0]!r}, which is not known here (made by a newer "
                f"qkern?): known are {', '.join(_ARGUMENTS)}"
            )
            raise FormatError(msg)
        named = str(given.get("quant_type"))
        only_read = named in KINDS and bool(KINDS[named].decode_only)
        if only_read:
            given["quant_type"] = "nf4"
        made: Any = super().from_dict(given, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]
        if only_read:
            config: QkernConfig = made[0] if return_unused_kwargs else made
            fmt = QuantFormat(named, config.blocksize)
            config.describe(fmt, config.modules_to_not_convert, config._dtype)
        return made

    def to_dict(self) -> dict[str, Any]:
        """The entries for ``config.json``: the method that is named there says who opens it."""
        rows = self._format.kind.state is None
        by_others = self._plain and (self.save_as == _BITSANDBYTES or rows)
        entries: dict[str, Any] = quantization_config(
            self._format, self.modules_to_not_convert, self._dtype, bitsandbytes=by_others
        )["quantization_config"]
        return entries

    def describe(
        self, fmt: QuantFormat, dense: Sequence[str], dtype: str, *, plain: bool = True
    ) -> None:
        """Take over what a model was found to be: its format, dense layers and dtype.

        ``plain``: whether only linear layers are quantized, which bitsandbytes has too.
        """
        self._format = fmt
        self.quant_type, self.blocksize = fmt.quant_type, fmt.blocksize
        self.double_quant = fmt.double_quant
        self.modules_to_not_convert = list(dense)
        self._dtype = dtype
        self._plain = plain
        if not plain or not _is_bitsandbytes(fmt):
            self.save_as = METHOD


def model_config(path: str | PathLike[str], **settings: Any) -> PreTrainedConfig:
    """A checkpoint's configuration that has qkern open it, whoever it names.

        AutoModelForCausalLM.from_pretrained(path, config=model_config(path))

    For directories of bitsandbytes, ``qkern.save`` and ``qkern quantize``, whose ``config.json``
    names bitsandbytes: transformers would ask that package.

    Args:
        path: a directory, or a name on the Hub.
        **settings: of ``AutoConfig.from_pretrained``.

    Raises:
        FormatError: if it is not quantized, or by another method.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, **settings)
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method", _BITSANDBYTES) if isinstance(found, dict) else None
    if isinstance(found, dict) and method == _BITSANDBYTES:
        mine = QkernConfig.from_bitsandbytes(found)
        stored = {name: getattr(mine, name) for name in _STORED}
        config.quantization_config = stored | {"quant_method": METHOD, "save_as": _BITSANDBYTES}
    elif method != METHOD:
        what = "is not quantized" if method is None else f"was quantized by {method!r}"
        if method is None and any(Path(path).glob("*.safetensors")) and is_quantized(Path(path)):
            msg = (
                f"{path}: config.json does not say that the files are quantized, as where "
                "save_pretrained or a Trainer wrote what qkern.quantize_model quantized: "
                "qkern.load opens them, and qkern.save writes what is opened here"
            )
            raise FormatError(msg)
        msg = f"{path} {what}: bitsandbytes' and qkern's files are opened so; dense ones are with "
        raise FormatError(msg + "quantization_config=QkernConfig(...)")
    return config


def _is_bitsandbytes(fmt: QuantFormat) -> bool:
    return (fmt.kind.state or _BITSANDBYTES).startswith(_BITSANDBYTES)


def _not_taken(names: Iterable[str]) -> ArgumentError:
    """The error for arguments that are not ours: what is meant by each."""
    told = []
    for name in names:
        near = difflib.get_close_matches(name, _ARGUMENTS, n=1)
        meant = _MEANT.get(name) or (f"{near[0]}=" if near else "")
        theirs = name.startswith(("bnb_4bit_", "llm_int8_"))
        other = _UNUSED if theirs else "not known here"
        told.append(f"{name} ({f'write {meant}' if meant else other})")
    msg = (
        f"QkernConfig does not take {', '.join(told)}. Its arguments are {', '.join(_ARGUMENTS)}; "
        "a BitsAndBytesConfig is taken as it is by QkernConfig.from_bitsandbytes(config)"
    )
    return ArgumentError(msg)
