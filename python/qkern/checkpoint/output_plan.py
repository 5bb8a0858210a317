"""What a quantized checkpoint will hold, known before any weight is read. No torch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qkern import entry_keys
from qkern.checkpoint.carried import OtherFiles, other_files
from qkern.checkpoint.entries import Piece
from qkern.checkpoint.layout import Place, ShardLayout, Weight
from qkern.checkpoint.source import INDEX_NAME, TIED_KEY, Source
from qkern.checkpoint.staging import Staging
from qkern.checkpoint.stream import CopyJob, Dense, Done, Quantized, Span, WeightJob
from qkern.checkpoint.targets import Target
from qkern.errors import CorruptFileError
from qkern.formats import QuantFormat

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
_HASHED = 1 << 22  # bytes at a time
_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

Job = CopyJob | WeightJob


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


class OutputPlan:
    """All files of a quantized checkpoint, and the jobs that fill its shards.

    Args:
        source: the dense checkpoint.
        targets: what becomes of each of its tensors.
        settings: that chose them.

    Attributes:
        source: as given.
        targets: as given.
        settings: as given.
        directory: of the source.
        layouts: of the shards, in the order of ``source.files``.
        jobs: in the order of files and places of the input; every tensor with bytes has one.
        others: files that are copied, or not.
    """

    def __init__(self, source: Source, targets: Sequence[Target], settings: Settings) -> None:
        self.source = source
        self.settings = settings
        self.targets = tuple(targets)
        by_name = {target.tensor.name: target for target in targets}
        items: dict[Path, list[Piece | Weight]] = {file: [] for file in source.files}
        for name, entry in source.entries.items():
            items[entry.file].append(self._item(by_name[name]))
        metadata = {"format": "pt"}
        if source.tied:
            metadata[TIED_KEY] = json.dumps(source.tied)
        self.layouts = tuple(ShardLayout(f.name, items[f], metadata) for f in source.files)
        self.jobs = self._make_jobs(by_name)
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
            "settings": self.settings.as_dict(),
            "inputs": {file.name: stamp(file) for file in self._inputs},
        }

    @property
    def _inputs(self) -> list[Path]:
        config = self.directory / CONFIG_NAME
        return [*self.source.files, *([config] if self.source.config else [])]

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

    def is_written(self, name: str, done: Done, staging: Staging) -> bool:
        """Whether the bytes that an earlier run has written for a tensor are those it noted."""
        index, target = self._where[name]
        layout, tensor = self.layouts[index], target.tensor
        sizes = {name: tensor.nbytes}
        fmt = target.format
        if fmt is not None:
            fmt = fmt.replace(double_quant=fmt.double_quant and done.double_quant)
            blocks = fmt.num_blocks(tensor.numel)
            scales = blocks + 4 * fmt.num_nested(tensor.numel) if fmt.double_quant else 4 * blocks
            sizes = {name: fmt.packed_size(tensor.numel), entry_keys.scales_key(name, fmt): scales}
        noted = (done.crc, done.crc_scales)
        for (key, nbytes), crc in zip(sizes.items(), noted, strict=False):
            place = layout.places[key]
            path = staging.spill(layout.name) if place.in_spill else staging.files / layout.name
            if _crc(path, place.offset, nbytes) != crc:
                return False
        return True

    @staticmethod
    def nbytes_of(job: Job) -> int:
        """Bytes that a job reads."""
        if isinstance(job, CopyJob):
            return job.nbytes
        assert isinstance(job.source, Dense)
        return math.prod(job.shape) * _ITEM_SIZES[job.source.dtype]

    def _item(self, target: Target) -> Piece | Weight:
        tensor = target.tensor
        if target.format is not None:
            return Weight(tensor.name, tensor.shape, tensor.dtype, target.format)
        entry = self.source.entries[tensor.name]
        return Piece(entry.key, entry.dtype, entry.shape, entry.nbytes)

    def _make_jobs(self, by_name: Mapping[str, Target]) -> tuple[Job, ...]:
        files = {file: i for i, file in enumerate(self.source.files)}
        self._where = {name: (files[t.tensor.file], t) for name, t in by_name.items()}
        jobs: list[Job] = []
        for name, entry in self.source.entries.items():
            index, target = self._where[name]
            places, source = self.layouts[index].places, Span(index, entry.begin)

            def span(place: Place, index: int = index) -> Span:
                return Span(index + len(files) * place.in_spill, place.offset)

            fmt = target.format
            if fmt is None:
                if entry.nbytes:
                    jobs.append(CopyJob(name, entry.nbytes, source, span(places[name])))
                continue
            scales = places[entry_keys.scales_key(name, fmt)]
            jobs.append(
                WeightJob(
                    name=name,
                    shape=entry.shape,
                    source=Dense(target.tensor.dtype, source),
                    target=Quantized(fmt, span(places[name]), span(scales)),
                    method=self.settings.method if fmt.code is not None else "absmax",
                    measure=True,
                )
            )
        return tuple(jobs)


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
