"""An inspection report as a text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from qkern.text_table import format_bytes, format_table

if TYPE_CHECKING:
    from qkern.checkpoint.inspection_report import InspectionReport, TensorReport

# Findings of one kind that are listed by name.
_FINDINGS_SHOWN: Final = 20

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
        rule = f"coverage, {report.rule}" if report.rule else "coverage"
        parts += [f"{rule}\n{report.coverage}"]
    findings = report.findings()
    if findings:
        lines = [f"  {name}: {text}" for name, text in findings[:_FINDINGS_SHOWN]]
        hidden = len(findings) - len(lines)
        lines += [f"  and {hidden} more (--json lists all)"] if hidden else []
        parts += ["\n".join([f"findings ({len(findings)})", *lines])]
    return "\n\n".join([*parts, _summary(report)])


def _head(report: InspectionReport) -> str:
    numel = sum(row.numel for row in report.tensors)
    nbytes = format_bytes(sum(row.nbytes_stored for row in report.tensors))
    head = f"{report.path}: {len(report.tensors)} tensors, {numel:,} values, {nbytes}"
    if report.comparison is not None:
        return f"{head}\ncompared with {report.comparison.path}, which errors are relative to"
    if report.format is None:
        return f"{head}, as the file holds them"
    fmt = report.format
    scales = "8-bit" if fmt.double_quant else "fp32"
    return (
        f"{head}\nas {fmt.quant_type} in blocks of {fmt.blocksize} with {scales} scales, "
        f"method {report.method}"
    )


def _worst_tensors(report: InspectionReport, top: int) -> str:
    rows, total = report.worst[:top], len(report.worst)
    if report.comparison is not None:
        there = report.comparison.stored_there
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
        headers = ("tensor", "shape", "format", "bits", "least scale", "largest", "ratio in 256")
        headers += ("zero", "bad", "code bits")
        cells = [(row.name, _shape(row), _format(row), _bits(row), *_scales(row)) for row in rows]
    shown = f"{len(rows)} worst of {total}" if len(rows) < total else f"all {total}, worst first"
    return f"tensors ({shown})\n{format_table(cells, headers)}"


def _worst_blocks(report: InspectionReport, top: int) -> str:
    cells = [
        (name, block.block, str(list(block.start)), block.relative_rms, block.absmax)
        for name, block in report.worst_blocks[:top]
    ]
    return f"worst blocks\n{format_table(cells, ('tensor', 'block', 'at', 'rel rms', 'absmax'))}"


def _summary(report: InspectionReport) -> str:
    found = []
    if report.relative_rms is not None:
        found.append(f"relative rms error {report.relative_rms:.4g} over all")
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
    sizes = (_cell(scales.min_abs), _cell(scales.max_abs), _cell(scales.group_ratio))
    return (*sizes, scales.zero, scales.nonfinite, scales.code_entropy)


def _format(row: TensorReport) -> str:
    fmt = row.format
    if fmt is None:
        return row.dtype
    return f"{fmt.quant_type}/{fmt.blocksize}{'' if fmt.double_quant else ' fp32 scales'}"


def _shape(row: TensorReport) -> str:
    return "x".join(map(str, row.shape)) or "()"


def _bits(row: TensorReport) -> Cell:
    return _cell(row.bits_per_weight)


def _cell(value: float | None) -> Cell:
    return "-" if value is None else value
