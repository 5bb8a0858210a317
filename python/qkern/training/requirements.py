"""The optional packages that training needs."""

from __future__ import annotations

import importlib.util

from qkern.errors import MissingDependencyError

TRAINING = ("torch", "transformers", "accelerate", "datasets", "trl", "tqdm", "matplotlib")
GENERATION = ("torch", "transformers")


def require(packages: tuple[str, ...], purpose: str) -> None:
    """Checks that packages are installed, without importing them.

    Args:
        packages: import names.
        purpose: what they are needed for, as in "training needs ...".

    Raises:
        MissingDependencyError: one or more of them are not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        msg = (
            f'{purpose} needs {", ".join(missing)}, not installed here: pip install "qkern[train]"'
        )
        raise MissingDependencyError(msg)
