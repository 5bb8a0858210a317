"""Writes checkpoints in a process of its own, under limits (run by tests of what is written).

    python writing_worker.py '{"src": ..., "dst": ..., "settings": {...}}'
    python writing_worker.py '{"command": "merge", "src": ..., "adapter": ..., "dst": ...}'

Prints one JSON object a line: what became of each call. Does not import torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from file_trees import tree

import qkern

# What these import is no part of a call.
COMMANDS = {
    "quantize": qkern.quantize_checkpoint,
    "convert": qkern.convert_checkpoint,
    "merge": qkern.merge_checkpoint,
}

_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def kill_at_event(number: int) -> None:
    """End like ``kill -9`` at a file operation, counted from here; threads do not count."""
    count, main_thread = 0, threading.get_ident()

    def hook(event: str, _: Any) -> None:
        nonlocal count
        if event in _FILE_EVENTS and threading.get_ident() == main_thread:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_events() -> list[int]:
    counts = [0]

    def hook(event: str, _: Any) -> None:
        counts[0] += event in _FILE_EVENTS

    sys.addaudithook(hook)
    return counts


def call(task: dict[str, Any]) -> dict[str, Any]:
    if "file_size" in task:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_size"], hard))
    places = [task[place] for place in ("src", "adapter", "dst") if place in task]
    try:
        COMMANDS[task.get("command", "quantize")](*places, **task.get("settings", {}))
    except (qkern.QkernError, OSError, MemoryError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        if "file_size" in task:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    return {"error": None}


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for text in sys.argv[1:]:
        task = json.loads(text)
        if "memory" in task:
            limit = address_space() + task["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if "kill_at" in task:
            kill_at_event(task["kill_at"])
        counts = count_events() if task.get("count") else [0]
        answer = call(task)
        assert "torch" not in sys.modules
        dst = Path(task["dst"])
        left = tree(dst) if dst.exists() and "memory" not in task else None
        print(json.dumps(answer | {"events": counts[0], "left": left}), flush=True)


if __name__ == "__main__":
    print("started", flush=True)
    main()
