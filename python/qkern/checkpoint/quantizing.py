"""``quantize_checkpoint``: a dense checkpoint quantized from file to file. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from qkern import codec
from qkern.checkpoint.model_card import section_of
from qkern.checkpoint.outcomes import Outcome, Places, copied, in_file_order, written_quantized
from qkern.checkpoint.output_files import quantization_entries
from qkern.checkpoint.output_plan import OutputPlan
from qkern.checkpoint.quantization_report import QuantizationReport, TensorResult
from qkern.checkpoint.running import Progress, Run
from qkern.checkpoint.source import Source
from qkern.checkpoint.stream import Done
from qkern.checkpoint.targets import EMBEDDINGS, RULE, Target, choose_targets
from qkern.errors import CoverageError
from qkern.formats import QuantFormat, resolve_format


class Settings(NamedTuple):
    """What changes the bytes of the result.

    Args:
        format: before ``for_shape``.
        method: how codes are chosen.
        include: see ``choose_targets``, as the rest.
        exclude: patterns.
        embeddings: format of embeddings and output heads, or None.
    """

    format: QuantFormat
    method: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    embeddings: str | None

    def as_dict(self) -> dict[str, Any]:
        """All of them as JSON values, each by itself."""
        content: dict[str, Any] = dataclasses.asdict(self.format) | self._asdict()
        del content["format"]
        return content | {"include": list(self.include), "exclude": list(self.exclude)}


def quantize_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    quant_type: str | QuantFormat = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    embeddings: str | None = None,
    threads: int = 0,
    mmap: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a checkpoint's weights from file to file, without torch.

    Memory does not grow with the model, but with its largest weight: 4 bytes for each scale.

    Quantized are the weights that ``quantize_model`` would quantize, by names and shapes, but for
    those of ``Conv1D``, and the experts that a layer holds as one 3-D tensor. ``DST`` gets files of
    the same names, under bitsandbytes' keys, with ``quantization_config`` in config.json and a
    section on the measured errors in README.md; tokenizer and other small files are copied.

    All files are written to ``DST/.qkern-partial`` and renamed at the end, each whole. A call
    after one that was killed or interrupted, or that met an error in reading, goes on where that
    one ended; it is refused if settings or inputs have changed. Any other error, a full disk too,
    leaves nothing behind. The same input and settings give the same bytes, with any number of
    threads and interruptions.

    Args:
        src: a directory with safetensors files (one, or shards with an index), or one such file.
        dst: a directory that is made, or that holds no checkpoint; on any file system.
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: store the scales in 8 bits; unused by int8_row.
        method: "absmax" or "search" (4-bit formats only), see ``qkern.quantize``.
        include: names, ends of names or globs of tensors to quantize whatever their shape.
        exclude: the same of tensors to leave dense; goes before ``include``.
        min_coverage: least share of the values that must be quantized, 0 to 1.
        strict: refuse weights of 2 or more dimensions that stay dense without being an embedding,
            an output head, a router or excluded, and scales that 8 bits cannot hold.
        embeddings: "int8_row" quantizes embeddings and output heads so. Such files, and stacked
            experts, cannot be opened by transformers with bitsandbytes.
        threads: how many, 0 for one per core.
        mmap: map dense weights in place of copying them, which is faster. A file that is cut, or
            cannot be read, while it is mapped ends the process, and the next call goes on; with
            False it is an error.
        dry_run: only check and report what would be done; nothing is written.
        force: replace a checkpoint that is in ``dst``, and an unfinished one of other settings.
        progress: called with (bytes read since the last call, bytes of all).

    Raises:
        FileNotFoundError: if there are no safetensors weights.
        CorruptFileError: if a file is not readable, contradicts itself, or changes meanwhile.
        FormatError: for an unknown setting, a pattern that matches nothing, or a source that is
            quantized already.
        CoverageError: for what ``min_coverage`` or ``strict`` refuse.
        NonFiniteError: for NaN or infinity in a weight to be quantized, naming it.
        OutputError: if ``dst`` cannot be written, or holds what would be replaced.
        LockedError: if another process writes there.
        OutOfSpaceError: if there is not enough room.
    """
    settings = Settings(
        format=resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant),
        method=method,
        include=_patterns(include),
        exclude=_patterns(exclude),
        embeddings=embeddings,
    )
    codec.check_method(method, settings.format, has_importance=False)
    if embeddings is not None:
        codec.check_choice("embeddings", embeddings, EMBEDDINGS)
    source = Source(src)
    targets = choose_targets(
        source,
        settings.format,
        include=settings.include,
        exclude=settings.exclude,
        embeddings=embeddings,
    )
    plan = OutputPlan(source, _outcomes(source, targets, method), settings.as_dict())
    task = _Quantizing(plan, targets, settings, min_coverage, strict)
    run = Run(task, Path(dst), threads=threads, mmap=mmap, force=force, progress=progress)
    return run.check_only() if dry_run else run.write()


@dataclasses.dataclass(frozen=True)
class _Quantizing:
    """What a run is to do, see ``running.Task``.

    Args:
        plan: what is written.
        targets: in the order of the report.
        settings: as given.
        min_coverage: see ``quantize_checkpoint``, as the next.
        strict: whether surprises are refused.
    """

    plan: OutputPlan
    targets: Sequence[Target]
    settings: Settings
    min_coverage: float | None
    strict: bool

    def report(self, directory: Path, done: Mapping[str, Done], **run: Any) -> QuantizationReport:
        """The report; without ``run``, what happened, that of a dry run."""
        plan = self.plan
        return QuantizationReport(
            source=plan.source.path,
            path=directory,
            format=self.settings.format,
            method=self.settings.method,
            rule=RULE,
            tensors=tuple(_result(target, done.get(target.tensor.name)) for target in self.targets),
            tied=plan.source.tied,
            files=plan.names,
            left_out=plan.others.left_out,
            dry_run=not run,
            **run,
        )

    def check(self, report: QuantizationReport) -> None:
        """Refuse what ``min_coverage`` and ``strict`` do."""
        if self.min_coverage is not None:
            report.coverage.check(self.min_coverage)
        rows = report.surprises
        if self.strict and rows:
            msg = (
                f"{len(rows)} tensors are not quantized as asked, the first is {rows[0].name}: "
                f"{rows[0].reason}; exclude what may stay dense, or do without strict\n"
                f"{report.coverage}"
            )
            raise CoverageError(msg)

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return self.plan.source.config | quantization_entries(self.plan, self.settings.format)

    def section(self, report: QuantizationReport) -> str:
        """Of the model card."""
        return section_of(report)


def _outcomes(source: Source, targets: Sequence[Target], method: str) -> list[Outcome]:
    by_name, places = {target.tensor.name: target for target in targets}, Places(source)
    outcomes = []
    for tensor in in_file_order(source):
        target = by_name[tensor.name]
        if target.format is None:
            outcomes.append(copied(tensor, places))
        else:
            how: dict[str, Any] = {"method": method, "transposed": target.transposed}
            outcomes.append(written_quantized(tensor, target.format, places, **how))
    return outcomes


def _result(target: Target, done: Done | None) -> TensorResult:
    tensor, fmt, reason = target.tensor, target.format, target.reason
    if fmt is not None and done is not None and fmt.double_quant and not done.double_quant:
        fmt, reason = fmt.replace(double_quant=False), "fp32 scales: 8 bits cannot hold them"
    return TensorResult(
        name=tensor.name,
        file=tensor.file.name,
        shape=target.shape,
        dtype=tensor.dtype,
        format=fmt,
        reason=reason,
        expected=target.expected,
        nbytes_before=tensor.nbytes,
        nbytes=tensor.nbytes if fmt is None else fmt.nbytes(tensor.numel),
        errors=None if done is None or fmt is None else done.errors,
    )


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
