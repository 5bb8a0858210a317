"""The files beside the weights of a checkpoint: index, config, card, copies. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkern.checkpoint.model_card import with_section
from qkern.checkpoint.output_plan import CARD_NAME, CONFIG_NAME, OutputPlan
from qkern.checkpoint.quantization_config import quantization_config
from qkern.checkpoint.source import INDEX_NAME, natural_order
from qkern.formats import QuantFormat


def write_other_files(
    plan: OutputPlan,
    folder: Path,
    sizes: Mapping[str, Mapping[str, int]],
    *,
    config: Mapping[str, Any],
    section: str,
) -> None:
    """Write all of ``plan.names`` but the shards.

    Args:
        plan: of the checkpoint.
        folder: to write to.
        sizes: bytes of every entry, by shard and key.
        config: content of config.json.
        section: of the card.
    """
    source = plan.directory
    for name in plan.others.carried:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    if plan.is_sharded:
        weight_map = {key: shard for shard, keys in sizes.items() for key in keys}
        total = sum(sum(keys.values()) for keys in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_NAME, index)
    if CARD_NAME in plan.names:
        card = source / CARD_NAME
        # A letter that is no UTF-8 comes out as it was.
        text = card.read_text("utf-8", "surrogateescape") if card.is_file() else ""
        text = with_section(text, section)
        (folder / CARD_NAME).write_text(text, "utf-8", "surrogateescape", newline="\n")
    if CONFIG_NAME in plan.names:
        _write_json(folder / CONFIG_NAME, config)


def quantization_entries(plan: OutputPlan, fmt: QuantFormat) -> dict[str, Any]:
    """Entries of config.json that say how the weights are quantized; none if no weight is.

    Args:
        plan: of the checkpoint.
        fmt: of most weights.
    """
    quantized = [outcome for outcome in plan.outcomes if outcome.format is not None]
    if not quantized:
        return {}
    fmt = fmt.template
    dtypes = [outcome.dtype for outcome in quantized]
    skipped = {
        outcome.name.removesuffix(".weight"): None
        for outcome in sorted(plan.outcomes, key=lambda outcome: natural_order(outcome.name))
        if outcome.format is None and len(outcome.shape) == 2 and outcome.name.endswith(".weight")
    }
    if not any(outcome.name.endswith("lm_head.weight") for outcome in quantized):
        skipped["lm_head"] = None  # where it is tied to the embeddings, no file holds it
    skipped |= {
        name.removesuffix(".weight"): None
        for name, owner in plan.source.tied.items()
        if owner.removesuffix(".weight") in skipped
    }
    return quantization_config(
        fmt,
        list(skipped),
        max(sorted(set(dtypes)), key=dtypes.count),  # of several the first: always the same
        bitsandbytes=all(
            outcome.format is not None
            and outcome.format.quant_type == fmt.quant_type
            and len(outcome.shape) == 2
            and outcome.name.endswith(".weight")
            for outcome in quantized
        ),
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
