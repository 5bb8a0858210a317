"""What a checkpoint that is written will hold, known before any weight is read. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkern import entry_keys
from qkern.checkpoint.carried import OtherFiles, other_files
from qkern.checkpoint.entries import Piece
from qkern.checkpoint.file_metadata import NEEDS_KEY, TIED_KEY
from qkern.checkpoint.layout import ShardLayout
from qkern.checkpoint.outcomes import DTYPE_NAMES, ITEM_SIZES, Factors, Outcome, Step
from qkern.checkpoint.source import INDEX_NAME, Source
from qkern.checkpoint.staging import Staging
from qkern.checkpoint.stream import (
    CHANGES,
    Blocks,
    CopyJob,
    Dense,
    Done,
    Quantized,
    Span,
    WeightJob,
)
from qkern.errors import CorruptFileError

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
_HASHED = 1 << 22  # bytes at a time
_NAMED = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Job = CopyJob | WeightJob


class OutputPlan:
    """All files of a checkpoint that is written anew, and the jobs that fill its shards.

    Args:
        source: the checkpoint that is read; its shards have outputs of the same names.
        outcomes: what becomes of each of its tensors, in the order of the files.
        settings: that chose them, as JSON values.
        more: sources of which parts are taken too; the files of all are the inputs of a run, in
            this order.

    Attributes:
        source: as given.
        outcomes: as given.
        settings: as given.
        directory: of the source.
        inputs: the files that jobs number.
        layouts: of the shards, in the order of ``source.files``.
        jobs: in the order of outcomes; every entry that has bytes to be written has one.
        factors: of jobs that add something, by their names.
        others: files that are copied, or not.
    """

    def __init__(
        self,
        source: Source,
        outcomes: Sequence[Outcome],
        settings: Mapping[str, Any],
        *,
        more: Sequence[Source] = (),
    ) -> None:
        self.source = source
        self.settings = dict(settings)
        self.outcomes = tuple(outcomes)
        self._more = tuple(more)
        self.inputs = tuple(file for each in (source, *more) for file in each.files)
        steps = {
            file: [step for outcome in outcomes if outcome.file == file for step in outcome.steps]
            for file in source.files
        }
        metadata = {"format": "pt"} | _needed_version(outcomes)
        written = {step.name for outcome in outcomes for step in outcome.steps}
        tied = {key: owner for key, owner in source.tied_entries.items() if owner in written}
        if tied:
            metadata[TIED_KEY] = json.dumps(tied)
        self.layouts = tuple(
            ShardLayout(file.name, [step.item for step in steps[file]], metadata)
            for file in source.files
        )
        self.factors: dict[str, Factors] = {}
        self.jobs = tuple(
            job
            for index, file in enumerate(source.files)
            for step in steps[file]
            if (job := self._job(step, index)) is not None
        )
        self.directory = source.path if source.path.is_dir() else source.path.parent
        made = {*(f.name for f in source.files), INDEX_NAME, CONFIG_NAME, CARD_NAME}
        self.others = OtherFiles((), {})
        if self.is_directory:
            self.others = other_files(self.directory, made)

    @property
    def is_directory(self) -> bool:
        """Whether the source is a directory; of a single file nothing but that is written."""
        return self.source.path.is_dir()

    @property
    def is_sharded(self) -> bool:
        """Whether there is an index."""
        return self.is_directory and (self.directory / INDEX_NAME).exists()

    @property
    def names(self) -> tuple[str, ...]:
        """Files that are written, in the order in which they get their names."""
        names = [layout.name for layout in self.layouts]
        names += [INDEX_NAME] if self.is_sharded else []
        if self.is_directory:
            names += [*self.others.carried, CARD_NAME]
            names += [CONFIG_NAME] if self.source.config else []
        return tuple(names)

    @property
    def nbytes(self) -> int:
        """That all files have at most while they are written."""
        shards = sum(layout.most + layout.spill_size for layout in self.layouts)
        others = sum((self.directory / name).stat().st_size for name in self.others.carried)
        return shards + others + (1 << 20)  # index, config, card and journal

    @functools.cached_property
    def nbytes_read(self) -> int:
        """That all jobs read."""
        return sum(self.nbytes_of(job) for job in self.jobs)

    @functools.cached_property
    def head(self) -> dict[str, Any]:
        """What must not change between a run and the one that resumes it, as JSON values."""
        from qkern import __version__

        return {
            "qkern": __version__,
            "settings": self.settings,
            "inputs": {file.name: stamp(file) for file in self._inputs},
        }

    @property
    def _inputs(self) -> list[Path]:
        config = self.directory / CONFIG_NAME
        return [*self.inputs, *([config] if self.source.config else [])]

    def check_inputs(self) -> None:
        """Refuse inputs that have changed since ``head`` was made.

        Raises:
            CorruptFileError: naming the file.
        """
        for file in self._inputs:
            found = file.stat()
            then = self.head["inputs"][file.name]
            if (found.st_size, found.st_mtime_ns) != (then["size"], then["mtime_ns"]):
                msg = f"{file} was written to while it was read: call again when it is whole"
                raise CorruptFileError(msg)

    def outputs(self, staging: Staging) -> list[Path]:
        """The files that jobs number: shards, then their spills."""
        shards = [staging.files / layout.name for layout in self.layouts]
        return [*shards, *(staging.spill(layout.name) for layout in self.layouts)]

    def is_written(self, job: Job, done: Done, staging: Staging) -> bool:
        """Whether the bytes that an earlier run has written are those that it noted."""
        outputs = self.outputs(staging)
        noted = (done.crc, done.crc_scales)
        return all(
            _crc(outputs[at.file], at.offset, nbytes) == crc
            for (at, nbytes), crc in zip(_written(job, done), noted, strict=False)
        )

    @staticmethod
    def nbytes_of(job: Job) -> int:
        """Bytes that a job reads, as the engine tells them."""
        if isinstance(job, CopyJob):
            return job.nbytes
        numel = math.prod(job.shape)
        if isinstance(job.source, Quantized):
            return job.source.format.packed_size(numel)
        if isinstance(job.source, Blocks):
            return numel // 2
        return numel * ITEM_SIZES[job.source.dtype]

    def _job(self, step: Step, index: int) -> Job | None:
        """The job of a step of the file number ``index``; None if there is nothing to write."""
        item, source, layout = step.item, step.source, self.layouts[index]
        if source is None:
            return None

        def span(key: str) -> Span:
            place = layout.places[key]
            return Span(index + len(self.layouts) * place.in_spill, place.offset)

        if isinstance(source, Span):
            assert isinstance(item, Piece)
            nbytes, target = item.nbytes // CHANGES[step.change], span(item.key)
            return CopyJob(item.key, nbytes, source, target, step.change) if nbytes else None
        if step.factors is not None:
            self.factors[step.name] = step.factors
        if isinstance(item, Piece):
            if not item.nbytes:
                return None
            dense = Dense(_NAMED[item.dtype], span(item.key))
            shape = step.shape or item.shape
            return WeightJob(item.key, shape, source, dense, transposed=step.transposed)
        scales = span(entry_keys.scales_key(item.name, item.format))
        coded = Quantized(item.format, span(item.name), scales)
        shape, turned = step.shape or item.shape, step.transposed
        return WeightJob(item.name, shape, source, coded, step.method, True, transposed=turned)


def _needed_version(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Metadata of files that older versions of qkern cannot read."""
    kinds = (outcome.format.kind.since for outcome in outcomes if outcome.format is not None)
    needed = max(filter(None, kinds), default="")
    return {NEEDS_KEY: needed} if needed else {}


def _written(job: Job, done: Done) -> list[tuple[Span, int]]:
    """Where a job writes, and how many bytes, in the order of its checksums."""
    if isinstance(job, CopyJob):
        return [(job.target, job.nbytes * CHANGES[job.change])]
    target, numel = job.target, math.prod(job.shape)
    if isinstance(target, Dense):
        return [(target.at, numel * ITEM_SIZES[target.dtype])]
    fmt = target.format.replace(double_quant=target.format.double_quant and done.double_quant)
    blocks = fmt.num_blocks(numel)
    scales = blocks + 4 * fmt.num_nested(numel) if fmt.double_quant else 4 * blocks
    return [(target.codes, fmt.packed_size(numel)), (target.scales, scales)]


def stamp(file: Path) -> dict[str, Any]:
    """What tells a file from another one of its name, without reading its weights.

    Of a safetensors file the SHA-256 is that of its header; of any other that of the whole file.
    """
    found = file.stat()
    size = found.st_size
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            size = 8 + int.from_bytes(opened.read(8), "little")
            opened.seek(0)
        digest = hashlib.sha256()
        while size > 0:
            chunk = opened.read(min(size, _HASHED))
            if not chunk:
                break
            digest.update(chunk)
            size -= len(chunk)
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest.hexdigest()}


def _crc(path: Path, offset: int, nbytes: int) -> int:
    """CRC-32 of bytes of a file; -1 if it ends before."""
    crc = 0
    with path.open("rb") as file:
        file.seek(offset)
        while nbytes:
            chunk = file.read(min(nbytes, _HASHED))
            if not chunk:
                return -1
            crc = zlib.crc32(chunk, crc)
            nbytes -= len(chunk)
    return crc
