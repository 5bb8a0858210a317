"""The optional packages that training needs."""

from __future__ import annotations

import importlib.util

from qkern.errors import MissingDependencyError

TRAINING = ("torch", "transformers", "accelerate", "datasets", "trl", "tqdm", "matplotlib")
GENERATION = ("torch", "transformers")


def require(packages: tuple[str, ...], purpose: str, *, extra: str = "train") -> None:
    """Checks that packages are installed, without importing them.

    Args:
        packages: import names.
        purpose: what they are needed for, as in "training needs ...".
        extra: of qkern, that brings them.

    Raises:
        MissingDependencyError: one or more of them are not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        msg = (
            f"{purpose} needs {', '.join(missing)}, not installed here: "
            f'pip install "qkern[{extra}]"'
        )
        raise MissingDependencyError(msg)
