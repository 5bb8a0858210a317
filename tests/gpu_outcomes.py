"""A plug-in of pytest for runs on a GPU, where minutes count: nothing is lost by what goes wrong.

    pytest -p gpu_outcomes --outcomes FILE

FILE gets a line of JSON for each test when it ends, with the text of a failure, so that a run that
is cut short says what it found. An access out of bounds, or a graph whose capture failed, makes all
that a process does on the device afterwards fail too: after a failed test the device is asked. If
it does not answer, the process ends, and pytest-xdist starts another (this test is then reported
once more, as one that crashed it); without pytest-xdist the run stops.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

DEVICE_LOST = 70  # exit status
PATIENCE = 20  # seconds for the device to answer
_TEXT = 6000  # of a failure, from its end


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file."""
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    """In every process; the one that others report to writes."""
    path: Path | None = config.getoption("--outcomes")
    is_worker = hasattr(config, "workerinput")
    config.pluginmanager.register(_Watch(None if is_worker else path, is_worker=is_worker))


class _Watch:
    """Of one process."""

    def __init__(self, path: Path | None, *, is_worker: bool) -> None:
        self.path, self.is_worker, self.failed = path, is_worker, False
        self.start = time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed
        if self.path is None or (report.passed and report.when != "call"):
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "when": report.when,
            "seconds": round(report.duration, 3),
            "at": round(time.monotonic() - self.start, 1),
            "process": getattr(report, "worker_id", ""),
        }
        if not report.passed:
            line["text"] = str(report.longrepr)[-_TEXT:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.failed = False
        result = yield  # its reports are on their way when this returns
        if self.failed and (reason := lost()):
            if self.is_worker:
                print(f"{item.nodeid}: the device is lost: {reason}", file=sys.__stderr__)
                os._exit(DEVICE_LOST)
            item.session.shouldstop = f"the device is lost: {reason}"
        return result


def lost() -> str:
    """Why this process can use its device no more; empty if it can."""
    if not torch.cuda.is_initialized():
        return ""
    reasons = [f"no answer within {PATIENCE} s"]

    def ask() -> None:
        try:
            torch.rand(1, device="cuda")  # fails after a failed capture
            torch.cuda.synchronize()
        except RuntimeError as error:
            reasons[0] = str(error).strip().splitlines()[0]
        else:
            reasons[0] = ""

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reasons[0]
