"""bitsandbytes' programs on a CPU by qkern's codec, with nothing changed in them. Opt-in.

    QKERN_BITSANDBYTES=1 python program.py           what imports bitsandbytes then computes by it

    from qkern.integrations import bitsandbytes      or from within a program
    bitsandbytes.enable()

bitsandbytes imports every package that names an entry point in the group ``bitsandbytes.backends``
and calls it: here ``register``, which does nothing unless the variable asks for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qkern.errors import FormatError, MissingDependencyError

if TYPE_CHECKING:
    from torch.library import Library

VARIABLE: Final = "QKERN_BITSANDBYTES"
GROUP: Final = "bitsandbytes.backends"
_ENTRY: Final = f"{__name__}:register"
# What is replaced, if the installed bitsandbytes has it; a test holds the list to the kernels.
OPERATORS: Final = (
    "quantize_4bit",
    "dequantize_4bit",
    "dequantize_4bit.out",
    "dequantize_blockwise.out",
    "gemm_4bit",
    "gemv_4bit",
    "gemv_4bit.out",
    "int8_vectorwise_quant",
)
# Of ``bitsandbytes.nn.Linear4bit``: whether its first forward in eval mode repacks the weight for
# bitsandbytes' own kernel, which changes what is saved then and refuses some shapes.
_REPACKS: Final = "support_avx512bf16_for_cpu"

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Status(NamedTuple):
    """Of the plug-in, as ``qkern doctor`` shows it.

    Args:
        version: of the installed bitsandbytes, None without one.
        is_on: whether programs of this environment that import bitsandbytes compute by qkern.
        why: what decides that, or what is missing.
        operators: of ``torch.ops.bitsandbytes``, which are replaced then.
    """

    version: str | None
    is_on: bool
    why: str
    operators: tuple[str, ...]


class _Enabled(NamedTuple):
    library: Library  # torch takes its kernels back when this goes
    operators: tuple[str, ...]


# One at most: what is enabled now.
_state: list[_Enabled] = []


def enable() -> tuple[str, ...]:
    """Let qkern compute bitsandbytes' operators on the CPU in this process.

    Layers that exist take part from their next call on. What bitsandbytes writes stays the same,
    byte for byte. ``Linear4bit`` no longer repacks its weight at the first forward in eval mode.
    Called twice it does nothing the second time.

    Returns:
        The names of the operators of ``torch.ops.bitsandbytes`` that are replaced.

    Raises:
        MissingDependencyError: without bitsandbytes, torch or qkern's native extension, or with a
            bitsandbytes that has none of these operators.
    """
    # Not under the lock: what imports bitsandbytes holds its import lock, and calls register().
    torch, bnb = _import("torch"), _import("bitsandbytes")
    kernels = _import("qkern.integrations.bitsandbytes_kernels").KERNELS
    with _lock:
        if _state:
            return _state[0].operators
        known = {name: kernels[name] for name in OPERATORS if _exists(torch, name)}
        if "dequantize_4bit" not in known:
            msg = (
                f"bitsandbytes {_version()} has no operators that a back end can replace: "
                "install 0.46 or newer"
            )
            raise MissingDependencyError(msg)
        library = torch.library.Library("bitsandbytes", "IMPL")
        for name, kernel in known.items():
            # As torch.library.register_kernel does: a compiler must not look inside.
            _register(library, name, torch.compiler.disable(kernel))
        setattr(bnb.nn.Linear4bit, _REPACKS, _never(_REPACKS))
        _state.append(_Enabled(library, tuple(known)))
        _log.info("qkern computes %s of bitsandbytes on the CPU", ", ".join(known))
        return tuple(known)


def disable() -> None:
    """Give bitsandbytes its own kernels back; without effect if they are in place."""
    with _lock:
        if _state:
            delattr(_import("bitsandbytes").nn.Linear4bit, _REPACKS)
            _state.clear()


def is_enabled() -> bool:
    """Whether qkern computes bitsandbytes' operators in this process."""
    return bool(_state)


def status() -> Status:
    """What the plug-in does, or would do, here. Imports neither torch nor bitsandbytes."""
    version = _version()
    if _state:
        return Status(version, True, "enable() was called", _state[0].operators)
    try:
        if version is None:
            is_on, why = False, "bitsandbytes is not installed"
        elif not _is_requested():
            is_on, why = False, f"{VARIABLE}=1 or a call of enable() turns it on"
        elif any(entry.value == _ENTRY for entry in importlib.metadata.entry_points(group=GROUP)):
            is_on, why = True, f"{VARIABLE}=1"
        else:
            is_on, why = (
                False,
                "qkern runs from its source: bitsandbytes finds installed ones alone",
            )
    except FormatError as error:
        is_on, why = False, str(error)
    return Status(version, is_on, why, OPERATORS)


def register() -> None:
    """The entry point: ``enable()`` if the environment variable QKERN_BITSANDBYTES is 1.

    Never raises: an error here would be one of ``import bitsandbytes``. It is logged.
    """
    try:
        if _is_requested():
            enable()
    except Exception as error:  # whatever it is, bitsandbytes must import
        _log.warning("bitsandbytes computes by itself, qkern's plug-in is off: %s", error)


def _is_requested() -> bool:
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        msg = f"{VARIABLE} is {choice!r}: allowed are 1 (on), 0 and nothing (off)"
        raise FormatError(msg)
    return choice == "1"


def _register(library: Library, name: str, kernel: Callable[..., Any]) -> None:
    """Put a CPU kernel over the one that is there, which returns when the library goes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
        torch_library: Any = library
        if "allow_override" in inspect.signature(torch_library.impl).parameters:
            torch_library.impl(name, kernel, "CPU", allow_override=True)
        else:  # of an older torch `impl` refuses a second kernel from Python, its dispatcher not
            torch_library.m.impl(name, "CPU", kernel, False)


def _never(name: str) -> property:
    """An attribute that reads as False, and keeps what is assigned for when it is taken away."""

    def assign(layer: Any, value: object) -> None:
        layer.__dict__[name] = value

    return property(lambda layer: False, assign)


def _exists(torch: Any, name: str) -> bool:
    packet, _, overload = name.partition(".")
    operator = getattr(torch.ops.bitsandbytes, packet, None)
    return operator is not None and (overload or "default") in operator.overloads()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        needs = 'pip install "qkern[torch]" bitsandbytes'
        msg = f"the bitsandbytes plug-in needs {name}: {error}; {needs}"
        raise MissingDependencyError(msg) from error


def _version() -> str | None:
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return None
