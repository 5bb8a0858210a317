"""Write the README's table of figures from ``results/*.json``: no figure is typed by hand.

python benches/readme.py            writes README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- figures: benches/readme.py -->", "<!-- end of figures -->"


def render() -> str:
    """The section between the marks, as it should be."""
    content = json.loads((RESULTS / "codec.json").read_text())
    machine = content["machine"]
    cores, packages = machine["cores"], machine["packages"]
    lines = [
        f"Measured on {machine['cpu']}, {cores} cores ({machine['simd']}), "
        f"torch {packages['torch']}, bitsandbytes {packages['bitsandbytes']}: NF4, blocks of 64, "
        f"a {content['rows'][0]['size']}x{content['rows'][0]['size']} weight, medians of one "
        "interleaved run.",
        "",
        "| host codec | dtype | qkern | bitsandbytes | times faster |",
        "|---|---|---|---|---|",
    ]
    theirs = {(r["case"], r["dtype"]): r for r in content["rows"] if r["engine"] == "bitsandbytes"}
    for row in content["rows"]:
        if row["engine"] == "bitsandbytes" or "scalar" in row["engine"]:
            continue
        lines.append(_line(row, theirs[row["case"], row["dtype"]]))
    return "\n".join([*lines, "", *_small_rows(), "", *_methods(), *_cpu()])


def _cpu() -> list[str]:
    """Layers, codec and a model on the CPU: a column for each machine that was measured."""
    files = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu_*.json"))}
    if not files:
        return []
    machines = [content["machine"] for content in files.values()]
    names = [f"{machine['cpu']} ({machine['simd']})" for machine in machines]
    lines = [
        "",
        "`make bench-cpu`: NF4 in blocks of 64 with 8-bit scales, one thread and its CPU time "
        "unless two are named, weights out of the caches; read and NT write are the limits of the "
        "same buffers in the same run.",
    ]
    for name, content in zip(names, files.values(), strict=True):
        lines.append(f"{name}: {_measured_packages(content)}.")
    lines += ["", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    measured: dict[str, list[str]] = {}
    for place, content in enumerate(files.values()):
        for row in content["goals"]:
            if row["measured"] is not None:
                cells = measured.setdefault(row["goal"], [""] * len(files))
                cells[place] = f"{row['measured']:.3g}"
    lines += [f"| {goal} | {' | '.join(cells)} |" for goal, cells in measured.items()]
    for name, path in zip(names, files, strict=True):
        if (picture := path.with_suffix(".svg")).exists():
            what = f"times faster than the unquantized bf16 layer, {name}"
            lines += ["", f"![{what}](benches/results/{picture.name})"]
    return lines


def _measured_packages(content: dict[str, Any]) -> str:
    """What every run depends on, and the peers that this one measured."""
    engines = " ".join(row["engine"] for row in content.get("rows", ())).lower()
    always = ("qkern", "torch", "numpy", "transformers")
    found = content["machine"]["packages"].items()
    named = [(p, v) for p, v in found if v and (p in always or p.partition("-")[0] in engines)]
    return ", ".join(f"{package} {version}" for package, version in named)


def _small_rows() -> list[str]:
    """What each package leaves of small rows, for the largest weight that was measured."""
    content = json.loads((RESULTS / "double_quant.json").read_text())
    size = max(row["size"] for row in content["rows"])
    packages = content["machine"]["packages"]
    versions = ", ".join(f"{p} {packages[p]}" for p in ("bitsandbytes", "torchao", "hqq"))
    lines = [
        f"Every second row of a Gaussian {size}x{size} weight scaled by 1e-3 ({versions}):",
        "",
        "| | relative RMS error, small rows | other rows | bits per weight |",
        "|---|---|---|---|",
    ]
    for row in content["rows"]:
        if row["size"] == size:
            errors = (row[f"relative RMS error, {rows} rows"] for rows in ("small", "other"))
            cells = (row["engine"], *(f"{e:.3f}" for e in errors), f"{row['bits per weight']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _methods() -> list[str]:
    """What the search gains over absmax, and what it costs."""
    content = json.loads((RESULTS / "methods.json").read_text())
    rows = content["rows"]
    lines = [
        'NF4 in blocks of 64 with 8-bit scales, by `method="absmax"` and, in the same bytes, '
        '`method="search"`; the language model is a Llama of 260,000 parameters, '
        f"{next(row['tokens'] for row in rows if 'tokens' in row)} tokens of held-out stories:",
        "",
        "| | dense | absmax | search | search, importance |",
        "|---|---|---|---|---|",
    ]
    kept = [row for row in rows if row.get("double_quant", True)]
    cases: dict[str, dict[str, float]] = {}
    for row in kept:
        case = row["case"] if "tokens" in row else f"{row['case']}, {row['weights']}"
        cases.setdefault(case, {})[row["method"]] = row["value"]
    for case, values in cases.items():
        found = [values.get(m) for m in ("dense", "absmax", "search", "search, importance")]
        cells = ["" if value is None else f"{value:.4g}" for value in found]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _line(row: dict[str, Any], theirs: dict[str, Any]) -> str:
    detail = row["engine"].removeprefix("qkern").lstrip(", ")
    case = f"{row['case']}{f' ({detail})' if detail else ''}"
    ours, base = (f"{1e3 * r['median']:.1f} ms" for r in (row, theirs))
    ratio = row["times faster than bitsandbytes"]
    return f"| {case} | {row['dtype']} | {ours} | {base} | {ratio:.1f} |"


def updated(text: str) -> str:
    """``text`` with the section replaced."""
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
