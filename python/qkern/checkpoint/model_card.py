"""The section of a model card (README.md) that says how a checkpoint was quantized. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from qkern.checkpoint.inspection_text import format_text
from qkern.checkpoint.merge_report import MergeReport
from qkern.checkpoint.quantization_report import QuantizationReport
from qkern.merge_loss import share_text
from qkern.text_table import format_bytes

_BEGIN: Final = "<!-- qkern: begin -->"
_END: Final = "<!-- qkern: end -->"
_SHOWN: Final = 10  # rows of a table


def with_section(card: str, section: str) -> str:
    """The card with the section in place of an older one, or at its end."""
    block = f"{_BEGIN}\n{section.strip()}\n{_END}"
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda _: block, card, count=1)
    return f"{card.rstrip()}\n\n{block}\n".lstrip()


def section_of(report: QuantizationReport) -> str:
    """The section, in Markdown: the same for the same weights and settings."""
    from qkern import __version__

    coverage = report.coverage
    lines = [
        "## Quantization",
        "",
        f"The weights were quantized by qkern {__version__} as {format_text(report.format)}, "
        f"method {report.method}: {len(coverage.quantized)} of {len(coverage.rows)} tensors, "
        f"{coverage.coverage:.1%} of the values, {format_bytes(coverage.bytes_before)} to "
        f"{format_bytes(coverage.bytes_after)}.",
    ]
    if report.relative_rms is not None:
        lines += [
            "",
            f"The relative RMS error of the quantized weights is {report.relative_rms:.4g}, "
            "measured on parts that are spread over each tensor. The largest ones:",
            "",
            *_table(
                ("tensor", "relative RMS error", "largest error"),
                [
                    (f"`{row.name}`", f"{row.relative_rms:.4g}", f"{row.errors.max_error:.4g}")
                    for row in report.worst[:_SHOWN]
                    if row.errors is not None
                ],
            ),
        ]
    reasons: dict[str, int] = {}
    for row in coverage.rows:
        if row.reason:
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
    if reasons:
        shown = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
        rows = [(str(count), reason) for reason, count in shown]
        lines += ["", "Not quantized, or not as the rest:", "", *_table(("tensors", "why"), rows)]
    return "\n".join(lines)


def conversion_section(to: str, summary: Sequence[tuple[Any, ...]]) -> str:
    """The section of a converted checkpoint; ``summary`` is that of its report."""
    from qkern import __version__

    rows = [tuple(str(cell) for cell in row) for row in summary]
    headers = ("what", "from", "to", "tensors", "before", "after")
    lines = [
        "## Conversion",
        "",
        f"The tensors were written as {to} by qkern {__version__}:",
        "",
        *_table(headers, rows),
    ]
    return "\n".join(lines)


def merge_section(report: MergeReport) -> str:
    """The section of a checkpoint that an adapter was merged into."""
    from qkern import __version__

    lines = [
        "## Merged adapter",
        "",
        f"An adapter was added to {len(report.merged)} weights by qkern {__version__}, and the "
        f"sums were written as {report.to}.",
    ]
    if report.kept is not None:
        lines += [
            "",
            f"{share_text(report.kept)} of what it adds is kept, as 1 - |rounded - exact| / "
            "|delta|. The least of:",
            "",
            *_table(
                ("tensor", "rank", "delta / weight", "kept"),
                [(f"`{row[0]}`", *map(str, row[1:])) for row in report.kept_rows(_SHOWN)],
            ),
        ]
    return "\n".join(lines)


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [headers, tuple("---" for _ in headers), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
