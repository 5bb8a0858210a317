"""An inspection report as a text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from qkern.text_table import format_bytes, format_table

if TYPE_CHECKING:
    from qkern.checkpoint.inspection_report import InspectionReport
    from qkern.checkpoint.tensor_report import TensorReport
    from qkern.formats import QuantFormat

# Findings of one kind that are listed by name.
_FINDINGS_SHOWN: Final = 20

_NOTE_TRIAL: Final = """\
rel rms is ||w - w'|| / ||w||; bits include the scales. Of the weights before: kurtosis (a normal
distribution has 3), crest (largest / rms), how many are beyond {outlier_rms:g} times their rms."""
_NOTE_COMPARISON: Final = """\
rel rms is ||w - w'|| / ||w||, with w from there and w' from here; max abs the largest |w - w'|."""
_NOTE_STORED: Final = """\
bits include the scales. Scales are negative where the method "search" chose so, unless findings
below say more; bad are those that are NaN or infinite. code bits is the entropy of the codes."""
_NOTE_RATIO: Final = """
ratio in 256: of the largest scale to the least in a group that 8-bit scales must bridge."""

Cell: TypeAlias = float | int | str


def render(report: InspectionReport, top: int = 10) -> str:
    """The report as a text.

    Args:
        report: of ``inspect_checkpoint``.
        top: tensors and blocks to show, worst first.
    """
    parts = [_head(report)]
    if report.worst and top:
        parts += [_worst_tensors(report, top)]
    if report.worst_blocks and top:
        parts += [_worst_blocks(report, top)]
    if report.comparison is None:
        rule = f"coverage, {report.rule or 'as stored; reasons are guessed from names and shapes'}"
        parts += [f"{rule}\n{report.coverage}"]
    findings = report.findings()
    if findings:
        lines = [f"  {name}: {text}" for name, text in findings[:_FINDINGS_SHOWN]]
        hidden = len(findings) - len(lines)
        lines += [f"  and {hidden} more (--json lists all)"] if hidden else []
        parts += ["\n".join([f"findings ({len(findings)})", *lines])]
    return "\n\n".join([*parts, _summary(report)])


def format_text(fmt: QuantFormat) -> str:
    """A format in words."""
    if fmt.kind.per_row:
        return f"{fmt.quant_type} with an fp32 scale a row"
    scales = "8-bit" if fmt.double_quant else "fp32"
    return f"{fmt.quant_type} in blocks of {fmt.blocksize} with {scales} scales"


def _head(report: InspectionReport) -> str:
    numel = sum(row.numel for row in report.tensors)
    nbytes = format_bytes(sum(row.nbytes_stored for row in report.tensors))
    head = f"{report.path}: {len(report.tensors)} tensors, {numel:,} values, {nbytes}"
    if report.comparison is not None:
        head += f"\ncompared with {report.comparison.path}, which errors are relative to"
        count = len(report.comparison.transposed)
        if count:
            head += f"\n{count} tensors are transposed in one of the two: compared as (out, in)"
        return head
    if report.format is None:
        return f"{head}, as the file holds them"
    return f"{head}\nas {format_text(report.format)}, method {report.method}"


def _worst_tensors(report: InspectionReport, top: int) -> str:
    rows, total = report.worst[:top], len(report.worst)
    order, note = "rel rms", _NOTE_TRIAL.format(outlier_rms=report.outlier_rms)
    if report.comparison is not None:
        there, note = report.comparison.stored_there, _NOTE_COMPARISON
        headers: tuple[str, ...] = ("tensor", "shape", "here", "there", "rel rms", "max abs")
        cells = [
            (row.name, _shape(row), row.stored_as, there.get(row.name, "-"), *_error(row))
            for row in rows
        ]
    elif report.format is not None:
        outliers = f">{report.outlier_rms:g} rms"
        headers = ("tensor", "shape", "rel rms", "max abs", "bits", "kurtosis", "crest", outliers)
        cells = [(row.name, _shape(row), *_error(row), _bits(row), *_values(row)) for row in rows]
    else:
        headers = ("tensor", "shape", "format", "bits", "least scale", "largest", "zero")
        headers += ("negative", "bad", "code bits")
        cells = [(row.name, _shape(row), _format(row), _bits(row), *_scales(row)) for row in rows]
        order, note = "code bits", _NOTE_STORED
        if any(row.scales and row.scales.group_ratio for row in rows):
            order, note = "ratio in 256", _NOTE_STORED + _NOTE_RATIO
            headers = (*headers, order)
            ratios = [_cell(row.scales.group_ratio if row.scales else None) for row in rows]
            cells = [(*cell, ratio) for cell, ratio in zip(cells, ratios, strict=True)]
    shown = f"{len(rows)} worst of {total}" if len(rows) < total else f"all {total}, worst first"
    return f"tensors ({shown}, by {order})\n{format_table(cells, headers)}\n{note}"


def _worst_blocks(report: InspectionReport, top: int) -> str:
    """Blocks, or rows where these are the blocks of all tensors."""
    errors = {row.name: row.error for row in report.tensors if row.error is not None}
    found = report.worst_blocks[:top]
    block = "row" if all(errors[name].per_row for name, _ in found) else "block"
    cells = [
        (name, each.block, errors[name].blocksize, str(list(each.start)), each.relative_rms,
         each.absmax)
        for name, each in found
    ]  # fmt: skip
    headers = ("tensor", block, "values", "from", "rel rms", "absmax")
    return f"worst {block}s\n{format_table(cells, headers)}"


def _summary(report: InspectionReport) -> str:
    found = []
    if report.relative_rms is not None:
        measured = sum(row.error is not None for row in report.tensors)
        quantized = len(report.measured_quantized)
        errors = [f"{report.relative_rms:.4g} over all {measured} tensors"]
        if quantized:
            over = f"over the {quantized} quantized tensors"
            errors = [f"{report.quantized_relative_rms:.4g} {over}", *errors]
        found.append(f"relative rms error {', '.join(errors[: 1 + (quantized < measured)])}")
    if report.comparison is None:
        if report.quantized_bits_per_weight is not None:
            found.append(f"{report.quantized_bits_per_weight:.3f} bits per quantized weight")
        if report.bits_per_weight is not None:
            found.append(f"{report.bits_per_weight:.3f} bits per value of the checkpoint")
    elif report.relative_rms is None:
        found.append("no tensor has a counterpart of the same name and shape")
    return "; ".join(found) or "no values"


def _error(row: TensorReport) -> tuple[Cell, ...]:
    return ("-", "-") if row.error is None else (row.error.relative_rms, row.error.max_abs)


def _values(row: TensorReport) -> tuple[Cell, ...]:
    if row.values is None:
        return ("-",) * 3
    values = row.values
    return _cell(values.kurtosis), _cell(values.crest_factor), values.outliers


def _scales(row: TensorReport) -> tuple[Cell, ...]:
    scales = row.scales
    if scales is None:
        return ("-",) * 6
    sizes = (_cell(scales.min_abs), _cell(scales.max_abs))
    return (*sizes, scales.zero, scales.negative, scales.nonfinite, scales.code_entropy)


def _format(row: TensorReport) -> str:
    fmt = row.format
    if fmt is None:
        return row.dtype
    if fmt.kind.per_row:
        return fmt.quant_type
    return f"{fmt.quant_type}/{fmt.blocksize}{'' if fmt.double_quant else ' fp32 scales'}"


def _shape(row: TensorReport) -> str:
    return "x".join(map(str, row.shape)) or "()"


def _bits(row: TensorReport) -> Cell:
    return _cell(row.bits_per_weight)


def _cell(value: float | None) -> Cell:
    return "-" if value is None else value
