"""Files that are cut, lie, or lead elsewhere: refused, by a typed error, before any is believed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write, write_shards
from safetensors.torch import load_file

import qkern
from qkern import flat_keys
from qkern.checkpoint.reader import CheckpointReader
from qkern.checkpoint.source import Source

INDEX = "model.safetensors.index.json"
UNREADABLE = "not a readable safetensors file"


def raw(path: Path, header: str | bytes | dict[str, Any], data: bytes | int = b"") -> Path:
    """A file of any header, and any data or so many bytes of it."""
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    content = b"\1" * data if isinstance(data, int) else data
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)
    return path


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path: Path, text: str) -> None:
    with pytest.raises(qkern.CorruptFileError, match=text) as error:
        Source(path)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A file of some 9 KiB with dense and quantized tensors."""
    tensors = {"norm.weight": torch.randn(2000)}
    for quant_type in ("nf4", "int8", "int8_row"):
        q = qkern.quantize(torch.randn(9, 13), quant_type)
        tensors |= flat_keys.flatten(q, f"{quant_type}.weight")
    return write(tmp_path / "x.safetensors", tensors)


@pytest.mark.case("C1")
def test_every_cut_is_told(quantized: Path) -> None:
    whole = quantized.read_bytes()
    assert len(Source(quantized).tensors) == 4
    rng = random.Random(0)
    lengths = {*range(4097), *(rng.randrange(len(whole)) for _ in range(300))}
    for length in sorted(lengths, reverse=True):
        os.truncate(quantized, length)
        with pytest.raises(qkern.CorruptFileError, match=r"x\.safetensors"):
            Source(quantized)


# Runs by itself: its memory is its own. Files whose header would be longer than they are.
READ_ALL = """
import resource, sys
import qkern
from qkern.checkpoint.source import Source

def attempt(path):
    try:
        Source(path)
    except qkern.CorruptFileError:
        return
    raise SystemExit(f"{path} was read")

attempt(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    attempt(path)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert "torch" not in sys.modules
raise SystemExit(grown > 4096 and f"{grown} KiB more")
"""


@pytest.mark.case("C2")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_header_that_cannot_be_is_refused_before_it_has_memory(tmp_path: Path) -> None:
    lengths = [0, 2**64 - 1, 2**63, 2**32, 10**8 + 1, 10**8, 10**8 - 9, 5 * 10**7]
    files = [tmp_path / str(length) for length in lengths]
    for file, length in zip(files, lengths, strict=True):
        file.write_bytes(struct.pack("<Q", length) + b"{}      ")
    with files[4].open("rb+") as sparse:  # long enough for its header, which is too long
        sparse.truncate(2 * 10**8)
    run = [sys.executable, "-c", READ_ALL, *map(str, files)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.case("C3")
@pytest.mark.parametrize(
    ("offsets", "data", "text"),
    [
        ([(4, 0)], 4, "ends before it begins"),
        ([(-4, 0)], 4, "integer `-4`"),
        ([(0, 4), (2, 6)], 6, "overlaps"),
        ([(0, 4), (0, 4)], 4, "overlaps"),
        ([(0, 4), (5, 9)], 9, "gap after"),
        ([(1, 5)], 5, "gap after the header"),
        ([(0, 4)], 3, "the file has 3 bytes of data"),
        ([(0, 4)], 5, "end at byte 4 of the data, the file has 5"),
        ([(0, 2**64 - 1)], 4, "the file has 4 bytes"),
        ([(2**64 - 4, 2**64)], 4, "floating point"),
    ],
)
def test_places_that_lie(
    offsets: list[tuple[int, int]], data: int, text: str, tmp_path: Path
) -> None:
    header = {f"t{i}": entry("U8", [4], place) for i, place in enumerate(offsets)}
    refused(raw(tmp_path / "x", header, data), text)


@pytest.mark.case("C4")
@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("F32", [2], 4),
        ("F32", [], 8),
        ("BF16", [3], 7),
        ("F4", [3], 2),
        ("U8", [2**64 - 1], 4),
        ("U8", [2**32, 2**32], 0),
        ("F64", [2**61], 0),
        ("U8", [2**63, 2, 0], 0),
        ("U8", [0, 3], 1),
    ],
)
def test_shapes_that_do_not_fit_their_bytes(
    dtype: str, shape: list[int], size: int, tmp_path: Path
) -> None:
    header = {"w": entry(dtype, shape, [0, size])}
    refused(raw(tmp_path / "x", header, size), rf'"w".*{dtype} of shape')


GOOD = json.dumps(entry())


@pytest.mark.case("C5")
@pytest.mark.parametrize(
    ("header", "text"),
    [
        (f'{{"a": {GOOD}, "a": {GOOD}}}', '"a" twice'),
        (f'{{"a": {GOOD}, "\\u0061": {GOOD}}}', '"a" twice'),
        ('{"a": {"dtype": "U8", "dtype": "U8"}}', '"dtype" twice'),
        ('{"__metadata__": {"a": "", "a": ""}}', "twice in __metadata__"),
        (json.dumps({"a": entry("F99")}), 'tensor "a": dtype: unknown variant `F99`'),
        (json.dumps({"a": entry("\x1b[2J")}), "unknown variant"),
        (json.dumps({"a": entry() | {"scale": 1}}), 'field "scale"'),
        (json.dumps({"a": entry(shape=[1] * 65)}), "64 dimensions"),
        (json.dumps({"a\0": entry()}), "control characters"),
        (json.dumps({"a\x1b[2J": entry()}), "control characters"),
        (json.dumps({"a\u202e": entry()}), "control characters"),
        (b'{"\xff": 1}', "not UTF-8"),
        ('{"\\ud800": 1}', UNREADABLE),
        ('{"a":' * 99_999, UNREADABLE),
        ("[" * 99_999, "begin with {"),
        ('{"a": {"shape": ' + "[" * 99_999, UNREADABLE),
        (f"{{{GOOD}", UNREADABLE),
        ("", UNREADABLE),
    ],
)
def test_json_that_lies(header: str | bytes, text: str, tmp_path: Path) -> None:
    refused(raw(tmp_path / "x", header, 1), text)


@pytest.mark.case("C6")
def test_tensors_without_values_are_tensors(tmp_path: Path) -> None:
    header = {
        "a": entry("F32", [0, 7], [0, 0]),
        "b": entry("U8", [2], [0, 2]),
        "c": entry("I64", [3, 0], [2, 2]),
        "d": entry("F16", [0], [2, 2]),
    }
    file = raw(tmp_path / "x.safetensors", header, b"\1\2")
    source = Source(file)
    assert {name: stored.shape for name, stored in source.tensors.items()} == {
        "a": (0, 7),
        "b": (2,),
        "c": (3, 0),
        "d": (0,),
    }
    assert [source.read_bytes(name).size for name in "abcd"] == [0, 2, 0, 0]
    with CheckpointReader(file) as reader:
        assert reader.read("a").shape == (0, 7)
    assert Source(raw(tmp_path / "none", {})).tensors == {}


@pytest.mark.case("C9")
@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "sub/x", "..", ".", "", "..\\x", "\\\\host\\x", "C:\\x", "C:x", "x\0"],
)
def test_an_index_leads_to_no_other_directory(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for place in (tmp_path / "x", home / "x"):
        raw(place, {"a": entry()}, 1)
    (home / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(qkern.CorruptFileError, match="not the name of a file in the directory"):
        Source(home)


@pytest.mark.case("C9")
def test_a_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    raw(blobs / "ab12", {"a": entry()}, b"\7")
    (blobs / "cd34").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/ab12")
    (snapshot / INDEX).symlink_to("../../blobs/cd34")
    source = Source(snapshot)
    assert source.files == (snapshot / "model-1.safetensors",)
    assert source.read_bytes("a").tolist() == [7]


@pytest.mark.case("C10")
def test_shards_and_their_index_hold_the_same(tmp_path: Path) -> None:
    one = torch.ones(1)
    write_shards(tmp_path, {"a": one, "b": one}, {"c": one}, {"d": one})
    index = json.loads((tmp_path / INDEX).read_text())

    def with_map(**changes: str) -> None:
        weight_map = {**index["weight_map"], **changes}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    with_map(c="gone-1", d="gone-2")
    with pytest.raises(FileNotFoundError, match=r"2 are missing: gone-1, gone-2"):
        Source(tmp_path)
    with_map(lost="model-1.safetensors")
    refused_index = r"differ in 1 tensors: lost is listed in model-1\.safetensors .* no shard"
    with pytest.raises(qkern.CorruptFileError, match=refused_index):
        Source(tmp_path)
    with_map()
    write(tmp_path / "model-1.safetensors", {"c": one, "extra": one, "more": one})
    with pytest.raises(
        qkern.CorruptFileError,
        match=r"differ in 2 tensors: extra is listed in no shard .*1\.safetensors, more is",
    ):
        Source(tmp_path)
    write(tmp_path / "model-1.safetensors", {"b": one, "c": one})
    with pytest.raises(qkern.CorruptFileError, match=r"b is in both .*model-0\.safetensors"):
        Source(tmp_path)


@pytest.mark.case("C18")
def test_a_file_that_is_replaced_stays_as_it_was_for_its_reader(tmp_path: Path) -> None:
    old, new = torch.randn(100, 100), torch.randn(100, 100)
    file = write(tmp_path / "x.safetensors", {"w.weight": old})
    source = Source(file)
    with CheckpointReader(file) as reader:
        write(tmp_path / "y.safetensors", {"w.weight": new}).replace(file)
        assert torch.equal(reader.read("w.weight"), old)
        file.write_bytes(b"")
        assert torch.equal(reader.read("w.weight"), old)
    # what reads by place opens the file anew, and so must tell
    with pytest.raises(qkern.CorruptFileError, match="replaced or written to"):
        source.read_bytes("w.weight")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        source.read_bytes("w.weight")


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.trace}",))


@pytest.mark.case("C20")
@pytest.mark.parametrize(
    "how", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))]
)
def test_pickles_are_not_opened(how: Any, tmp_path: Path) -> None:
    trace, home = tmp_path / "trace", tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (home / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("pytorch_model.bin", "adapter_model.bin", "x.pt", "x.ckpt"):
        how(Malicious(trace), home / name)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    doors = [
        lambda: Source(home),
        lambda: qkern.inspect_checkpoint(home),
        lambda: qkern.load(home, model),
        *(lambda name=name: Source(home / name) for name in ("x.pt", "x.ckpt")),
        lambda: qkern.load_adapter(qkern.quantize_model(model) and model, home),
    ]
    for door in doors:
        with pytest.raises(qkern.CorruptFileError, match=r"is a pickle, .*convert it"):
            door()
    # under another name it is no safetensors file, whatever else it is
    how(Malicious(trace), home / "model.safetensors")
    with pytest.raises(qkern.CorruptFileError, match=UNREADABLE):
        Source(home)
    assert not trace.exists()


@pytest.mark.case("C22")
def test_values_that_begin_at_any_byte(tmp_path: Path) -> None:
    """Files written elsewhere align nothing; the header's length is odd here too."""
    codes = qkern.quantize(torch.randn(8, 64), "nf4", double_quant=False)
    tensors = {k: v.numpy() for k, v in flat_keys.flatten(codes, "w.weight").items()}
    tensors = {"a": np.ones(3, np.uint8), **tensors, "b": np.ones(2, np.uint8)}
    header, data = {}, b""
    kinds = {"uint8": "U8", "float32": "F32"}
    for name, values in tensors.items():
        begin = len(data)
        data += values.tobytes()
        header[name] = entry(kinds[values.dtype.name], values.shape, [begin, len(data)])
    text = json.dumps(header)
    file = raw(tmp_path / "x.safetensors", text + " " * (len(text) % 2 == 0), data)
    source = Source(file)
    assert source.entries["w.weight.absmax"].begin % 4
    for name, values in tensors.items():
        assert source.read_bytes(name).tobytes() == values.tobytes()
    with CheckpointReader(file) as reader:
        assert torch.equal(reader.read("w.weight").dequantize(), codes.dequantize())
    assert torch.equal(load_file(file)["w.weight.absmax"], codes.absmax.reshape(-1))
