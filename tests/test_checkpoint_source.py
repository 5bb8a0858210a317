"""A checkpoint described without torch: names, places, bytes, what is tied, what lies beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write, write_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qkern
from qkern import flat_keys
from qkern.checkpoint.chart_labels import layer_number
from qkern.checkpoint.source import Source, dtype_of_config


def entries_of(quant_type: str, name: str) -> dict[str, torch.Tensor]:
    return flat_keys.flatten(qkern.quantize(torch.randn(9, 13), quant_type), name)


def test_shards_are_one_source_in_natural_order(tmp_path: Path) -> None:
    first = {"l.10.weight": torch.randn(2, 3), "l.9.weight": torch.randn(4).bfloat16()}
    second = entries_of("nf4", "q.weight") | {f"l.{'7' * 5000}.x": torch.ones(1)}
    source = Source(write_shards(tmp_path, first, second))
    assert [file.name for file in source.files] == ["model-0.safetensors", "model-1.safetensors"]
    assert list(source.tensors) == ["l.9.weight", "l.10.weight", f"l.{'7' * 5000}.x", "q.weight"]
    for key, tensor in (first | second).items():
        entry = source.entries[key]
        assert (entry.shape, entry.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(source.read_bytes(key), expected)
        place = np.fromfile(entry.file, np.uint8)[entry.begin : entry.end]
        np.testing.assert_array_equal(place, expected)
    assert source.keys_of("l.9.weight") == ["l.9.weight"]
    assert sorted(source.keys_of("q.weight")) == sorted(k for k in second if k.startswith("q."))
    assert source.is_quantized
    state = source.state("q.weight")
    assert (state.format, state.shape) == (qkern.QuantFormat("nf4"), (9, 13))
    with pytest.raises(KeyError):
        source.state("l.9.weight")


def test_the_parts_of_one_tensor_may_lie_in_two_shards(tmp_path: Path) -> None:
    entries = entries_of("nf4", "q.weight")
    scales = {"q.weight.absmax": entries.pop("q.weight.absmax")}
    source = Source(write_shards(tmp_path, entries, scales))
    assert source.tensors["q.weight"].file.name == "model-0.safetensors"
    assert source.entries["q.weight.absmax"].file.name == "model-1.safetensors"


def test_int8_rows_have_the_dtype_of_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, entries_of("int8_row", "w.weight"))
    assert (Source(tmp_path).state("w.weight").dtype, Source(tmp_path).config) == ("float16", {})
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16", "n": 1}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        source = Source(path)
        assert source.state("w.weight").dtype == source.tensors["w.weight"].dtype == "bfloat16"
        assert source.config["n"] == 1
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(qkern.CorruptFileError, match=r"config\.json holds a JSON list"):
        Source(tmp_path)
    assert dtype_of_config({"torch_dtype": "float32"}) == "float32"
    assert dtype_of_config({"dtype": ["x"]}) is None


@pytest.mark.parametrize("tied", ["{", "[]", '{"a": 1}', "[" * 9999])
def test_what_is_tied_is_an_object_of_names(tied: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, file, {"qkern_tied": tied})
    with pytest.raises(qkern.CorruptFileError, match="qkern_tied"):
        Source(file)
    save_file({"a": torch.ones(1)}, file, {"qkern_tied": '{"b": "a", "c": "gone", "a": "a"}'})
    assert Source(file).tied == {"b": "a"}


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_a_quantized_tensor_may_be_tied(quant_type: str, tmp_path: Path) -> None:
    shared = torch.nn.Linear(64, 64, bias=False)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": torch.nn.Linear(64, 64)})
    qkern.quantize_model(model, quant_type)
    qkern.save(model, tmp_path)
    source = Source(tmp_path)
    assert list(source.tensors) == ["a.weight", "c.bias", "c.weight"]
    assert source.tied == {"b.weight": "a.weight"}
    assert [row.name for row in qkern.inspect_checkpoint(tmp_path).tensors] == list(source.tensors)
    file = tmp_path / "model.safetensors"
    entries = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tied = json.loads(metadata["qkern_tied"])
    for lie in (
        {k: v for k, v in tied.items() if k == "b.weight"},
        {**tied, "b.weight": "c.weight"},
    ):
        save_file(entries, file, metadata | {"qkern_tied": json.dumps(lie)})
        with pytest.raises(qkern.CorruptFileError, match=r"b\.weight.*(of its own|missing)"):
            Source(tmp_path)


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a": torch.ones(4)})
    source = Source(file)
    assert source.read_bytes("a").size == 16
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(qkern.CorruptFileError, match="replaced or written to"):
        source.read_bytes("a")
    with pytest.raises(qkern.CorruptFileError, match="replaced or written to"):
        source.check_unchanged()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").symlink_to("model.safetensors.index.json")
    with pytest.raises(OSError, match=r"cannot open .*index\.json") as error:
        Source(tmp_path)
    assert error.value.filename.endswith("index.json")
    with pytest.raises(OSError, match="cannot open"):
        Source(tmp_path / ("x" * 300))


def test_torch_is_not_needed(tmp_path: Path) -> None:
    write(tmp_path, entries_of("nf4", "w.weight") | entries_of("int8_row", "r.weight"))
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from qkern.checkpoint.source import Source\n"
        "source = Source(sys.argv[1])\n"
        "print(*source.tensors, source.read_bytes('w.weight').size)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(qkern.__file__).parents[1])}
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["r.weight", "w.weight", "59"], "")


def test_a_directory_without_safetensors_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"holds neither .*: no safetensors file"):
        Source(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(qkern.CorruptFileError, match=r"x\.gguf.*\.gguf files are not read"):
        Source(tmp_path / "x.gguf")


def test_a_number_of_many_digits_is_no_layer() -> None:
    assert layer_number("layers.12.w") == 12
    assert layer_number(f"layers.{'9' * 5000}.w") is None
