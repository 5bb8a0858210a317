"""Modules that become instances of a class derived from their own.

So a module stays what it was for everybody who asks, and keeps its attributes, hooks and
parameters.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn


class DerivedClass:
    """A class that ``derive`` puts before that of a module.

    Attributes:
        _derived_prefix: what the name of the derived class has before that of the module's own.
    """

    _derived_prefix: ClassVar[str] = "Quantized"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copies, which find no class that was made at run time."""
        return _rebuild, type(self).__bases__, vars(self)


def derive(module: nn.Module, added: Any) -> None:
    """Make a module an instance of a class derived from ``added`` and its own, in place.

    Args:
        module: changed; one that ``derive`` has changed before is no longer what that added.
        added: a ``DerivedClass``.
    """
    module.__class__ = _derived(added, own_class(module))


def restore(module: nn.Module) -> None:
    """Make such a module an instance of its own class again, in place."""
    module.__class__ = own_class(module)


def own_class(module: nn.Module) -> Any:
    """The class that a module had before ``derive``."""
    kind: Any = type(module)
    return kind.__bases__[1] if isinstance(module, DerivedClass) else kind


@functools.cache
def _derived(added: Any, own: Any) -> Any:
    return type(f"{added._derived_prefix}{own.__name__}", (added, own), {})


def _rebuild(added: Any, own: Any) -> Any:
    made = _derived(added, own)
    return made.__new__(made)
