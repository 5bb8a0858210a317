"""Plain-text tables for reports and commands."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Columns padded to their widest cell; numbers to the right, text to the left.

    Args:
        rows: the cells; every row has the same length.
        headers: column titles, none for a table without a head.

    Example:
        >>> print(format_table([("q_proj", 4096), ("lm_head", 12)], ("name", "rows")))
        name     rows
        -------  ----
        q_proj   4096
        lm_head    12
    """
    cells = [[_show(cell) for cell in row] for row in rows]
    if headers:
        cells.insert(0, list(headers))
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(widths))
    ]
    if headers:
        cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(count: float) -> str:
    """``count`` bytes in the largest binary unit that keeps it at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _show(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
