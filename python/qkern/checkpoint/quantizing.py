"""``quantize_checkpoint``: a dense checkpoint quantized from file to file. No torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from qkern import codec
from qkern.checkpoint import stream
from qkern.checkpoint.destination import check_existing, check_place, check_space, stale_files
from qkern.checkpoint.journal import Journal, differences, done_as_json, done_from_json
from qkern.checkpoint.output_files import write_other_files
from qkern.checkpoint.output_plan import OutputPlan, Settings
from qkern.checkpoint.quantization_report import QuantizationReport, TensorResult
from qkern.checkpoint.source import Source
from qkern.checkpoint.staging import FOLDER, Staging, streaming, writing
from qkern.checkpoint.stream import Done
from qkern.checkpoint.targets import EMBEDDINGS, RULE, Target, choose_targets
from qkern.errors import (
    CorruptFileError,
    CoverageError,
    FormatError,
    NonFiniteError,
    OutOfSpaceError,
    OutputError,
)
from qkern.formats import QuantFormat, resolve_format

# Told now and then: the bytes read since, and the bytes of all that is read.
Progress = Callable[[int, int], Any]

# What the next call cannot do better: nothing is kept for it.
_HOPELESS = (CorruptFileError, CoverageError, FormatError, NonFiniteError, OutOfSpaceError)


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
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize a checkpoint's weights from file to file, in a few MiB of memory, without torch.

    Quantized are the weights that ``quantize_model`` would quantize, by names and shapes, and the
    experts that a layer holds as one 3-D tensor, each by itself. ``DST`` gets files of the same
    names, under bitsandbytes' keys, with ``quantization_config`` in config.json and a section on
    the measured errors in README.md; tokenizer and other small files are copied.

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
    source, directory = Source(src), Path(dst)
    targets = choose_targets(
        source,
        settings.format,
        include=settings.include,
        exclude=settings.exclude,
        embeddings=embeddings,
    )
    plan = OutputPlan(source, targets, settings)
    run = _Run(plan, directory, threads=threads, strict=strict, force=force, progress=progress)
    report = run.report({})
    if min_coverage is not None:
        report.coverage.check(min_coverage)
    run.check_surprises(report)
    check_place(source.path, directory)
    if dry_run:
        check_existing(directory, plan.names, force=force)
        check_space(directory, plan.nbytes)
        return report
    return run.write()


@dataclasses.dataclass
class _Run:
    """One call.

    Args:
        plan: what is written.
        directory: where.
        threads: see ``quantize_checkpoint``, as all the rest.
    """

    plan: OutputPlan
    directory: Path
    threads: int
    strict: bool
    force: bool
    progress: Progress | None

    def write(self) -> QuantizationReport:
        """Go on with what is there, or begin."""
        with Staging(self.directory) as staging:
            found = self._finish_commit(staging)
            if found is not None:
                return self.report(found, resumed=len(found))
            check_existing(self.directory, self.plan.names, force=self.force)
            self._check_journal(staging)
            try:
                return self._stream(staging)
            except _HOPELESS:
                if staging.pending_commit() is None:
                    staging.clear()
                raise

    def report(self, done: Mapping[str, Done], **run: Any) -> QuantizationReport:
        """The report; without ``run``, what happened, that of a dry run."""
        plan = self.plan
        return QuantizationReport(
            source=plan.source.path,
            path=self.directory,
            format=plan.settings.format,
            method=plan.settings.method,
            rule=RULE,
            tensors=tuple(_result(target, done.get(target.tensor.name)) for target in plan.targets),
            tied=plan.source.tied,
            files=plan.names,
            left_out=plan.others.left_out,
            dry_run=not run,
            **run,
        )

    def check_surprises(self, report: QuantizationReport) -> None:
        """Refuse what ``strict`` does."""
        rows = report.surprises
        if self.strict and rows:
            msg = (
                f"{len(rows)} tensors are not quantized as asked, the first is {rows[0].name}: "
                f"{rows[0].reason}; exclude what may stay dense, or do without strict\n"
                f"{report.coverage}"
            )
            raise CoverageError(msg)

    def _finish_commit(self, staging: Staging) -> dict[str, Done] | None:
        """Finish what a run that was killed while renaming has left; its results if ours."""
        pending = staging.pending_commit()
        if pending is None:
            return None
        staging.roll_forward(pending)
        if pending.get("head") != self.plan.head:
            # Another checkpoint, whole now: what follows is as if it had been there.
            staging.restart()
            return None
        staging.clear()
        return {name: done_from_json(content) for name, content in pending["done"].items()}

    def _check_journal(self, staging: Staging) -> None:
        head = staging.journal.head
        if head is None or head == self.plan.head:
            return
        if not self.force:
            changes = "\n".join(f"  {line}" for line in differences(head, self.plan.head))
            msg = (
                f"{self.directory / FOLDER} holds an unfinished run that differs from this one:\n"
                f"{changes}\ncall it as it was to go on, or start again with force (--force)"
            )
            raise OutputError(msg)
        staging.restart()

    def _stream(self, staging: Staging) -> QuantizationReport:
        check_space(self.directory, self.plan.nbytes)
        journal, started = staging.journal, time.perf_counter()
        with writing(staging.path):
            if journal.head is None:
                journal.begin(self.plan.head)
            for layout in self.plan.layouts:
                _make(staging.files / layout.name, layout.body_end)
                _make(staging.spill(layout.name), layout.spill_size)
        resumed = self._verify(staging, journal)
        jobs = [job for job in self.plan.jobs if job.name not in resumed]
        with streaming(staging.path):
            stream.run(
                jobs,
                list(self.plan.source.files),
                self.plan.outputs(staging),
                threads=self.threads,
                done=lambda done: journal.add(jobs[done.job].name, done),
                progress=self._tell,
            )
        sizes: dict[str, dict[str, int]] = {}
        with writing(staging.path):
            for layout in self.plan.layouts:
                place = staging.files / layout.name
                sizes[layout.name] = layout.finish(place, staging.spill(layout.name), journal.done)
        self.plan.check_inputs()
        nbytes = sum(self.plan.nbytes_of(job) for job in jobs)
        report = self.report(journal.done, resumed=len(resumed), nbytes_read=nbytes)
        self.check_surprises(report)
        with writing(staging.path):
            write_other_files(self.plan, staging.files, report, sizes)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        done = {name: done_as_json(result) for name, result in journal.done.items()}
        record = {"head": self.plan.head, "done": done}
        stale = stale_files(self.directory, self.plan.names)
        staging.commit(self.plan.names, stale, record)
        return dataclasses.replace(
            report, seconds=seconds, seconds_commit=time.perf_counter() - started
        )

    def _verify(self, staging: Staging, journal: Journal) -> set[str]:
        """Names of tensors that an earlier run has finished, and whose bytes are there."""
        found = set()
        for job in self.plan.jobs:
            done = journal.done.get(job.name)
            if done is not None and self.plan.is_written(job.name, done, staging):
                found.add(job.name)
                self._tell(self.plan.nbytes_of(job))
        return found

    def _tell(self, count: int) -> None:
        if self.progress is not None:
            self.progress(count, self.plan.nbytes_read)


def _result(target: Target, done: Done | None) -> TensorResult:
    tensor, fmt, reason = target.tensor, target.format, target.reason
    if fmt is not None and done is not None and fmt.double_quant and not done.double_quant:
        fmt, reason = fmt.replace(double_quant=False), "fp32 scales: 8 bits cannot hold them"
    return TensorResult(
        name=tensor.name,
        file=tensor.file.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        format=fmt,
        reason=reason,
        expected=target.expected,
        nbytes_before=tensor.nbytes,
        nbytes=tensor.nbytes if fmt is None else fmt.nbytes(tensor.numel),
        errors=None if done is None or fmt is None else done.errors,
    )


def _make(path: Path, nbytes: int) -> None:
    """A file of at least so many bytes; what is in it stays."""
    with path.open("ab") as file:
        if file.tell() < nbytes:
            file.truncate(nbytes)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
