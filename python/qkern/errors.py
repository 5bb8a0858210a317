"""What qkern raises.

Every error says what was found, where, what is allowed, and what to do next. Each class is also
the builtin that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class QkernError(Exception):
    """Base of everything that qkern raises on purpose."""


class FormatError(QkernError, ValueError):
    """A quantization format that does not exist, or a setting that it does not allow."""


class ShapeError(QkernError, ValueError):
    """A tensor whose shape does not fit the operation or the layer."""


class DTypeError(QkernError, TypeError):
    """A type or dtype that cannot be used, or that was asked for and is not supported."""


class ArgumentError(QkernError, TypeError):
    """An argument that a call does not take, or takes by another name."""


class DeviceError(QkernError, RuntimeError):
    """Tensors of one operation on different devices."""


class NonFiniteError(QkernError, ValueError):
    """NaN or infinity among the values to quantize."""


class CoverageError(QkernError, ValueError):
    """Too few of a model's weights were quantized."""


class CorruptFileError(QkernError, ValueError):
    """A file whose content contradicts itself."""


class OutputError(QkernError, OSError):
    """A place that cannot be written to, or that holds what must not be overwritten."""


class OutOfSpaceError(OutputError):
    """No room left for a file: a full disk, a quota, or a limit on the size of files."""


class LockedError(OutputError):
    """A directory that another process is writing."""


class StateDictError(QkernError, RuntimeError):
    """Entries of a ``state_dict`` that do not fit the quantized layer they are loaded into."""


class AdapterMismatchError(QkernError, ValueError):
    """An adapter that does not belong to the model at hand."""


class LostDeltaError(QkernError, ValueError):
    """A merge whose quantized result keeps too little of what the adapter adds."""


class DataError(QkernError, ValueError):
    """Training data that cannot be used as it is."""


class MissingDependencyError(QkernError, ImportError):
    """An optional package that this call needs is not installed."""


class NativeError(QkernError, RuntimeError):
    """The native extension cannot do what was asked on this machine, or met a bug of its own."""


class FrozenWeightError(QkernError, RuntimeError):
    """A quantized weight was asked for something that only a trainable one can do."""
