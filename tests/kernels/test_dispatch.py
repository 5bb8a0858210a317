"""The tables of configs, and what is chosen from them."""

from __future__ import annotations

import pytest

from qkern.kernels import dispatch
from qkern.kernels.dispatch import Config, choose

FAMILIES = ("sm_80", "sm_90", "gfx942")
H200 = ("sm_90", 132, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_in_order_and_name_kernels(family: str) -> None:
    rows = dispatch.table(family)
    for bits in (16, 32):
        tokens = [row.tokens for row in rows if row.bits == bits]
        assert tokens == sorted(set(tokens))
    for row in rows:
        assert row.op in {"matvec", "matmul_small", "matmul"}
        assert all(side & (side - 1) == 0 for side in row.tile[1:])
        if row.op == "matvec":
            assert row.tokens == row.tile[0] <= 4


def test_every_gpu_has_a_table() -> None:
    served = {"": "sm_80", "sm_86": "sm_80", "sm_120": "sm_80", "sm_90": "sm_90"}
    served |= {"sm_100": "sm_90", "gfx942": "gfx942", "gfx1100": "gfx942"}
    assert {arch: dispatch.family(arch) for arch in served} == served


def test_more_tokens_take_larger_tiles_and_then_none() -> None:
    kinds = [choose(*H200, M, 4096, 4096) for M in (1, 2, 16, 64, 512)]
    ops = [config.op for config in kinds if config]
    assert ops == ["matvec", "matvec", "matmul_small", "matmul_small", "matmul"]
    assert choose(*H200, 513, 4096, 4096) is None
    assert choose("sm_90", 132, 32, 65, 4096, 4096) is None


def test_a_matvec_has_programs_for_all_multiprocessors() -> None:
    for N, rows in ((1024, 4), (4096, 8), (28672, 16)):
        config = choose(*H200, 1, N, 4096)
        assert config is not None
        assert config.tile == (1, rows, 1024)


def test_columns_are_split_until_programs_suffice_or_have_too_few_steps() -> None:
    splits = {}
    for N, K in ((1024, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (64, 128)):
        config = choose(*H200, 16, N, K)
        assert config is not None
        splits[N, K] = config.split
    assert splits == {
        (1024, 4096): 8,
        (4096, 4096): 4,
        (4096, 14336): 4,
        (28672, 4096): 1,
        (64, 128): 1,
    }


def test_large_tiles_are_split_only_where_most_of_the_gpu_would_be_idle() -> None:
    kinds = {}
    for M, N in ((128, 4096), (128, 14336), (512, 1024), (512, 4096)):
        config = choose(*H200, M, N, 4096)
        assert config is not None
        kinds[M, N] = (config.op, config.split)
    assert kinds == {
        (128, 4096): ("matmul_small", 4),
        (128, 14336): ("matmul", 0),
        (512, 1024): ("matmul_small", 4),
        (512, 4096): ("matmul", 0),
    }


def test_a_row_of_the_shape_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Config("matmul", 16, 64, (64, 64, 64), 4, 3)
    own = Config("matmul", 16, 64, (64, 32, 64), 4, 3, shape=(11, 64))
    monkeypatch.setattr(dispatch, "table", lambda _: (wide, own))
    assert choose.__wrapped__(*H200, 5, 11, 64) == own
    assert choose.__wrapped__(*H200, 5, 12, 64) == wide
