"""An adapter's files, read and checked without torch, and its parts of a base's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from qkern import adapter_config
from qkern.adapter_config import BASE_KEY, CHANGED_KEY, CONFIG_NAME, PREFIX, WEIGHTS_NAME
from qkern.adapter_files import check_files
from qkern.checkpoint.base_fingerprint import fingerprint, tensors_of
from qkern.checkpoint.expert_weights import ExpertStack, expert_stacks
from qkern.checkpoint.lora_factors import ExpertFactors, LoraFactors, RecentEntries, read_floats
from qkern.checkpoint.source import Source, StoredTensor
from qkern.errors import AdapterMismatchError, CorruptFileError, NonFiniteError
from qkern.files import read_json
from qkern.formats import DTYPES
from qkern.merge_target import MERGE_KEY, MergeTarget, targets_of_text

# Settings beyond plain LoRA that a merge applies.
_APPLIED: Final = ("bias", "fan_in_fan_out", "modules_to_save", "target_parameters")


class AdapterSource:
    """An adapter's directory.

    Args:
        path: with PEFT's two files.

    Attributes:
        path: as given.
        config: content of ``adapter_config.json``.
        source: the weights.
        pairs: keys of A and B, by the path of their layer.
        experts: the same of weights of stacked experts, by the path of the weight.
        replaced: key of each tensor that the adapter holds whole, by its name in the model: of
            ``modules_to_save`` and of biases.

    Raises:
        FileNotFoundError: if a file is missing.
        CorruptFileError: if a file cannot be read, and for a pickle.
        AdapterMismatchError: for any adapter but LoRA, and for what is not applied here.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        check_files(self.path)
        self.config = read_json(self.path / CONFIG_NAME)
        adapter_config.check_config(self.config, self.path, applied=_APPLIED, allow_unknown=False)
        self.source = Source(self.path / WEIGHTS_NAME)
        self.replaced = self._replaced()
        shapes = {
            name: tensor.shape
            for name, tensor in self.source.tensors.items()
            if name not in self.replaced.values()
        }
        pairs = adapter_config.pair_keys(shapes, self.path)
        targets = self._targets()
        places = adapter_config.places_of_experts(pairs, targets, self.path) if targets else {}
        self.experts = {name: pairs[place] for name, place in places.items()}
        taken = set(places.values())
        self.pairs = {name: keys for name, keys in pairs.items() if name not in taken}
        names = [*self.pairs, *self.experts]
        self._alphas = adapter_config.alphas_of(self.config, names, self.path)
        self._ranks = adapter_config.ranks_of(self.config, names, self.path)
        self._entries = RecentEntries(self.source)
        self._check_dtypes()

    def _replaced(self) -> dict[str, str]:
        """Entries that are no factors, as far as the settings say that there may be some."""
        saved = self.config.get("modules_to_save") or []
        has_bias = self.config.get("bias") not in ("none", None)
        found = {}
        for key in self.source.tensors:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            module, _, last = name.rpartition(".")
            is_saved = any(f".{part}." in f".{module}." for part in saved)
            is_whole = key.startswith(PREFIX) and ".lora_" not in key
            if is_whole and (is_saved or (has_bias and last == "bias")):
                found[name] = key
        return found

    def _targets(self) -> list[str]:
        """What the settings say of weights of experts."""
        targets = self.config.get("target_parameters") or []
        if not isinstance(targets, list) or not all(isinstance(t, str) and t for t in targets):
            msg = (
                f"{self.path}: target_parameters is {str(targets)[:80]}, a list of names is needed"
            )
            raise CorruptFileError(msg)
        return targets

    def _check_dtypes(self) -> None:
        for key, tensor in self.source.tensors.items():
            if tensor.dtype not in DTYPES:
                msg = f"{self.path}: {key} is {tensor.dtype}: allowed are {', '.join(DTYPES)}"
                raise AdapterMismatchError(msg)

    def targets(self, weights: Mapping[str, StoredTensor]) -> dict[str, MergeTarget]:
        """What the adapter was trained to be merged into, by the name of the base's tensor.

        Raises:
            CorruptFileError: if the file does not say it readably.
        """
        text = self.source.metadata.get(MERGE_KEY)
        found = {} if text is None else targets_of_text(text, self.path)
        return {weights[name].name: target for name, target in found.items() if name in weights}

    def check_finite(self) -> None:
        """Refuse NaN and infinity, before anything is written.

        Raises:
            NonFiniteError: naming the layer.
        """
        for key in self.source.tensors:
            count = int(np.count_nonzero(~np.isfinite(read_floats(self.source, key))))
            if count:
                name = key.removeprefix(PREFIX)
                msg = f"{self.path}: {count} values of {name} are NaN or infinite: train it again"
                raise NonFiniteError(msg)

    def weights_of(self, base: Source) -> dict[str, StoredTensor]:
        """The base's tensor for each layer of the adapter, by the layer's path.

        The paths of a model and the keys of its files may differ in front: "transformer.h.0" and
        "h.0". What is cut off or set before is the same for all.

        Raises:
            AdapterMismatchError: if there are none, or of other shapes.
        """
        rename = self._renaming(base)
        missing = [name for name in self.pairs if f"{rename(name)}.weight" not in base.tensors]
        if missing:
            names = [key.removesuffix(".weight") for key in base.tensors]
            told = adapter_config.not_found(missing, len(self.pairs), names)
            msg = f"{base.path} has no layer {missing[0]}, which {self.path} is for; {told}"
            raise AdapterMismatchError(msg)
        return {name: base.tensors[f"{rename(name)}.weight"] for name in self.pairs}

    def stacks_of(self, base: Source) -> dict[str, ExpertStack]:
        """The base's weights of experts for each of the adapter's, by the adapter's paths.

        Raises:
            AdapterMismatchError: if there are none.
            CorruptFileError: if the base lacks experts.
        """
        if not self.experts:
            return {}
        rename, stacks = self._renaming(base), expert_stacks(base)
        found = {name: stacks.get(rename(name)) for name in self.experts}
        for name, stack in found.items():
            if stack is None:
                close = adapter_config.nearest(rename(name), stacks)
                msg = (
                    f"{base.path} has no weight of experts {name}, which {self.path} is for; "
                    f"nearest: {close}; a model with other names in its files is merged when it is "
                    "loaded (qkern.load, load_adapter, merge_to_dense)"
                )
                raise AdapterMismatchError(msg)
        return {name: stack for name, stack in found.items() if stack is not None}

    def replacements_of(self, base: Source) -> dict[str, str]:
        """Key of the adapter's tensor for each of the base's that it replaces.

        Raises:
            AdapterMismatchError: if the base has no such tensor, or one of another shape.
        """
        rename = self._renaming(base)
        found = {}
        for name, key in self.replaced.items():
            here, shape = base.tensors.get(rename(name)), self.source.tensors[key].shape
            if here is None or here.shape != shape:
                what = "no such tensor" if here is None else f"{list(here.shape)}"
                tied = base.tied.get(rename(name))
                if tied or (here is None and name.endswith("lm_head.weight")):
                    what = "a head that is tied to the embeddings"
                msg = (
                    f"{self.path} replaces {name} by {list(shape)}, {base.path} has {what}: merge "
                    "this adapter with PEFT (merge_and_unload)"
                )
                raise AdapterMismatchError(msg)
            found[here.name] = key
        return found

    def _renaming(self, base: Source) -> Callable[[str], str]:
        names = [*self.pairs, *self.experts]
        stacks = expert_stacks(base) if self.experts else {}
        known = {*stacks, *(key.removesuffix(".weight") for key in base.tensors)}
        depth = min(name.count(".") for name in names)
        starts = dict.fromkeys(key.partition(".")[0] for key in base.tensors)
        cuts = [".".join(names[0].split(".")[:i]) for i in range(1, depth + 1)]
        pairs = [("", ""), *((f"{cut}.", "") for cut in cuts), *(("", f"{s}.") for s in starts)]
        for cut, start in pairs:

            def rename(name: str, cut: str = cut, start: str = start) -> str:
                return start + name.removeprefix(cut)

            if all(rename(name) in known for name in names):
                return rename
        return lambda name: name

    def factors(
        self, name: str, tensor: StoredTensor, *, conv1d: bool | None = None
    ) -> LoraFactors:
        """The adapter's part of a base's weight.

        Args:
            name: of the layer, in the adapter.
            tensor: the weight.
            conv1d: whether the layer is a Conv1D; None if only the adapter's settings can tell.

        Raises:
            AdapterMismatchError: if it does not fit the weight, or the settings.
        """
        keys = self.pairs[name]
        A, B = (self.source.tensors[key].shape for key in keys)
        expected = self._ranks[name]
        if expected and A[0] != expected:
            msg = f"{self.path}: {name} has rank {A[0]}, the settings say {expected:g}"
            raise AdapterMismatchError(msg)
        # With fan_in_fan_out only some of a model's layers are Conv1D.
        if conv1d is None:
            conv1d = bool(self.config.get("fan_in_fan_out")) and tensor.shape == (A[1], B[0])
        transposed = conv1d and tensor.format is None
        fits = tensor.shape == ((A[1], B[0]) if transposed else (B[0], A[1]))
        if not fits:
            msg = (
                f"{name}: the adapter is (out, in, r) = {(B[0], A[1], A[0])}, the layer is "
                f"{tensor.shape}: is this the adapter's base model?"
            )
            raise AdapterMismatchError(msg)
        scaling = self._scaling(name, A[0])
        return LoraFactors(self.source, keys, A[0], scaling, tensor.dtype, transposed)

    def expert_factors(self, name: str, stack: ExpertStack) -> dict[str, ExpertFactors]:
        """The adapter's part of each tensor that holds experts, by the tensor's name.

        Args:
            name: of the weight, in the adapter.
            stack: where the base has it.

        Raises:
            AdapterMismatchError: if it does not fit the weight, or the settings.
        """
        keys, experts = self.experts[name], stack.sizes[0]
        A, B = (self.source.tensors[key].shape for key in keys)
        rank, expected = A[0] // experts, self._ranks[name]
        if A[0] % experts or (expected and rank != expected):
            msg = (
                f"{self.path}: {name} has {A[0]} rows of lora_A, rank {expected:g} of {experts} "
                "experts are expected: is this the adapter's base model?"
            )
            raise AdapterMismatchError(msg)
        transposed, scaling = stack.is_transposed(B[0], A[1]), self._scaling(name, rank)
        return {
            part.tensor.name: ExpertFactors(
                self._entries, keys, rank, scaling, part.tensor.dtype, transposed, experts, part
            )
            for part in stack.parts
        }

    def _scaling(self, name: str, rank: int) -> float:
        # https://arxiv.org/abs/2312.03732: rsLoRA divides by the square root of the rank.
        return self._alphas[name] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def check_base(
        self, base: Source, weights: Mapping[str, StoredTensor | ExpertStack], *, force: bool
    ) -> str:
        """Refuse a base that is not the one that the adapter says it was trained over.

        Args:
            base: that is merged into.
            weights: of it, by the path of their layer; of experts by that of the weight.
            force: only say so.

        Returns:
            What was found, for the report.

        Raises:
            AdapterMismatchError: if the fingerprints differ, or cannot be compared though the
                adapter's initialization changed its base.
        """
        trained_on = self.source.metadata.get(BASE_KEY)
        changed = self.source.metadata.get(CHANGED_KEY)
        is_dense = any(t.format is None for weight in weights.values() for t in tensors_of(weight))
        if changed and (is_dense or trained_on is None) and not force:
            msg = (
                f"{self.path}: the adapter was initialized by {changed}, which took a part out of "
                f"its quantized base, and {base.path} cannot be told to be that base: merge it "
                "into the files that qkern.save wrote, or force it (--force)"
            )
            raise AdapterMismatchError(msg)
        if trained_on is None:
            return "the adapter does not say which quantized weights it was trained over"
        if is_dense:
            return (
                "the adapter was trained over quantized weights, the base here is dense: what was "
                "trained is the sum with what qkern quantize makes of it"
            )
        here = fingerprint(base, weights)
        if here != trained_on and force:
            return "the adapter was trained over other quantized weights (forced)"
        if here != trained_on:
            msg = (
                f"{self.path}: the adapter was trained over other quantized weights than "
                f"{base.path} has: fingerprint {trained_on[:12]}, here {here[:12]}. Merge it into "
                "its own base, quantized as it was, or force it (--force)"
            )
            raise AdapterMismatchError(msg)
        return "the base is the one that the adapter was trained over"


def settings_of(adapter: AdapterSource) -> dict[str, Any]:
    """Of the adapter's settings what changes the result, as JSON values."""
    names: Sequence[str] = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    settings = {name: adapter.config.get(name) for name in (*names, *_APPLIED)}
    content: dict[str, Any] = json.loads(json.dumps(settings))
    return content
