"""Runs what a plan says: staged, resumable, committed as a whole. No torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from qkern.checkpoint import stream
from qkern.checkpoint.destination import (
    check_existing,
    check_place,
    check_space,
    check_strangers,
    stale_files,
)
from qkern.checkpoint.journal import Journal, differences, done_as_json, done_from_json
from qkern.checkpoint.output_files import write_other_files
from qkern.checkpoint.output_plan import Job, OutputPlan
from qkern.checkpoint.staging import FOLDER, Staging, streaming, writing
from qkern.checkpoint.stream import Done, WeightJob
from qkern.errors import (
    AdapterMismatchError,
    CorruptFileError,
    CoverageError,
    FormatError,
    LostDeltaError,
    NonFiniteError,
    OutOfSpaceError,
    OutputError,
)

# Told now and then: the bytes read since, and the bytes of all that is read.
Progress = Callable[[int, int], Any]

# What the next call cannot do better: nothing is kept for it.
_HOPELESS: Final = (
    AdapterMismatchError,
    CorruptFileError,
    CoverageError,
    FormatError,
    LostDeltaError,
    NonFiniteError,
    OutOfSpaceError,
)
# Bytes of an adapter's factors that are held at a time, but for those of a single weight.
_FACTORS: Final = 1 << 26

R = TypeVar("R")


class Task(Protocol[R]):
    """What a run is for."""

    @property
    def plan(self) -> OutputPlan:
        """What is written."""

    def report(self, directory: Path, done: Mapping[str, Done], **run: Any) -> R:
        """What happened, or without ``run`` what would: see ``Run`` for its names."""

    def check(self, report: R) -> None:
        """Refuse a report: before anything is written, and again when all is known."""

    def config(self) -> Mapping[str, Any]:
        """Content of config.json."""

    def section(self, report: R) -> str:
        """Of the model card."""


@dataclasses.dataclass
class Run(Generic[R]):
    """One call.

    The task's report gets ``resumed``, the number of entries that a run before had finished,
    ``nbytes_read``, ``seconds`` until the last byte was written, and ``seconds_commit`` for making
    the files durable and renaming them.

    Args:
        task: what to do.
        directory: where to write.
        threads: how many, 0 for one per core.
        mmap: see ``stream.run``.
        force: replace a checkpoint that is there, and an unfinished one of other settings.
        progress: called with (bytes read since the last call, bytes of all).
    """

    task: Task[R]
    directory: Path
    threads: int
    mmap: bool
    force: bool
    progress: Progress | None

    def __post_init__(self) -> None:
        self.plan = self.task.plan

    def check_only(self) -> R:
        """The report of a run that writes nothing."""
        report = self._check()
        self._check_destination()
        check_space(self.directory, self.plan.nbytes)
        return report

    def write(self) -> R:
        """Go on with what is there, or begin."""
        self._check()
        with Staging(self.directory) as staging:
            found = self._finish_commit(staging)
            if found is not None:
                return self.task.report(self.directory, found, resumed=len(found))
            self._check_destination()
            self._check_journal(staging)
            try:
                return self._stream(staging)
            except _HOPELESS:
                if staging.pending_commit() is None:
                    staging.clear()
                raise

    def _check(self) -> R:
        report = self.task.report(self.directory, {})
        self.task.check(report)
        check_place(self.plan.source.path, self.directory)
        return report

    def _check_destination(self) -> None:
        check_existing(self.directory, self.plan.names, force=self.force)
        # A single file, which was named, is opened by its name, whatever lies beside it.
        if self.plan.is_directory and not self.force:
            check_strangers(self.directory, self.plan.names)

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

    def _stream(self, staging: Staging) -> R:
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
        for batch in self._batches(jobs):
            self._run_batch(batch, staging)
        sizes: dict[str, dict[str, int]] = {}
        with writing(staging.path):
            for layout in self.plan.layouts:
                place = staging.files / layout.name
                sizes[layout.name] = layout.finish(place, staging.spill(layout.name), journal.done)
        self.plan.check_inputs()
        nbytes = sum(self.plan.nbytes_of(job) for job in jobs)
        ran: dict[str, Any] = {"resumed": len(resumed), "nbytes_read": nbytes}
        report = self.task.report(self.directory, journal.done, **ran)
        self.task.check(report)
        with writing(staging.path):
            config, section = self.task.config(), self.task.section(report)
            write_other_files(self.plan, staging.files, sizes, config=config, section=section)
        ran["seconds"], started = time.perf_counter() - started, time.perf_counter()
        done = dict(journal.done)
        as_json = {name: done_as_json(result) for name, result in done.items()}
        record = {"head": self.plan.head, "done": as_json}
        stale = stale_files(self.directory, self.plan.names)
        staging.commit(self.plan.names, stale, record)
        ran["seconds_commit"] = time.perf_counter() - started
        return self.task.report(self.directory, done, **ran)

    def _batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs whose adapter's factors are held at the same time."""
        batch: list[Job] = []
        nbytes = 0
        for job in jobs:
            factors = self.plan.factors.get(job.name)
            size = 0 if factors is None else factors.nbytes
            if nbytes and nbytes + size > _FACTORS:
                yield batch
                batch, nbytes = [], 0
            batch.append(job)
            nbytes += size
        yield batch

    def _run_batch(self, batch: Sequence[Job], staging: Staging) -> None:
        journal = staging.journal
        with streaming(staging.path):
            stream.run(
                [self._with_factors(job) for job in batch],
                list(self.plan.inputs),
                self.plan.outputs(staging),
                threads=self.threads,
                mmap=self.mmap,
                done=lambda done: journal.add(batch[done.job].name, done),
                progress=self._tell,
            )

    def _with_factors(self, job: Job) -> Job:
        factors = self.plan.factors.get(job.name)
        if factors is None or not isinstance(job, WeightJob):
            return job
        return dataclasses.replace(job, delta=factors.read())

    def _verify(self, staging: Staging, journal: Journal) -> set[str]:
        """Names of jobs that an earlier run has finished, and whose bytes are there."""
        found = set()
        for job in self.plan.jobs:
            done = journal.done.get(job.name)
            if done is not None and self.plan.is_written(job, done, staging):
                found.add(job.name)
                self._tell(self.plan.nbytes_of(job))
        return found

    def _tell(self, count: int) -> None:
        if self.progress is not None:
            self.progress(count, self.plan.nbytes_read)


def _make(path: Path, nbytes: int) -> None:
    """A file of at least so many bytes; what is in it stays."""
    with path.open("ab") as file:
        if file.tell() < nbytes:
            file.truncate(nbytes)
