"""Shared fixtures: seeds, hypothesis profiles, small real data where it is at hand.

After a run: what tests had to tell, the largest errors of kernels, and the ids of the reliability
cases (``@pytest.mark.case("A1")``) that it covered; of all processes of pytest-xdist.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Kernels run in Triton's interpreter, unless QKERN_TEST_DEVICE names a GPU. Triton reads this when
# it is imported, which torch and others do; what compiles kernels unsets it in its own process.
if os.environ.get("QKERN_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.pop("TRITON_INTERPRET", None)

try:
    import torch
except ImportError:  # the tests of the NumPy door run without torch
    torch = None  # type: ignore[assignment]

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis: few examples here, more with HYPOTHESIS_PROFILE=thorough."""
    gc.disable()  # until all is imported
    # A shell starts what it does not wait for with interrupts ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import hypothesis

    hypothesis.settings.register_profile("dev", max_examples=25, deadline=None, derandomize=True)
    hypothesis.settings.register_profile("thorough", max_examples=300, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
    if torch is not None:
        # The models here are tiny: a second thread costs more than it gives, and much more
        # on a machine that is busy with something else.
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: else that takes a fifth of the time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """As it was, for what looks at its own leaks when Python ends."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write each test's case ids where its reports carry them."""
    for item in items:
        for case in (case for mark in item.iter_markers("case") for case in mark.args):
            if not (isinstance(case, str) and re.fullmatch(r"[A-E][1-9][0-9]?", case)):
                msg = f"{item.nodeid}: {case!r} is not the id of a case, such as A1"
                raise pytest.UsageError(msg)
            item.user_properties.append(("case", case))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand kernels' errors over, from a process of pytest-xdist."""
    kernel_errors, output = sys.modules.get("kernel_errors"), workeroutput(session.config)
    if kernel_errors is not None and output is not None:
        output["kernel_errors"] = kernel_errors.dump()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take them from it."""
    if errors := (workeroutput(node) or {}).get("kernel_errors"):
        import kernel_errors

        kernel_errors.add(errors)


def workeroutput(holder: Any) -> dict[str, Any] | None:
    """What a process of pytest-xdist leaves; None in the only one."""
    output: dict[str, Any] | None = getattr(holder, "workeroutput", None)
    return output


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was told; kernels' errors; the cases whose tests all passed, and those that did not."""
    reports = [r for each in terminalreporter.stats.values() for r in each]
    properties = [p for report in reports for p in getattr(report, "user_properties", ())]
    if told := dict.fromkeys(text for key, text in properties if key == "told"):
        terminalreporter.section("what was compared")
        for text in sorted(told):
            terminalreporter.write_line(text)
    kernel_errors = sys.modules.get("kernel_errors")  # it needs torch
    if kernel_errors is not None and kernel_errors.FOUND:
        terminalreporter.section("largest errors of kernels against fp64")
        for line in kernel_errors.lines():
            terminalreporter.write_line(line)
    outcomes: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, case in getattr(report, "user_properties", ()):
                if key == "case":
                    outcomes.setdefault(case, set()).add(outcome)
    if not outcomes:
        return
    cases = sorted(outcomes, key=lambda case: (case[0], int(case[1:])))
    good = [case for case in cases if outcomes[case] == {"passed"}]
    terminalreporter.section("reliability cases")
    terminalreporter.write_line(f"passed, {len(good)}: {' '.join(good) or 'none'}")
    if len(good) < len(cases):
        rest = [f"{case} ({', '.join(sorted(outcomes[case]))})" for case in cases]
        rest = [text for case, text in zip(cases, rest, strict=True) if case not in good]
        terminalreporter.write_line(f"failed or skipped, {len(rest)}: {' '.join(rest)}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line, or several in one text, at the end of the run."""
    return lambda text: request.node.user_properties.append(("told", text))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has none: else quantized models are loaded onto it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_plugin() -> Iterator[None]:
    """bitsandbytes' operators are qkern's."""
    from qkern.integrations import bitsandbytes as plugin

    plugin.enable()
    yield
    plugin.disable()


@pytest.fixture
def without_plugin() -> Iterator[None]:
    """bitsandbytes by itself, whatever ran before and whatever the test switches."""
    from qkern.integrations import bitsandbytes as plugin

    plugin.disable()
    yield
    plugin.disable()


@pytest.fixture
def shared_data() -> Path:
    """The folder of small real models and texts beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no small real model beside the checkout ({SHARED.name}/)")
    return SHARED
