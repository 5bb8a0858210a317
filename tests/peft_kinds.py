"""PEFT's adapter kinds over a quantized model, and the table of them in ``docs/peft.md``.

    python tests/peft_kinds.py      measures all kinds, writes the table

Bytes changed: of codes and scales of the layers that a kind adapts, after some training, a merge
and PEFT's own unmerge.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from peft import PeftModel
from peft_kind_settings import KINDS, NO_WEIGHTS, Kind
from torch import Tensor, nn

import qkern

DOCUMENT = Path(__file__).parents[1] / "docs" / "peft.md"
START, END = "<!-- kinds: tests/peft_kinds.py -->", "<!-- end of kinds -->"


@dataclasses.dataclass
class Result:
    """What one kind did.

    Args:
        losses: of the steps.
        moved: share of the trainable tensors that changed.
        base_kept: whether training left codes and scales as they were.
        reload_error: largest difference of the logits of a reloaded model.
        dense_error: the same of stock PEFT over the dense values of the base.
        disabled_error: of the model with its adapter disabled, to the base.
        merge_refused: PEFT's words.
        merged_as_dense: whether all merged weights are the quantized ones of the dense merge.
        unmerge_refused: PEFT's words.
        bytes_changed: share, after merge and unmerge.
    """

    losses: list[float]
    moved: float
    base_kept: bool
    reload_error: float
    dense_error: float
    disabled_error: float
    merge_refused: str = ""
    merged_as_dense: bool = False
    unmerge_refused: str = ""
    bytes_changed: float = 0.0


def measure(kind: Kind, folder: Path) -> Result:
    """Train, save, reload over quantized and dense weights, merge and unmerge.

    Args:
        kind: what to do it with.
        folder: for its files.
    """
    model = kind.adapted()
    trainable = [p for p in model.parameters() if p.requires_grad]
    start, base = [p.detach().clone() for p in trainable], parts_of(model)
    losses = kind.train(model)
    moved = sum(not torch.equal(a, b) for a, b in zip(start, trainable, strict=True)) / len(start)
    base_kept = changed(base, parts_of(model)) == 0
    expected = kind.logits(model)
    plain = kind.logits_of_base()
    disabled = plain
    if not kind.call:  # else the base does not take the call's arguments
        with model.disable_adapter():
            disabled = kind.logits(model)
    model.save_pretrained(folder)
    reloaded = dense = model
    if kind.prepare is None:  # else PEFT changed the base by what is not in the file
        reloaded = PeftModel.from_pretrained(kind.quantized(), folder)
        dense = PeftModel.from_pretrained(densed(kind.quantized()), folder)
    result = Result(
        losses,
        moved,
        base_kept,
        reload_error=float((kind.logits(reloaded) - expected).abs().max()),
        dense_error=float((kind.logits(dense) - expected).abs().max()),
        disabled_error=float((disabled - plain).abs().max()),
    )
    before = parts_of(reloaded)
    try:
        reloaded.merge_adapter()
        if dense is not model:
            dense.merge_adapter()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        result.merge_refused = f"{type(error).__name__}: {error}"
        return result
    result.merged_as_dense = dense is not model and _merged_as_dense(reloaded, dense)
    try:
        reloaded.unmerge_adapter()
    except NotImplementedError as error:
        result.unmerge_refused = f"{type(error).__name__}: {error}"
    result.bytes_changed = changed(before, parts_of(reloaded))
    return result


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, qkern.QuantizedLinear]]:
    """By the path that they have without adapters."""
    for path, layer in model.named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            yield path.removeprefix("base_model.model.").removesuffix(".base_layer"), layer


def parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Codes and scales of the adapted layers; of all if there are none."""
    adapted = {
        name: [part.clone() for part in layer.weight.parts if part is not None]
        for name, layer in quantized_layers(model)
    }
    paths = {path for path, _ in model.named_modules() if path.endswith(".base_layer")}
    wrapped = {path.removeprefix("base_model.model.").removesuffix(".base_layer") for path in paths}
    return {name: adapted[name] for name in wrapped & adapted.keys()} or adapted


def changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> float:
    """Share of the bytes that differ."""
    different = total = 0
    for name, parts in before.items():
        for old, new in zip(parts, after[name], strict=True):
            differs = old.reshape(-1).view(torch.uint8) != new.reshape(-1).view(torch.uint8)
            different += int(differs.sum())
            total += differs.numel()
    return different / total


def densed(model: nn.Module) -> nn.Module:
    """The same model with dense layers of the same values."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, layer.dequantize())
    return model


def _merged_as_dense(model: nn.Module, dense: nn.Module) -> bool:
    equal = []
    for path, layer in model.named_modules():
        if isinstance(layer, qkern.QuantizedLinear) and path.endswith(".base_layer"):
            weight = dense.get_submodule(path).weight.data
            fmt = layer.weight.format
            equal.append(torch.equal(qkern.quantize(weight, fmt).packed, layer.weight.packed))
    return all(equal)


def row(kind: Kind, result: Result) -> str:
    """A line of the table."""
    refused = result.merge_refused or result.unmerge_refused
    merges = "no" if result.merge_refused else "yes"
    changed_bytes = f"{result.bytes_changed:.0%}" if result.bytes_changed else "none"
    note = refused.partition(": ")[2].partition(". ")[0].partition(":")[0] or refused.rstrip(": ")
    if kind.merges == NO_WEIGHTS:
        note = "adapts no weights"
    if kind.prepare is not None:
        note = "its start is in no file: save with `path_initial_model_for_weight_conversion`"
    return f"| {kind.name} | {merges} | {'' if refused else changed_bytes} | {note} |"


def main() -> None:
    """Write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"PEFT {peft.__version__}, torch {torch.__version__.partition('+')[0]}, NF4 in blocks of "
        "64 with 8-bit scales, a Llama of one layer of width 64, four steps of AdamW.",
        "",
        "| kind | merges | bytes changed after unmerge | PEFT's reason |",
        "|---|---|---|---|",
    ]
    for kind in KINDS.values():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(kind, measure(kind, Path(folder))))
        print(lines[-1], flush=True)
    text = DOCUMENT.read_text()
    head, tail = text.partition(START)[0], text.partition(END)[2]
    DOCUMENT.write_text("\n".join([head + START, *lines, END]) + tail)


if __name__ == "__main__":
    main()
