"""bitsandbytes' plug-in, turned on by threads at the same time as bitsandbytes is imported."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qkern.integrations import bitsandbytes as plugin


@pytest.fixture
def off() -> Iterator[None]:
    plugin.disable()
    yield
    plugin.disable()


def test_an_import_that_another_thread_waits_for_can_turn_it_on(
    off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importing thread holds bitsandbytes' import lock and calls ``register``."""
    waiting, done = threading.Event(), threading.Event()
    imports = plugin._import
    monkeypatch.setenv(plugin.VARIABLE, "1")

    def importing(name: str) -> Any:
        if threading.current_thread() is second and name == "bitsandbytes" and not done.is_set():
            waiting.set()  # as for the import lock of the first thread
            assert done.wait(60)
        return imports(name)

    def first() -> None:
        assert waiting.wait(60)
        acquired = plugin._lock.acquire(timeout=20)  # what register() needs
        if acquired:
            plugin._lock.release()
            plugin.register()
        results.append(acquired)
        done.set()

    results: list[bool] = []
    monkeypatch.setattr(plugin, "_import", importing)
    second = threading.Thread(target=plugin.enable)
    threads = [threading.Thread(target=first), second]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True]
    assert plugin.is_enabled()
