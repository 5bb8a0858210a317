"""Native calls in the life of a process: sizes, threads, forks, signals, panics.

The rows A9, B11, D25, D26, D27 and D28 of the reliability cases. What ends, forks or fills a
process runs in one of its own: ``native_signals.py``, ``native_processes.py``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import native_calls
import native_processes
import numpy as np
import pytest
import torch
from cases import as_bits

import qkern
from qkern import _native, codec, reference
from qkern.formats import DTYPES, QuantFormat

TESTS = Path(__file__).parents[1]
RUST = Path(__file__).parents[2] / "rust"
NF4 = QuantFormat("nf4", 64, double_quant=False)
# Above this many values, the codec wakes more threads.
PARALLEL = 1 << 21

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, signals and /proc of Linux")


def run_worker(name: str, *arguments: str, status: int = 0, timeout: float = 200) -> Any:
    """What a worker's function answers; the text of its errors if it shall end otherwise."""
    command = [sys.executable, "-W", "error", str(TESTS / name), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if run.returncode == native_calls.CANNOT_RUN:
        pytest.skip(run.stdout.strip())
    assert run.returncode == status, run.stdout + run.stderr
    return run.stderr if status else json.loads(run.stdout.splitlines()[-1])


# -- A9: more than 2^31 elements --


def marked_parts(mark: int, fmt: QuantFormat) -> tuple[reference.Parts, torch.Tensor]:
    """The reference's bytes of the marked values of a large tensor, and what they decode to."""
    bits = native_processes.marked(mark)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    parts = reference.quantize(values, fmt)
    return parts, reference.dequantize(parts, fmt, values.numel(), torch.bfloat16)


@pytest.mark.case("A9")
@linux
def test_a9_more_than_2_31_values_are_quantized_right_to_both_ends(tmp_path: Path) -> None:
    saved_at = tmp_path / "large.npz"
    answer = run_worker("native_processes.py", "large_quantize", str(saved_at))
    assert answer["others_are_zero"]
    assert answer["peak_gib"] < 3
    saved = np.load(saved_at)
    for mark in native_processes.MARKS:
        expected, values = marked_parts(mark, NF4)
        packed, absmax = saved[f"packed {mark}"], saved[f"absmax {mark}"]
        np.testing.assert_array_equal(packed, expected.packed.numpy())
        np.testing.assert_array_equal(absmax, expected.absmax.numpy())
        back = np.zeros(values.numel(), np.uint16)
        code = codec.code_array("nf4")
        _native.dequantize_4bit(packed, absmax, code, 64, back, "bfloat16")
        np.testing.assert_array_equal(back.view(np.int16), values.view(torch.int16).numpy())


@linux
@pytest.mark.skipif(
    not os.environ.get("QKERN_TEST_LARGE"), reason="takes 8 GiB of memory: make test-large"
)
def test_a9_more_than_2_31_values_come_back_right(tmp_path: Path) -> None:
    saved_at = tmp_path / "large.npz"
    run_worker("native_processes.py", "large_round_trip", str(saved_at))
    saved = np.load(saved_at)
    for fmt in (NF4, NF4.replace(quant_type="int8")):
        assert saved[f"{fmt.quant_type} others"] == 0
        for mark in native_processes.MARKS:
            _, values = marked_parts(mark, fmt)
            found = saved[f"{fmt.quant_type} {mark}"].view(np.int16)
            np.testing.assert_array_equal(found, values.view(torch.int16).numpy())


@pytest.mark.case("A9")
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(1 << 20, 1 << 12), (3, (1 << 31) + 33), ((1 << 32) + 1,)])
def test_a9_sizes_of_meta_tensors_beyond_32_bits(quant_type: str, shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    values = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    q = qkern.quantize(values, quant_type)
    blocks = -(-numel // 64)
    assert q.packed.numel() == (numel if quant_type == "int8" else -(-numel // 2))
    assert (q.absmax.numel(), q.nested_absmax.numel()) == (blocks, -(-blocks // 256))
    assert (q.shape, q.dequantize().shape) == (torch.Size(shape), torch.Size(shape))
    if len(shape) == 2:
        x = torch.empty(5, shape[1], dtype=torch.bfloat16, device="meta", requires_grad=True)
        y = qkern.linear(x, q)
        assert y.shape == (5, shape[0])
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


# Casts to fewer bits in the codec: none of them takes a length, an index or an offset.
ALLOWED_CASTS = {
    r"to_bits\(\)( & 0x7fff_ffff\))? as i32": "the bits of a float, as many as before",
    r"fold\(0, i32::max\) as u32": "the bits of a float, as many as before",
    r"(extract_epi32::<0>\(maxima\)|reduce_max_epi32\(largest\)) as u32": "the bits of a float",
    r"reduce_min_epi32\(least\) as u32": "the bits of a float",
    r"\(magnitude as i32 - LOWEST\)": "the first bits of a float",
    r"(shifts\[i\]|self\.shift) as i32": "a shift by less than 32",
    r"filter\(\|&&place\| place < bin\)\.count\(\) as u32": "one of 15 bounds",
    r"\(low_bits << 27\) as i32": "five bits",
    r"0xffff_0000_u32 as i32": "a constant",
    r"\b(DROPPED|SIDE) as i32": "a constant",
    r"fill\(STRIDE as u16\)": "a constant",
    r"i as u32 / lanes % 16": "an index below 128",
    r"\(16 \* g - \(first << self\.shift\)\) as i32": "a part of a block, in units of 64 values",
    r"checked_shl\(next as u32\)": "the scales that are left of 256",
    r"\(\(self \+ 127\) as u32\) << 23": "the exponent of a float",
    r"scaled\.round\(\) as i32": "an integer of 14 bits",
}


@pytest.mark.case("A9")
def test_a9_no_cast_cuts_a_length_to_32_bits() -> None:
    casts, unused = [], set(ALLOWED_CASTS)
    tests = {"tests.rs", "testing.rs", "tests", "fuzz", "target"}
    found = RUST.rglob("*.rs")
    sources = [path for path in found if not tests & {*path.relative_to(RUST).parts}]
    assert len(sources) > 20
    for path in sources:
        source = path.read_text(encoding="utf-8")
        code = re.split(r"#\[cfg\(test\)\]\n(pub\(crate\) )?mod tests \{", source)[0]
        for number, line in enumerate(code.splitlines(), 1):
            if not re.search(r"\bas [iu](16|32)\b", line.split("//")[0]):
                continue
            reasons = {pattern for pattern in ALLOWED_CASTS if re.search(pattern, line)}
            unused -= reasons
            if not reasons:
                casts.append(f"{path.relative_to(RUST)}:{number}: {line.strip()}")
    assert not casts, "keep sizes in usize, or say in ALLOWED_CASTS why these fit"
    assert not unused, f"these casts are gone: {unused}"


# -- B11: thread counts --


@pytest.mark.case("B11")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_b11_every_number_of_threads_gives_the_same_bytes(quant_type: str, dtype: str) -> None:
    n = PARALLEL + 5 * 4096 + 33
    normal = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    values = as_bits(normal, dtype)
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    found = {
        (body, threads): round_trip(values, dtype, fmt, simd=body, threads=threads)
        for body in _native.available_simd()
        for threads in (1, 2, 7)
    }
    expected = next(iter(found.values()))
    assert [key for key, value in found.items() if value != expected] == []


def round_trip(values: np.ndarray, dtype: str, fmt: QuantFormat, **engine: Any) -> list[bytes]:
    absmax, back = np.zeros(fmt.num_blocks(values.size), np.float32), np.zeros_like(values)
    if fmt.quant_type == "int8":
        packed: np.ndarray = np.zeros(values.size, np.int8)
        _native.quantize_int8(values, dtype, fmt.blocksize, packed, absmax, **engine)
        _native.dequantize_int8(packed, absmax, fmt.blocksize, back, dtype, **engine)
    else:
        packed = np.zeros(fmt.packed_size(values.size), np.uint8)
        code = codec.code_array(fmt.quant_type)
        _native.quantize_4bit(values, dtype, code, fmt.blocksize, packed, absmax, **engine)
        _native.dequantize_4bit(packed, absmax, code, fmt.blocksize, back, dtype, **engine)
    return [packed.tobytes(), absmax.tobytes(), back.tobytes()]


@pytest.mark.case("B11")
def test_b11_double_quantization_does_not_depend_on_threads() -> None:
    n = PARALLEL // 4 + 1000 * 256 + 33
    absmax = np.random.default_rng(2).uniform(0.001, 0.3, n).astype(np.float32)
    found = []
    for threads in (1, 2, 7):
        codes, nested = np.zeros(n, np.uint8), np.zeros(-(-n // 256), np.float32)
        table, back = codec.nested_code_array(), np.zeros(n, np.float32)
        offset = np.zeros(1, np.float32)
        safe = _native.quantize_absmax(absmax, table, codes, nested, offset, threads=threads)
        _native.dequantize_absmax(codes, table, nested, offset, back, threads=threads)
        found.append((safe, offset.item(), codes.tobytes(), nested.tobytes(), back.tobytes()))
    assert found[0] == found[1] == found[2]
    expected = reference.quantize_absmax(torch.from_numpy(absmax))
    assert found[0][1] == expected[2].item()
    assert found[0][2] == expected[0].numpy().tobytes()


# -- D25: fork --


@pytest.mark.case("D25")
@linux
def test_d25_both_sides_of_a_fork_quantize() -> None:
    answer = run_worker("native_processes.py", "fork")
    assert answer == {"child": 0, "grandchild": 0, "amid work": 0, "parent": 0}


@pytest.mark.case("D25")
@linux
def test_d25_workers_of_a_data_loader_quantize() -> None:
    answer = run_worker("native_processes.py", "loader")
    assert answer == {"fork": [True] * 4, "spawn": [True] * 4}


# -- D26: many Python threads --


@pytest.mark.case("D26")
def test_d26_eight_threads_with_200_tensors_each_get_what_one_gets() -> None:
    rng = np.random.default_rng(3)
    sizes = [1, 33, 64, 1000, 4099, 70_001, 300_000]
    tensors = [rng.standard_normal(sizes[i % 7]).astype(np.float32) for i in range(196)]
    tensors += [rng.standard_normal(PARALLEL + i).astype(np.float32) for i in range(4)]
    serial = [quantized_and_back(i, values) for i, values in enumerate(tensors)]
    start = threading.Barrier(8)

    def work(first: int) -> int:
        start.wait()
        order = [(first * 25 + i) % 200 for i in range(200)]  # others work on other tensors
        return sum(quantized_and_back(i, tensors[i]) != serial[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def quantized_and_back(i: int, values: np.ndarray) -> int:
    """A fingerprint of the bytes: eight times 200 tensors are too many to keep."""
    settings: dict[str, Any] = {"quant_type": ("nf4", "fp4", "int8")[i % 3]}
    if i % 2:
        q = qkern.quantize(values, **settings)
        return hash((q.packed.tobytes(), q.absmax.tobytes(), qkern.dequantize(q).tobytes()))
    t = qkern.quantize(torch.from_numpy(values), **settings)
    parts = (t.packed, t.absmax, t.dequantize())
    return hash(tuple(part.numpy().tobytes() for part in parts))


@pytest.mark.case("D26")
@linux
def test_d26_python_runs_during_a_native_call() -> None:
    call, out = native_calls.quantize_4bit(1 << 26, simd="scalar")
    out[-1] = 7  # written last, by the only thread
    seen = []
    watcher = native_calls.when_running(out, lambda: seen.append(out[-1] == 7))
    call(threads=1)
    watcher.join()
    assert seen == [True]
    assert out[-1] == out[0]


@pytest.mark.case("D26")
@linux
def test_d26_sub_interpreters_are_refused() -> None:
    answer = run_worker("native_processes.py", "sub_interpreter")
    assert answer.startswith("qkern does not support sub-interpreters: ")


# -- D27: Ctrl-C --


@pytest.mark.case("D27")
@linux
def test_d27_every_operation_is_interrupted_within_a_second() -> None:
    seconds = run_worker("native_signals.py", "interrupt")
    assert len(seconds) == 2 * len(native_calls.OPERATIONS) + 2
    assert max(seconds.values()) < 1, seconds


@pytest.mark.case("D27")
@linux
def test_d27_ctrl_c_ends_a_program_as_it_ends_any_other() -> None:
    command = [sys.executable, str(TESTS / "native_signals.py"), "until_interrupted"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.case("D27")
@linux
def test_d27_handlers_run_during_a_call_and_decide_about_it() -> None:
    answer = run_worker("native_signals.py", "handlers")
    assert answer == {"during": [True, True], "complete": True, "raised": "enough"}


@pytest.mark.case("D27")
@linux
def test_d27_public_functions_are_interrupted_too() -> None:
    answer = run_worker("native_signals.py", "doors")
    assert answer == ["encode", "encode", "decode"]


@pytest.mark.case("D27")
@linux
def test_d27_a_call_on_another_thread_goes_on() -> None:
    answer = run_worker("native_signals.py", "other_thread")
    assert answer == {"during": True, "complete": True}


@pytest.mark.case("D27")
@linux
def test_d27_the_interpreter_can_end_during_a_call_of_a_daemon_thread() -> None:
    assert run_worker("native_signals.py", "exit_during_call", timeout=30) is None


# -- D28: panics --


@pytest.mark.case("D28")
@pytest.mark.parametrize("threads", [1, 2, 0])
def test_d28_a_panic_is_a_typed_error_and_the_codec_works_on(
    threads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = native_calls.small_result()
    place = r".*parallel\.rs:\d+:\d+"
    with pytest.raises(qkern.NativeError, match=f"panicked at {place}: on purpose: .*report it"):
        _native._panic("on purpose", threads=threads)
    assert native_calls.small_result() == expected
    assert capfd.readouterr() == ("", ""), "the error says it; nothing else does"


@pytest.mark.case("D28")
@linux
def test_d28_an_uncaught_panic_ends_in_a_traceback_that_says_it_once() -> None:
    errors = run_worker("native_processes.py", "uncaught_panic", status=1)
    assert errors.count("a bug on purpose: ") == 1
    assert errors.splitlines()[-1].startswith("qkern.errors.NativeError: ")


@pytest.mark.case("D28")
@linux
def test_d28_threads_that_panic_at_once_each_see_their_own() -> None:
    assert run_worker("native_processes.py", "caught_panics") == [True] * 9
