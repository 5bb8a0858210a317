"""The kernels compile without their GPUs, and their machine code holds the gates."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter("compiles for GPUs that need not be there: `make aot`")

WORKER = Path(__file__).with_name("aot_report.py")


def test_shipped_kernels_hold_their_gates_ahead_of_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(WORKER), "--quick"],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "failed: 0" in run.stdout
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942"):  # or is left out by name
        assert f" {arch} " in run.stdout


MODES = ".amdhsa_float_denorm_mode_32 3\n.amdhsa_float_denorm_mode_16_64 3\n"
DIVISION = "v_rcp_f32_e32 v1, v2\n" + "v_fma_f32 v1, v2, v3, v4\n" * 5 + "v_div_fixup_f32 v1, v2\n"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (MODES + "\tv_mul_f32_e32 v1, v2, v3\n\tv_mad_u64_u32 v[1:2], s[0:1], v3, v4, 0", ""),
        (MODES + DIVISION, ""),
        (MODES + "v_fma_mixlo_f16 v1, v2, v3, neg(0)\nv_fma_mixhi_f16 v1, v2, v3, 0", ""),
        (MODES + "v_cvt_f32_u32_e32 v1, s2\nv_rcp_f32_e32 v1, v1", ""),  # division of integers
        (MODES + "v_fma_mixlo_f16 v1, v2, v3, v4", "v_fma_mixlo_f16"),
        (MODES + "\tv_fmac_f32_e32 v1, v2, v3", "v_fmac_f32"),
        (MODES + DIVISION + "v_pk_fma_f32 v[1:2], v[3:4], v[5:6], v[7:8]", "v_pk_fma_f32"),
        (MODES + "v_rcp_f32_e32 v1, v2", "an inexact division"),
        (MODES.replace("_32 3", "_32 0"), "subnormal"),
    ],
)
def test_the_gate_of_amds_code_tells_exact_from_inexact(code: str, found: str) -> None:
    inexact_amd = runpy.run_path(str(WORKER))["inexact_amd"]
    failures = list(inexact_amd(code))
    assert len(failures) == bool(found)
    assert found in "".join(failures)
