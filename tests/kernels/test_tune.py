"""Configs timed on a machine: what is tried, kept and read. Nothing here depends on a clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import qkern
from qkern.cli import exit_codes, main
from qkern.errors import DeviceError, ShapeError
from qkern.kernels import dispatch, linear, tune
from qkern.kernels.dispatch import Config, choose
from qkern.ops import tuning

CPU = torch.device("cpu")
KEY = {"device": "NVIDIA H200", "triton": "3.9.0", "qkern": "0.1.0"}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own cache, and no memory of another."""
    monkeypatch.setenv("QKERN_CACHE_DIR", str(tmp_path))
    tuned_of = tune.tuned_of
    tuned_of.cache_clear()
    yield tmp_path
    tuned_of.cache_clear()


def row(**changes: Any) -> Config:
    return Config("matmul_small", 16, 16, (16, 64, 64), 4, 3, True, 4, (4096, 4096)).replace(
        **changes
    )


def write(*rows: Config, key: dict[str, str] = KEY) -> Path:
    content = tune.content_of(key, dict(enumerate(rows)))
    tune.path_of(key).write_text(json.dumps(content))
    return tune.path_of(key)


def test_rows_are_read_as_they_were_written_and_come_first() -> None:
    vectors = row(op="matvec", tokens=2, tile=(2, 4, 512), split=0)
    dense = row(op="dense", tokens=256, split=1)
    write(row(), vectors, dense)
    tuned = tune.read(KEY)
    H200 = ("sm_90", 132, 16)
    assert choose(*H200, 9, 4096, 4096, tuned) == row()
    assert choose(*H200, 2, 4096, 4096, tuned) == vectors
    assert choose(*H200, 200, 4096, 4096, tuned) is None
    for M, N in ((8, 4096), (17, 4096), (16, 1024), (1, 4096)):  # another bucket, another shape
        assert choose(*H200, M, N, 4096, tuned) == choose(*H200, M, N, 4096)
    assert choose("sm_90", 132, 32, 16, 4096, 4096, tuned) == choose(
        "sm_90", 132, 32, 16, 4096, 4096
    )


BAD_ROWS = [
    {"op": "__import__('os')"},
    {"tile": (16, 48, 64)},
    {"tile": (16, 64)},
    {"tile": (8, 64, 64)},
    {"tile": (16, 64, 1 << 20)},
    {"warps": 3},
    {"warps": 10**9},
    {"stages": 0},
    {"split": 0},
    {"split": -1},
    {"split": 1000},
    {"tokens": 5},
    {"tokens": True},
    {"shape": None},
    {"shape": (4096,)},
    {"shape": (4096, 0)},
    {"ahead": 1},
    {"bits": 8},
    {"op": "matvec", "tile": (16, 64, 64)},
]


@pytest.mark.parametrize("change", BAD_ROWS, ids=str)
def test_a_row_that_no_kernel_could_run_makes_the_file_ignored(change: dict[str, Any]) -> None:
    write(row(), row(tokens=32, **change) if "tokens" not in change else row(**change))
    with pytest.warns(UserWarning, match=r"tuned_NVIDIA-H200_3\.9\.0_0\.1\.0\.json are ignored"):
        assert tune.read(KEY).rows == {}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"null",
        b'{"key": {}}',
        b'{"key": 1, "rows": []}',
        b"[" * 100_000,
        b'{"key": {"device": "NVIDIA H200", "triton": "3.9.0", "qkern": "0.1.0"}, "rows": 7}',
        b'{"key": {"device": "NVIDIA H200", "triton": "3.9.0", "qkern": "0.1.0"},'
        b' "rows": [{"op": "matmul", "unknown": 1}]}',
    ],
    ids=lambda text: str(text[:40]),
)
def test_a_damaged_file_is_ignored_with_a_warning(text: bytes) -> None:
    tune.path_of(KEY).write_bytes(text)
    with pytest.warns(UserWarning, match="are ignored"):
        assert tune.read(KEY).rows == {}


def test_a_file_of_something_else_is_ignored_and_none_is_no_error() -> None:
    assert tune.read(KEY).rows == {}
    other = KEY | {"triton": "3.6.0"}
    assert tune.path_of(other) != tune.path_of(KEY)
    write(row(), key=other).rename(tune.path_of(KEY))
    with pytest.warns(UserWarning, match="made for .*3.6.0"):
        assert tune.read(KEY).rows == {}


def test_the_cache_is_where_each_system_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QKERN_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for system, cache, expected in (
        ("Linux", None, "/home/me/.cache/qkern"),
        ("Linux", "relative", "/home/me/.cache/qkern"),
        ("Linux", "/var/me", "/var/me/qkern"),
        ("Darwin", None, "/home/me/Library/Caches/qkern"),
        ("Windows", None, "/home/me/AppData/Local/qkern/Cache"),
    ):
        monkeypatch.setattr("platform.system", lambda name=system: name)
        if cache is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert str(tune.cache_directory()) == expected


class Clock:
    """Times by what is launched: a price for each config, without running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, price: Callable[[Config], float]) -> None:
        self.seen: list[Config] = []

        def product(x: Any, weight: Any, config: Config) -> Callable[[], object]:
            self.seen.append(config)
            return lambda: price(config)

        monkeypatch.setattr(tune, "_product", product)

    def __call__(self, run: Callable[[], Any]) -> float:
        return float(run())


def test_the_fastest_is_kept_and_joins_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def price(config: Config) -> float:
        if config.tile[1] == 128:
            msg = "out of memory"
            raise RuntimeError(msg)
        if config.op == "dense":
            return 100.0
        return 5.0 + config.tile[1] + abs(config.split - 3)

    clock, told = Clock(monkeypatch, price), []
    how = {"device": "cpu", "timer": clock, "report": told.append}
    path, found = tuning.tune([(96, 1024)], [9], **how)
    (product,) = found
    assert told == found
    assert (product.tokens, product.op, product.tile[1], product.split) == (
        16,
        "matmul_small",
        32,
        3,
    )
    assert (product.seconds, product.before) == (37.0, price(clock.seen[0]))
    assert len(clock.seen) <= 40
    tuning.tune([(64, 512)], [1, 1], **how)
    rows = tune.read(tune.key_of(CPU)).rows
    assert {(bits, M, N, K) for bits, M, N, K in rows} == {(16, 16, 96, 1024), (16, 1, 64, 512)}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    text = path.read_text()
    assert json.loads(text)["key"] == {
        "device": "cpu",
        "triton": tune.triton.__version__,
        "qkern": qkern.__version__,
    }


def test_what_gains_nothing_leaves_the_shipped_config(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda config: 1.0 - len(clock.seen) * 1e-5)
    for tokens in (1, 16, 512, 1024):
        _, (found,) = tuning.tune([(256, 1024)], [tokens], device="cpu", timer=clock)
        shipped = choose("", 1, 16, tokens, 256, 1024)
        assert found.op == ("dense" if shipped is None else shipped.op)
        assert found.seconds == found.before


def test_every_candidate_is_a_row_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each kind is multiplied too."""
    clock = Clock(monkeypatch, lambda config: -float(len(clock.seen)))
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 4, 64, 1024):
            seen = len(clock.seen)
            tune.best(CPU, dtype, tokens, 256, 1024, clock)
            assert 2 <= len(clock.seen) - seen <= 48
            for config in clock.seen[seen:]:
                kept = config.replace(tokens=tokens, shape=(256, 1024))
                write(kept)
                assert list(tune.read(KEY).rows.values()) == [kept]


def test_a_run_multiplies_by_the_config() -> None:
    x, weight = tune._operands(CPU, torch.bfloat16, 16, 32, 128)
    small = Config("matmul_small", 16, 16, (16, 32, 64), 4, 2, split=2)
    results = [tune._product(x, weight, how)() for how in (small, small.replace(op="dense"))]
    assert results[0].shape == (16, 32)
    torch.testing.assert_close(*results, rtol=2**-6, atol=2**-6)


def test_nothing_is_timed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(tuning, "tune", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tune, "tuned_of", lambda _: tune.Tuned({(16, 16, 64, 64): row()}))
    gpu = torch.device("cuda", 0)
    tuning.tune_if_asked(gpu, torch.bfloat16, 5, (64, 64))
    assert calls == []
    monkeypatch.setattr(tuning, "_asked_for", True)
    monkeypatch.setattr(tuning, "_tried", set())
    for tokens in (5, 6, 16, 2000, 0):
        tuning.tune_if_asked(gpu, torch.bfloat16, tokens, (64, 64))
    tuning.tune_if_asked(gpu, torch.float64, 5, (64, 64))
    tuning.tune_if_asked(CPU, torch.bfloat16, 5, (64, 64))
    assert calls == [([(64, 64)], [8])]  # 16 is there, the others are too many, or no kernel's
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuning.tune_if_asked(gpu, torch.bfloat16, 64, (64, 64))
    assert len(calls) == 1


def test_products_ask_for_the_rows_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    own = row(shape=(64, 64))
    monkeypatch.setattr(linear, "tuned_of", lambda _: tune.Tuned({(16, 16, 64, 64): own}))
    assert linear.config_for(CPU, torch.bfloat16, 12, 64, 64) == own
    assert linear.config_for(CPU, torch.bfloat16, 12, 64, 128) != own
    dispatch.choose.cache_clear()


def test_what_cannot_be_timed_is_refused(capsys: Any) -> None:
    with pytest.raises(DeviceError, match="nothing to time on cpu: no kernels for cpu"):
        tuning.tune([(64, 64)], device="cpu")
    for shapes in ([], [(64, 63)], [(0, 64)]):
        with pytest.raises(ShapeError, match="multiple of 64"):
            tuning.tune(shapes, device="cpu", timer=lambda run: 1.0)
    with pytest.raises(ShapeError, match="1 or more"):
        tuning.tune([(64, 64)], [0], device="cpu", timer=lambda run: 1.0)
    assert main(["tune", "--shapes", "64x64", "--device", "cpu"]) == exit_codes.IO
    assert "nothing to time on cpu: no kernels for cpu" in capsys.readouterr().err
    assert main(["tune", "--shapes", "64x"]) == exit_codes.USAGE
    assert main(["tune", "--shapes", "64x64", "--tokens", "0"]) == exit_codes.USAGE


def test_the_command_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, directory: Path
) -> None:
    monkeypatch.setattr("qkern.kernels.why_not", lambda _: "")
    clock = Clock(monkeypatch, lambda config: 1e-5 if config.split == 2 else 3e-5)
    monkeypatch.setattr(tuning, "_benchmark", clock)
    arguments = ["tune", "--shapes", "128x1024", "--tokens", "16", "--device", "cpu"]
    assert main(arguments) == exit_codes.DONE
    out, err = capsys.readouterr()
    assert "128x1024" in out
    assert "3.00" in out
    assert str(directory) in out
    assert "16 tokens: 30.0 us, now 10.0 us" in err
    assert main([*arguments, "--json"]) == exit_codes.DONE
    products = json.loads(capsys.readouterr().out)["products"]
    assert [product["split"] for product in products] == [2]
