"""Which tensors of a dense checkpoint ``quantize_model`` would quantize, by names and shapes.

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from qkern.checkpoint.source import StoredTensor
from qkern.errors import FormatError
from qkern.formats import DTYPES
from qkern.name_patterns import matches

RULE: Final = "by names and shapes: 2-D floating-point weights, but for embeddings and output heads"

# Last part of a module's path, as the models of transformers call these.
_EMBEDDINGS: Final = re.compile(
    r"(\w+_)?embed(ding)?s?(_in|_positions|_tokens\w*)?|emb|shared|token_embd|wpe|wte"
    r"|relative_attention_bias"
)
_HEADS: Final = re.compile(
    r"(\w+_)?lm_head|classifier|embed_out|head|output_layer|qa_outputs|score|vocab_projector"
)
# The whole path of a module: too common a word further inside.
_HEAD_PATHS: Final = re.compile(r"output|(cls|lm_head|classifier|score)\..+")


def why_dense(tensor: StoredTensor, *, vocab_size: int | None = None) -> str:
    """Why ``quantize_model`` would leave a tensor dense; empty if it would quantize it.

    A file does not tell the class of a layer. What is known: nn.Linear holds a 2-D parameter
    ``weight``; embeddings and output heads have usual names and ``vocab_size`` rows. So a 2-D
    weight of another class (Conv1D of GPT-2) counts here and is dense in the model.

    Args:
        tensor: dense.
        vocab_size: of the model's configuration, None if unknown.
    """
    parameter = tensor.name.rpartition(".")[2]
    reason = why_never(tensor)
    if reason:
        return reason
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D, a linear layer's weight is 2-D"
    if parameter != "weight":
        return "not named weight, as a linear layer's is"
    return why_vocabulary(tensor, vocab_size=vocab_size)


def why_vocabulary(tensor: StoredTensor, *, vocab_size: int | None = None) -> str:
    """Why a 2-D weight counts as an embedding or an output head; empty if it does not."""
    module = tensor.name.rpartition(".")[0]
    last = module.rpartition(".")[2]
    if _EMBEDDINGS.fullmatch(last):
        return "an embedding, by its name"
    if _HEADS.fullmatch(last) or _HEAD_PATHS.fullmatch(module):
        return "the output head, by its name"
    if vocab_size is not None and tensor.shape[0] == vocab_size:
        return "embedding or output head: vocab_size rows"
    return ""


def why_never(tensor: StoredTensor) -> str:
    """Why a tensor cannot be quantized at all; empty if it can."""
    if tensor.dtype not in DTYPES:
        floating = tensor.dtype.lower().startswith("f")
        return f"{tensor.dtype}, " + (
            f"not one of {', '.join(DTYPES)}" if floating else "not floating point"
        )
    return "" if tensor.numel else "no values"


def select(
    tensors: Iterable[StoredTensor],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    vocab_size: int | None,
) -> dict[str, str]:
    """The reason of ``why_dense`` for each tensor's name, with a caller's wishes.

    Args:
        tensors: dense ones.
        include: paths, ends of paths or globs of what is quantized whatever its name and shape.
        exclude: the same of what is not; goes before ``include``.
        vocab_size: see ``why_dense``.

    Raises:
        FormatError: if a pattern matches no tensor.
    """
    unmatched = {*include, *exclude}
    reasons = {}
    for tensor in tensors:
        hits = set(named_by(tensor, (*include, *exclude)))
        unmatched -= hits
        excluded = next((pattern for pattern in exclude if pattern in hits), None)
        if excluded is not None:
            reasons[tensor.name] = f"excluded by {excluded!r}"
        elif any(pattern in hits for pattern in include):
            reasons[tensor.name] = why_never(tensor)
        else:
            reasons[tensor.name] = why_dense(tensor, vocab_size=vocab_size)
    if unmatched:
        msg = f"{min(unmatched)!r} matches no dense tensor: names, ends of names or globs do"
        raise FormatError(msg)
    return reasons


def named_by(tensor: StoredTensor, patterns: Sequence[str]) -> list[str]:
    """The patterns that mean a tensor, by its key or that of its module."""
    names = {tensor.name, tensor.name.removesuffix(".weight")}
    return [pattern for pattern in patterns if any(matches(name, pattern) for name in names)]


def vocab_size_of(config: dict[str, Any]) -> int | None:
    """``vocab_size`` of a transformers configuration; of its text part if it has several."""
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
