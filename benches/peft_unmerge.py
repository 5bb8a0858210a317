"""What PEFT's merge and unmerge leave of a quantized weight's bytes, kind of adapter by kind.

python benches/peft_unmerge.py [--save]

Each kind of adapter is put on a quantized layer, moved a little from its start, merged, and
unmerged; then codes and scales are compared with those of before. A quantized weight puts back what
an in-place addition replaced when its inverse comes; a kind that assigns a new weight is quantized
twice.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import qkern
from qkern.text_table import format_table

sys.path.insert(0, str(Path(__file__).parent))
import harness

WIDTH = 256
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {}),
    "LoRA, rsLoRA": ("LoraConfig", {"use_rslora": True}),
    "LoRA, PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "LoRA, OLoRA": ("LoraConfig", {"init_lora_weights": "olora"}),
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 100}),
    "VeRA": ("VeraConfig", {}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LoHa": ("LoHaConfig", {}),
    "LoKr": ("LoKrConfig", {}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 32}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 32}),
    "HRA": ("HRAConfig", {}),
    "FourierFT": ("FourierFTConfig", {}),
    "RandLoRA": ("RandLoraConfig", {}),
    "MiSS": ("MissConfig", {}),
    "SHiRA": ("ShiraConfig", {}),
}


def rows() -> list[dict[str, Any]]:
    """A row for each kind that the installed PEFT has."""
    found = []
    for name, (config, settings) in SETTINGS.items():
        made = getattr(peft, config, None)
        if made is None:
            print(f"{name} is left out: PEFT {peft.__version__} has no {config}", file=sys.stderr)
            continue
        found.append({"kind": name, **measure(made, settings)})
    return found


def measure(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Shares of the bytes that differ, after the merge and after unmerging; or what was raised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    qkern.quantize_model(model, "nf4")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config(target_modules=["0"], **settings))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
            before = bytes_of(adapted)
            adapted.merge_adapter()
            merged = bytes_of(adapted)
            adapted.unmerge_adapter()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"merged": differing(before, merged), "unmerged": differing(before, bytes_of(adapted))}


def bytes_of(model: nn.Module) -> Tensor:
    """Codes and scales of the layer."""
    layer = next(m for m in model.modules() if isinstance(m, qkern.QuantizedLinear))
    parts = (part for part in layer.quantized_weight.parts if part is not None)
    return torch.cat([copy.deepcopy(part).reshape(-1).view(torch.uint8) for part in parts])


def differing(one: Tensor, other: Tensor) -> float:
    """Share of the bytes that are not the same."""
    return float((one != other).float().mean())


def table(found: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    cells = []
    for row in found:
        shares = (row.get("merged"), row.get("unmerged"))
        shown = ("-" if share is None else f"{share:.1%}" for share in shares)
        cells.append((row["kind"], *shown, row.get("refused", "")))
    headers = ("kind", "bytes changed by the merge", "after unmerging", "refused")
    return format_table(cells, headers)


def main() -> None:
    """Run, print, and with --save write results/peft_unmerge.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="write results/peft_unmerge.json")
    options = parser.parse_args()
    found = rows()
    print(table(found))
    if options.save:
        print(f"wrote {harness.save('peft_unmerge', found)}")


if __name__ == "__main__":
    main()
