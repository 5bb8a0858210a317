"""TRL's ``DPOTrainer``, unmodified, over a 4-bit base.

    pip install "qkern[train]" peft
    python examples/trl_dpo.py                       # a tiny model, in seconds, no network
    python examples/trl_dpo.py --model MODEL_DIR     # any causal language model on disk

The policy is the base with an adapter, the reference is the same base with the adapter switched off
by PEFT: so one copy of the 4-bit weights serves both. What differs from a script for a dense model
is the line that is marked. DPO: Rafailov et al., https://arxiv.org/abs/2305.18290.
Exits with 1 if the loss does not start at log 2, where policy and reference are equal, or does not
fall, or if the base has changed.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_chat import load, probe, turn
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import qkern

ROWS = [
    {
        "prompt": turn("user", f"Add 1 to {i}."),
        "chosen": turn("assistant", f"It is {i + 1}."),
        "rejected": turn("assistant", "I would rather not say."),
    }
    for i in range(8)
]


def main() -> int:
    """Train, save, compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model directory; a tiny random model if not given")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, help="where the adapter goes; a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return run(args.model, args.steps, args.output or Path(temporary))


def run(directory: str | None, steps: int, output: Path) -> int:
    """The same, with the adapter in ``output``."""
    model, tokenizer = load(directory)
    report = qkern.quantize_model(model, "nf4")  # <- the line that a user adds
    print(f"{report.coverage:.0%} of the weights in NF4")
    before = probe(model, tokenizer)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            max_length=128,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(output))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses:", " ".join(f"{loss:.3f}" for loss in losses))
    policy = trainer.model.cpu()
    with policy.disable_adapter():
        changed = (probe(policy, tokenizer) - before).abs().max().item()
    print(f"the base alone, before and after: logits differ by {changed:.1e}")
    begins_at_log_2 = abs(losses[0] - math.log(2)) < 1e-3
    return 0 if begins_at_log_2 and losses[-1] < losses[0] and changed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
