"""D27: what happens to native calls when signals arrive (run by test_native.py)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from types import FrameType

import numpy as np
from native_calls import (
    NESTED,
    OPERATIONS,
    Call,
    exit_above,
    main,
    pool_threads,
    quantize_4bit,
    small_result,
    when_running,
    zeros,
)

import qkern
from qkern import _native


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupt() -> dict[str, float]:
    """Seconds from SIGINT to KeyboardInterrupt, of every operation on one and on two threads."""
    expected, seconds = small_result(), {}
    threads_before = 0
    for operation in OPERATIONS:
        for threads in (1, 2):
            call, out = operation()
            took = seconds_to_interrupt(partial(call, threads=threads), out)
            seconds[f"{operation.__name__} {threads}"] = took
        # A thread that has just been started has no name yet: counted when it has worked.
        threads_before = threads_before or pool_threads()
    # An interrupted call does not keep its arrays: the last one again.
    seconds["again"] = seconds_to_interrupt(partial(call, threads=threads), out)
    absmax = zeros(1 << 34, np.float32)
    codes, nested = zeros(absmax.size, np.uint8), zeros(absmax.size // 256, np.float32)
    call = partial(_native.quantize_absmax, absmax, NESTED, codes, nested, np.empty(1, np.float32))
    seconds["quantize_absmax mean"] = seconds_to_interrupt(call, None)
    assert not codes[0], "it was to be interrupted before it wrote anything"
    assert small_result() == expected
    assert pool_threads() == threads_before
    return seconds


def seconds_to_interrupt(call: Call, out: np.ndarray | None) -> float:
    """Interrupts a call when it writes ``out``, or after a tenth of a second."""
    sent = 0.0

    def interrupt_this() -> None:
        nonlocal sent
        sent = time.perf_counter()
        send(signal.SIGINT)

    if out is None:
        watcher: threading.Thread = threading.Timer(0.1, interrupt_this)
        watcher.start()
    else:
        watcher = when_running(out, interrupt_this)
    try:
        call()
    except KeyboardInterrupt:
        took = time.perf_counter() - sent
    else:
        sys.exit("the call ended before it was interrupted")
    watcher.join()
    return took


def until_interrupted() -> None:
    """A call that a signal from outside ends; says when it runs."""
    call, out = quantize_4bit()
    when_running(out, lambda: print("running", flush=True))
    call(threads=2)


def handlers() -> dict[str, object]:
    """A handler that returns lets the call go on to its end; one that raises ends it."""
    during = []
    call, out = quantize_4bit(1 << 26, simd="scalar")
    out[-1] = 7  # written last
    signal.signal(signal.SIGUSR1, lambda *_: during.append(bool(out[-1] == 7)))
    watcher = when_running(out, lambda: send(signal.SIGUSR1))
    call(threads=1)
    watcher.join()
    complete = bool((out == out[0]).all())

    def raises(*_: object) -> None:
        during.append(small_result() == small_result(1))  # a handler may use the codec
        msg = "enough"
        raise TimeoutError(msg)

    signal.signal(signal.SIGUSR1, raises)
    call, out = quantize_4bit()
    when_running(out, lambda: send(signal.SIGUSR1))
    raised = raised_by(partial(call, threads=2))
    return {"during": during, "complete": complete, "raised": raised}


def doors() -> list[str]:
    """The public functions, ended by a handler that raises while they are in the codec.

    The third time on one line: Python by itself runs a handler there once, after the native call.
    """
    import torch

    from qkern.reference import Parts

    times: Counter[tuple[str, int]] = Counter()

    def alarm(_: int, frame: FrameType | None) -> None:
        assert frame is not None
        place = (frame.f_code.co_name, frame.f_lineno)
        times[place] += 1
        if times[place] == 3 and place[0] in ("encode", "decode"):
            times.clear()
            raise TimeoutError(place[0])

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core: a second and more
    n = 1 << 31
    values = zeros(n, np.uint16)
    tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    parts = Parts(
        torch.from_numpy(zeros(n // 2, np.uint8)),
        torch.from_numpy(zeros(n // 64, np.float32)),
        None,
        None,
    )
    fmt = qkern.QuantFormat("nf4", 64, double_quant=False)
    quantized = qkern.QuantizedTensor.from_parts(parts, fmt, (n // 4096, 4096), torch.bfloat16)
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # seconds: the first, the others
    calls: tuple[Call, ...] = (
        lambda: qkern.quantize(values, dtype="bfloat16"),
        lambda: qkern.quantize(tensor),
        lambda: qkern.dequantize(quantized),
    )
    ended = [raised_by(call) for call in calls]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ended


def raised_by(call: Call) -> str:
    try:
        call()
    except TimeoutError as error:
        return str(error)
    return ""


def other_thread() -> dict[str, bool]:
    """Ctrl-C while another thread is in a native call: that goes on, the main thread does not."""
    call, out = quantize_4bit(1 << 26, simd="scalar")
    out[-1] = 7
    done = threading.Event()

    def work() -> None:
        call(threads=1)
        done.set()

    worker = threading.Thread(target=work)
    when_running(out, lambda: send(signal.SIGINT))
    during = False
    try:
        worker.start()
        # With the GIL as often as Python allows. Not `is_alive`: Python 3.11 takes a thread for
        # ended whose state is asked for when a signal comes.
        while not done.is_set():
            pass
    except KeyboardInterrupt:
        during = bool(out[-1] == 7)
    done.wait()
    worker.join()
    return {"during": during, "complete": bool((out == out[0]).all())}


def exit_during_call() -> None:
    """The interpreter ends while a daemon thread is in a native call that does not."""
    call, out = quantize_4bit()
    running = threading.Event()
    when_running(out, running.set)
    threading.Thread(target=lambda: call(threads=2), daemon=True).start()
    running.wait()
    time.sleep(0.1)  # it has asked for signals once


if __name__ == "__main__":
    exit_above(6)
    main(globals())
