"""What becomes of each tensor of a dense checkpoint that is quantized file by file. No torch.

``selection`` tells by names and shapes what ``quantize_model`` would quantize. A file holds what
that does not reach, the experts of a layer as one tensor, and does not tell the class of a layer:
what is known to be no linear layer stays dense.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from qkern.checkpoint.selection import named_by, select, vocab_size_of, why_never, why_vocabulary
from qkern.checkpoint.source import Source, StoredTensor
from qkern.errors import FormatError
from qkern.formats import QuantFormat
from qkern.name_patterns import is_router

RULE: Final = (
    "by names and shapes: 2-D floating-point weights and experts stacked in 3-D ones, but for "
    "embeddings, output heads and routers"
)
EMBEDDINGS: Final = ("int8_row",)

_EXPERTS: Final = re.compile(r"(?:^|\.)experts\.")
# Models whose layers of these names are transformers' Conv1D, a transposed linear layer.
_CONV1D_MODELS: Final = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_CONV1D: Final = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)\.weight")


@dataclasses.dataclass(frozen=True)
class Target:
    """What becomes of a tensor.

    Args:
        tensor: as stored.
        format: after ``for_shape``; None if it stays dense.
        reason: why it stays dense, or has another format than was asked for; empty otherwise.
        expected: whether nobody would be surprised that it is dense.
        transposed: whether what is quantized is its transpose: of a Conv1D, the linear layer that
            it is.
    """

    tensor: StoredTensor
    format: QuantFormat | None
    reason: str = ""
    expected: bool = True
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """After."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape


def choose_targets(
    source: Source,
    fmt: QuantFormat,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: str | None = None,
) -> list[Target]:
    """A target for every tensor, in the order of ``source.tensors``.

    Args:
        source: dense.
        fmt: before ``for_shape``.
        include: names, ends of names or globs of what is quantized whatever its name and shape.
        exclude: the same of what is not; goes before ``include``.
        embeddings: "int8_row" for embeddings and output heads in that format, None for dense ones.

    Raises:
        FormatError: if a pattern matches no tensor, or the source is quantized already.
    """
    _refuse_quantized(source)
    vocab_size = vocab_size_of(source.config)
    tensors = list(source.tensors.values())
    reasons = select(tensors, include=include, exclude=exclude, vocab_size=vocab_size)
    rules = _Rules(source.config, source.tensors, fmt)
    targets = []
    for tensor in tensors:
        reason, named = reasons[tensor.name], [*named_by(tensor, exclude)]
        if named:
            targets.append(Target(tensor, None, reason))
        elif named_by(tensor, include):
            targets.append(rules.quantized(tensor, fmt, reason))
        elif len(tensor.shape) == 2 and why_vocabulary(tensor, vocab_size=vocab_size):
            targets.append(_of_vocabulary(tensor, reason, embeddings, rules))
        else:
            targets.append(rules.target(tensor, reason))
    return _keep_ties(targets, source.config, vocab_size)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What a model's configuration and names say beyond a single tensor.

    Args:
        config: content of ``config.json``.
        names: of all tensors.
        fmt: before ``for_shape``.
    """

    config: Mapping[str, Any]
    names: Collection[str]
    fmt: QuantFormat

    def target(self, tensor: StoredTensor, reason: str) -> Target:
        """A target of which the caller has said nothing; ``reason`` is that of ``selection``."""
        if len(tensor.shape) == 3 and _EXPERTS.search(tensor.name):
            reason = why_never(tensor) or self._why_not_per_expert(tensor)
            return self.quantized(tensor, self.fmt, reason)
        if not reason and is_router(tensor.name.removesuffix(".weight"), self.names):
            return Target(tensor, None, "a router, by its name")
        return self.quantized(tensor, self.fmt, reason)

    def quantized(self, tensor: StoredTensor, fmt: QuantFormat, reason: str) -> Target:
        """The target if nothing but ``reason`` speaks against it."""
        reason = reason or _why_no_rows(tensor, fmt)
        if reason:
            return Target(tensor, None, reason, expected=len(tensor.shape) < 2)
        target = Target(tensor, fmt, transposed=is_conv1d(tensor, self.config))
        return dataclasses.replace(target, format=fmt.for_shape(target.shape))

    def _why_not_per_expert(self, tensor: StoredTensor) -> str:
        size = tensor.shape[1] * tensor.shape[2]
        if self.fmt.kind.per_row or size % self.fmt.blocksize == 0:
            return ""
        return (
            f"blocks would straddle experts: {size} values each, no multiple of the blocksize "
            f"{self.fmt.blocksize}"
        )


def is_conv1d(tensor: StoredTensor, config: Mapping[str, Any]) -> bool:
    """Whether a model's layer of this name is transformers' Conv1D, whose weight is (in, out)."""
    return has_conv1d(config) and len(tensor.shape) == 2 and bool(_CONV1D.fullmatch(tensor.name))


def quantized_transposed(conv1d: Iterable[StoredTensor]) -> bool | None:
    """Whether quantized weights of Conv1D are (out, in), as those of linear layers.

    Quantized layers are linear ones: the weights of Conv1D are transposed for them, but by programs
    that know nothing of classes. The shapes of layers that widen tell which it was.

    Args:
        conv1d: all of a checkpoint.

    Returns:
        None if no layer of them is known to widen.
    """
    wide = [tensor for tensor in conv1d if tensor.name.endswith(("c_attn.weight", "c_fc.weight"))]
    return any(tensor.shape[0] > tensor.shape[1] for tensor in wide) if wide else None


def has_conv1d(config: Mapping[str, Any]) -> bool:
    """Whether a model is known to have such layers."""
    return config.get("model_type") in _CONV1D_MODELS


def _of_vocabulary(
    tensor: StoredTensor, reason: str, embeddings: str | None, rules: _Rules
) -> Target:
    if embeddings is None or why_never(tensor):
        return Target(tensor, None, reason)
    target = rules.quantized(tensor, QuantFormat(embeddings, 0), "")
    if target.format is None:
        return dataclasses.replace(target, expected=True)
    return dataclasses.replace(target, reason=f"{embeddings}: {reason}")


def _why_no_rows(tensor: StoredTensor, fmt: QuantFormat) -> str:
    """Why the keys of int8 rows cannot name a tensor; empty if they can, or for other formats."""
    if fmt.kind.state is not None:
        return ""
    if tensor.name.rpartition(".")[2] != "weight":
        return f"{fmt.quant_type} has keys for parameters named weight alone"
    if len(tensor.shape) < 2:
        return f"{fmt.quant_type} needs 2 dimensions, it has {len(tensor.shape)}"
    return ""


def _keep_ties(
    targets: Sequence[Target], config: Mapping[str, Any], vocab_size: int | None
) -> list[Target]:
    """Leave dense what the model ties to a dense embedding: one of them is read for both."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        return list(targets)
    shared = [
        target
        for target in targets
        if len(target.tensor.shape) == 2
        and target.tensor.shape[0] == vocab_size
        and why_vocabulary(target.tensor, vocab_size=vocab_size)
    ]
    dense = next((target.tensor.name for target in shared if target.format is None), None)
    if dense is None:
        return list(targets)
    reason = f"tied to {dense}, which is dense"
    names = {target.tensor.name for target in shared if target.format is not None}
    return [
        Target(target.tensor, None, reason) if target.tensor.name in names else target
        for target in targets
    ]


def _refuse_quantized(source: Source) -> None:
    name = next((t.name for t in source.tensors.values() if t.format is not None), None)
    if name is not None:
        fmt = source.tensors[name].format
        kind = "" if fmt is None else fmt.quant_type
        msg = f"{source.path} is quantized already: {name} is {kind}; start from the dense model"
        raise FormatError(msg)
    found = source.config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        msg = (
            f"{source.path}: config.json says that it is quantized already, by {method!r}: start "
            "from the dense model"
        )
        raise FormatError(msg)
