"""What has transformers collect a file's entries of each quantized weight, and make it of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from qkern import entry_keys, flat_keys
from qkern.checkpoint.stacking import join
from qkern.errors import CorruptFileError
from qkern.formats import KINDS
from qkern.integrations.hf_files import Placed, Stack
from qkern.integrations.hf_loading import Operation

if TYPE_CHECKING:
    from qkern.integrations.hf_quantizer import QkernQuantizer

# Keys of a quantized weight beside its own.
_NESTED: Final = ("nested_absmax", "nested_quant_map")
_COMPANIONS: Final = (
    *("absmax", "quant_map", *_NESTED),
    *(f"quant_state.{kind.state}" for kind in KINDS.values() if kind.state),
)
_WEIGHT: Final = f".{entry_keys.WEIGHT}"
_NUMBER: Final = r"\.[0-9]+\."


def converters(quantizer: QkernQuantizer, placed: Placed) -> list[WeightConverter]:
    r"""For weights of linear layers, those of other modules, and experts that are stacked.

    In their patterns "(a|b)" is the group of what a kind of names begins with, and "\1" stands for
    it in each of the sources. Of two sources that match, transformers takes the longer one, or in
    older versions the first.

    Args:
        quantizer: whose errors are kept.
        placed: what the file holds.
    """
    # Else a layer "vision.a" would be taken for "a".
    suffixes = [rf"\.{re.escape(name)}" for name in _COMPANIONS]
    weights = {n.removesuffix(_WEIGHT): q for n, q in placed.names.items() if n.endswith(_WEIGHT)}
    dense = [name for name, q in placed.names.items() if not q]
    found = []
    if any(weights.values()):
        sources = [rf"^\1\.weight{suffix}" for suffix in suffixes]
        names = (entry_keys.LAYOUT, entry_keys.SCALES, entry_keys.WEIGHT)
        sources += [rf"^\1\.{name}" for name in names]
        stems = [name for name, q in weights.items() if q]
        group = _group(stems, [name.removesuffix(_WEIGHT) for name in dense])
        found.append(WeightConverter(sources, f"{group}.weight", [Unflatten(quantizer, _WEIGHT)]))
    whole = [name for name, q in placed.names.items() if q and not name.endswith(_WEIGHT)]
    if whole:
        sources = [*(rf"^\1{suffix}" for suffix in suffixes), r"^\1$"]
        found.append(WeightConverter(sources, _group(whole, dense), [Unflatten(quantizer, "")]))
    kinds: dict[tuple[str, tuple[str, ...]], dict[str, bool]] = {}
    for stack, q in placed.stacks.items():
        kinds.setdefault((stack.parameter, stack.tails), {})[stack.stem] = q
    for (parameter, tails), stems_of in kinds.items():
        if any(stems_of.values()):
            group = _group([stem for stem, q in stems_of.items() if q], stems_of)
            sources = [rf"^\1{_NUMBER}{re.escape(t)}{suffix}" for suffix in suffixes for t in tails]
            sources += [rf"^\1{_NUMBER}{re.escape(t)}$" for t in tails]
            operation = Restack(quantizer, Stack("", parameter, tails))
            found.append(WeightConverter(sources, f"{group}.{parameter}", [operation]))
    return found


def _group(stems: list[str], others: Iterable[str]) -> str:
    """A group that matches ``stems`` and nothing else of ``others``.

    One pattern for all layers of a kind, where all are quantized: few patterns are matched fast.
    """
    kinds: dict[str, list[str]] = {}
    for stem in stems:
        kinds.setdefault(_kind(stem), []).append(stem)
    wanted = set(stems)
    mixed = {_kind(name) for name in others if name not in wanted}
    patterns: list[str] = []
    for kind, members in kinds.items():
        patterns += map(re.escape, members) if kind in mixed else [kind]
    return f"({'|'.join(patterns)})"


def _kind(name: str) -> str:
    """The pattern of a layer's name with any numbers."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", r"[0-9]+", re.escape(name).replace(r"\.", ".")).replace(
        ".", r"\."
    )


class _Unchanged(ConversionOps):
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        return dict.fromkeys([kwargs["full_layer_name"]], *input_dict.values())


class Unflatten(Operation):
    """A file's entries of a quantized weight, as the weight.

    Args:
        hf_quantizer: whose errors are kept.
        tail: what the name of the parameter ends with, after the group of the patterns.
    """

    def __init__(self, hf_quantizer: QkernQuantizer, tail: str) -> None:
        super().__init__(hf_quantizer)
        self.tail = tail

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Entries by their patterns, each a list of one, to the parameter by its name."""
        name = kwargs["full_layer_name"]
        stem = name.removesuffix(self.tail)
        entries = {
            stem + _after(pattern, ")"): found[0] if isinstance(found, list) else found
            for pattern, found in input_dict.items()
        }
        empty = kwargs["model"].get_parameter(name)

        def make() -> Tensor:
            q = flat_keys.unflatten(entries, name, empty.dtype)
            return q.to(empty.dtype)

        device = next(iter(entries.values())).device
        return {name: self.hf_quantizer.attempt(make, empty, device)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Modules flatten their weights themselves."""
        return _Unchanged()


class Restack(Operation):
    """A file's entries of experts that were quantized one by one, as the stacked weight.

    Args:
        hf_quantizer: whose errors are kept.
        stack: how the parts are called; its stem is not used.
    """

    def __init__(self, hf_quantizer: QkernQuantizer, stack: Stack) -> None:
        super().__init__(hf_quantizer)
        self.stack = stack

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Entries by their patterns, each a list by expert, to the parameter by its name."""
        name = kwargs["full_layer_name"]
        found = {_after(pattern, f"){_NUMBER}"): each for pattern, each in input_dict.items()}
        empty = kwargs["model"].get_parameter(name)

        def make() -> Tensor:
            slots = [self._weights(name, tail, found, empty.dtype) for tail in self.stack.tails]
            weights = [weight for expert in zip(*slots, strict=True) for weight in expert]
            return join(name, weights, len(slots[0])).to(empty.dtype)

        device = next(iter(found.values()))[0].device
        return {name: self.hf_quantizer.attempt(make, empty, device)}

    def _weights(
        self, name: str, tail: str, found: dict[str, list[Tensor]], dtype: torch.dtype
    ) -> list[Any]:
        """The experts' weights of a slot."""
        mine = {key: each for key, each in found.items() if f"{key}.".startswith(f"{tail}.")}
        nested = {key: iter(mine.pop(key)) for n in _NESTED if (key := f"{tail}.{n}") in mine}
        if len({len(each) for each in mine.values()}) > 1:
            msg = f"{name}: its experts were quantized to several formats: {tail} is to have one"
            raise CorruptFileError(msg)
        weights = []
        for i in range(len(mine[tail])):
            entries = {key: each[i] for key, each in mine.items()}
            if entries[f"{tail}.absmax"].dtype == torch.uint8:  # some can have fp32 scales
                entries |= {key: next(each) for key, each in nested.items()}
            weights.append(flat_keys.unflatten(entries, tail, dtype))
        return weights

    @property
    def reverse_op(self) -> ConversionOps:
        """Modules flatten their weights themselves."""
        return _Unchanged()


def _after(pattern: str, group: str) -> str:
    """The part of a source pattern after its group, as it stands in a file."""
    return pattern.rpartition(group)[2].removesuffix("$").replace("\\", "")
