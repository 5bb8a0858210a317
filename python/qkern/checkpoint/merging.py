"""``merge_checkpoint``: an adapter added to its base from file to file. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from qkern import codec
from qkern.checkpoint.adapter_source import AdapterSource, settings_of
from qkern.checkpoint.block_weights import holds_transposed
from qkern.checkpoint.conversion_report import converted
from qkern.checkpoint.converting import is_cast, transposed_weights, why_kept
from qkern.checkpoint.destination import check_place
from qkern.checkpoint.expert_weights import ExpertStack
from qkern.checkpoint.lora_factors import ExpertFactors, LoraFactors
from qkern.checkpoint.merge_report import MergedTensor, MergeReport
from qkern.checkpoint.model_card import merge_section
from qkern.checkpoint.model_config import dense_config, main_dtype, quantized_config, refuse_foreign
from qkern.checkpoint.outcomes import (
    REPLACED,
    Factors,
    Outcome,
    Places,
    Step,
    carried,
    copied,
    dense_piece,
    in_file_order,
    written_dense,
    written_quantized,
)
from qkern.checkpoint.output_plan import OutputPlan
from qkern.checkpoint.running import Progress, Run
from qkern.checkpoint.source import Source, StoredTensor
from qkern.checkpoint.stream import Done
from qkern.checkpoint.targets import Target, choose_targets, has_conv1d, is_conv1d
from qkern.errors import FormatError, LostDeltaError
from qkern.formats import DTYPES, QuantFormat, resolve_format
from qkern.merge_loss import share_text
from qkern.merge_target import MergeTarget


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    dtype: str = "bfloat16",
    quant_type: str | QuantFormat | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    min_kept: float = 0.5,
    threads: int = 0,
    mmap: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add an adapter of PEFT's format to its base, from file to file, without torch.

    A quantized base is rounded to its dtype, as it was when the adapter was trained. To that
    ``scaling * B A`` is added in fp32, and the sum is rounded once. All of the checkpoint becomes
    ``dtype``, as by ``convert_checkpoint``; or with a format the weights that are quantized in the
    base (of a dense base those that ``quantize_checkpoint`` would choose) are quantized again:
    weights without an adapter keep their codes if the format is theirs.

    Rounding loses a part of what is added, the more the fewer bits. The report tells of each weight
    how much is kept: ``1 - ||rounded - exact|| / ||delta||``; 0 or less means that nothing of it
    survives. A small delta of 2 % of the weight is lost entirely in 4 bits; not so one that was
    trained for this format and method (``merge_into``), of which all is kept.

    Applied are ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern``, ``use_rslora``,
    ``fan_in_fan_out`` (Conv1D), ``bias``, ``modules_to_save`` and ``target_parameters`` (experts,
    stacked in the files or one by one); what else changes an adapter (DoRA, ...) is refused. An
    adapter's factors are held for a few weights at a time.

    Args:
        base: directory with the safetensors files of the model, dense or quantized; or one file.
        adapter: directory with adapter_config.json and adapter_model.safetensors.
        dst: a directory that is made, or that holds no checkpoint.
        dtype: "bfloat16", "float16" or "float32" of a dense result.
        quant_type: "nf4", "fp4", "int8", "int8_row" or a ``QuantFormat`` for a quantized result.
        blocksize: see ``quantize_checkpoint``, as the next two.
        double_quant: store the scales in 8 bits.
        method: how codes are chosen.
        min_kept: a quantized result must keep so much of what is added, over all weights.
        threads: how many, 0 for one per core.
        mmap: map dense weights in place of copying them, which is faster. A file that is cut, or
            cannot be read, while it is mapped ends the process, and the next call goes on; with
            False it is an error.
        dry_run: only check and report what would be done; nothing is written.
        force: merge into another base than the adapter names, whatever is kept; and replace a
            checkpoint that is in ``dst``, and an unfinished one of other settings.
        progress: called with (bytes read since the last call, bytes of all).

    Raises:
        FileNotFoundError: if there are no safetensors weights, or no adapter.
        CorruptFileError: if a file is not readable, contradicts itself, or changes meanwhile.
        AdapterMismatchError: if the adapter is of another kind, or of another base.
        FormatError: for an unknown setting, and for stacked experts in mxfp4 that would be
            quantized again.
        NonFiniteError: for NaN in the adapter or in a sum that is quantized, and for a sum that is
            too large for float16, naming the layer.
        LostDeltaError: if a quantized result keeps less than ``min_kept``; nothing is written.
        OutputError: if ``dst`` cannot be written, or holds what would be replaced.
        LockedError: if another process writes there.
        OutOfSpaceError: if there is not enough room.
    """
    codec.check_choice("dtype", dtype, DTYPES)
    fmt = None
    if quant_type is not None:
        fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
        codec.check_method(method, fmt, has_importance=False)
    source, lora = Source(base), AdapterSource(adapter)
    refuse_foreign(source)
    check_place(lora.path, Path(dst))
    weights, stacks = lora.weights_of(source), lora.stacks_of(source)
    found = lora.check_base(source, {**weights, **stacks}, force=force)
    lora.check_finite()
    outcomes = _Outcomes(source, lora, weights, stacks, fmt, method).all(dtype)
    settings = {
        "dtype": dtype,
        "format": None if fmt is None else dataclasses.asdict(fmt),
        "method": method,
        "adapter": settings_of(lora),
    }
    plan = OutputPlan(source, outcomes, settings, more=[lora.source])
    least = 0.0 if fmt is None or force else min_kept
    task = _Merging(plan, lora, fmt, method, dtype, found, lora.targets(weights), least)
    run = Run(task, Path(dst), threads=threads, mmap=mmap, force=force, progress=progress)
    return run.check_only() if dry_run else run.write()


@dataclasses.dataclass(frozen=True)
class _Merging:
    """What a run is to do, see ``running.Task``.

    Args:
        plan: what is written.
        adapter: that is merged.
        format: of a quantized result; None for a dense one.
        method: how its codes are chosen.
        dtype: of a dense result.
        base_check: what is known of the base.
        targets: what the adapter was trained to be merged into, by tensor.
        min_kept: least share of what is added; 0 to ask for none.
    """

    plan: OutputPlan
    adapter: AdapterSource
    format: QuantFormat | None
    method: str
    dtype: str
    base_check: str
    targets: Mapping[str, MergeTarget]
    min_kept: float

    def report(self, directory: Path, done: Mapping[str, Done], **run: Any) -> MergeReport:
        """The report; without ``run``, what happened, that of a dry run."""
        plan = self.plan
        return MergeReport(
            source=plan.source.path,
            path=directory,
            to=self.dtype if self.format is None else self.format.quant_type,
            tensors=tuple(converted(outcome) for outcome in plan.outcomes),
            tied=plan.source.tied,
            files=plan.names,
            left_out=plan.others.left_out,
            dry_run=not run,
            adapter=self.adapter.path,
            base_check=self.base_check,
            merged=tuple(
                _merged(outcome, done.get(outcome.name), aware=self._is_aware(outcome))
                for outcome in plan.outcomes
                if outcome.name in plan.factors
            ),
            missed=self._missed(),
            **run,
        )

    def _is_aware(self, outcome: Outcome) -> bool:
        """Whether the adapter was trained for this result."""
        target = self.targets.get(outcome.name)
        if target is None or outcome.format is None or target.method != self.method:
            return False
        same_scales = target.format.double_quant == outcome.format.double_quant
        return same_scales and _is_like(target.format, outcome.format.template)

    def _missed(self) -> str:
        outcomes = (o for o in self.plan.outcomes if o.name in self.targets)
        missed = {self.targets[o.name] for o in outcomes if not self._is_aware(o)}
        return ", ".join(sorted(f"{t.format.quant_type} by {t.method}" for t in missed))

    def check(self, report: MergeReport) -> None:
        """Refuse a result that keeps too little."""
        kept = report.kept_by_quantized
        if self.min_kept and kept is not None and kept < self.min_kept:
            msg = (
                f"{report.path}: {share_text(kept)} of what the adapter adds would be left in "
                f"{report.to}, at least {self.min_kept:.1%} are asked for: merge to bfloat16, keep "
                "the adapter beside the base, or force it (--force)\n"
                f"{report.kept_table()}"
            )
            raise LostDeltaError(msg)

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        if self.format is None:
            return dense_config(self.plan.source.config, self.dtype)
        return quantized_config(self.plan)

    def section(self, report: MergeReport) -> str:
        """Of the model card."""
        return merge_section(report)


class _Outcomes:
    """What becomes of each tensor of the base."""

    def __init__(
        self,
        source: Source,
        adapter: AdapterSource,
        weights: Mapping[str, StoredTensor],
        stacks: Mapping[str, ExpertStack],
        fmt: QuantFormat | None,
        method: str,
    ) -> None:
        self._source, self._fmt, self._method = source, fmt, method
        self._places = Places(source)
        self._adapter, self._of_adapter = adapter, Places(adapter.source, len(source.files))
        known, config = has_conv1d(source.config), source.config
        self._factors: dict[str, Factors] = {
            tensor.name: adapter.factors(
                name, tensor, conv1d=is_conv1d(tensor, config) if known else None
            )
            for name, tensor in weights.items()
        }
        for name, stack in stacks.items():
            self._factors |= adapter.expert_factors(name, stack)
        self._replaced = adapter.replacements_of(source)
        self._transposed = transposed_weights(source)

    def all(self, dtype: str) -> list[Outcome]:
        """In the order of the files."""
        tensors = in_file_order(self._source)
        if self._fmt is not None:
            targets = self._targets(self._fmt)
            return [self._quantized(tensor, targets[tensor.name]) for tensor in tensors]
        main = main_dtype(self._source)
        return [self._dense(tensor, dtype, main) for tensor in tensors]

    def _dense(self, tensor: StoredTensor, dtype: str, main: str) -> Outcome:
        factors, follows = self._factors.get(tensor.name), is_cast(tensor, main)
        follows = follows or tensor.format is not None or factors is not None
        if tensor.name in self._replaced:
            return self._taken(tensor, dtype if follows else tensor.dtype)
        if not follows:
            return copied(tensor, self._places, why_kept(tensor))
        turned = tensor.name in self._transposed
        return written_dense(tensor, dtype, self._places, factors=factors, transposed=turned)

    def _quantized(self, tensor: StoredTensor, target: Target) -> Outcome:
        fmt = target.format
        factors = self._factors.get(tensor.name)
        if tensor.name in self._replaced:
            return self._taken(tensor, tensor.dtype)
        if fmt is None:
            return written_dense(tensor, tensor.dtype, self._places, factors=factors)
        if holds_transposed(tensor, self._source.config.get("model_type")):
            msg = (
                f"{tensor.name}: stacked experts in mxfp4 are the transposes of what the model's "
                f"class holds in {fmt.quant_type}: merge to bfloat16, and quantize that"
            )
            raise FormatError(msg)
        if factors is None and tensor.format is not None and _is_like(tensor.format, fmt):
            return carried(tensor, self._places)
        how: dict[str, Any] = {"method": self._method, "transposed": target.transposed}
        fmt = fmt.for_shape(target.shape)
        return written_quantized(tensor, fmt, self._places, factors=factors, **how)

    def _targets(self, fmt: QuantFormat) -> dict[str, Target]:
        if not self._source.is_quantized:
            targets = choose_targets(self._source, fmt)
        else:
            tensors = self._source.tensors.values()
            targets = [Target(t, None if t.format is None else fmt) for t in tensors]
        return {target.tensor.name: target for target in targets}

    def _taken(self, tensor: StoredTensor, dtype: str) -> Outcome:
        """A tensor that the adapter holds whole."""
        places = self._of_adapter
        key = self._replaced[tensor.name]
        theirs = self._adapter.source.tensors[key]
        piece = dense_piece(tensor.name, dtype, tensor.shape)
        source = places.span(key) if theirs.dtype == dtype else places.dense(key)
        return Outcome(
            tensor,
            tensor.name,
            tensor.file,
            tensor.shape,
            dtype,
            None,
            REPLACED,
            (Step(piece, source),),
        )


def _is_like(stored: QuantFormat, fmt: QuantFormat) -> bool:
    """Whether codes of a format can stay; scales that 8 bits could not hold stay too."""
    return (stored.quant_type, stored.template.blocksize) == (fmt.quant_type, fmt.blocksize)


def _merged(outcome: Outcome, done: Done | None, *, aware: bool) -> MergedTensor:
    factors = outcome.steps[0].factors
    assert isinstance(factors, LoraFactors | ExpertFactors)
    errors = None if done is None else done.errors
    return MergedTensor(
        outcome.name, factors.rank, factors.scaling, outcome.format is not None, errors, aware
    )
