"""TRL's ``SFTTrainer``, unmodified, over a 4-bit base.

    pip install "qkern[train]" peft
    python examples/trl_sft.py                       # a tiny model, in seconds, no network
    python examples/trl_sft.py --model MODEL_DIR     # any causal language model on disk

What differs from a script for a dense model is the line that is marked. The adapter that the
trainer saves is PEFT's; it is loaded again in both ways, and must give the same logits.
Exits with 1 if the loss does not fall or the logits differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny_chat import load, probe, turn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import qkern

ROWS = [
    {"prompt": turn("user", f"Add 1 to {i}."), "completion": turn("assistant", f"It is {i + 1}.")}
    for i in range(8)
]


def main() -> int:
    """Train, save, load, compare; the exit code."""
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
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
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

    expected = probe(trainer.model.cpu(), tokenizer)
    by_peft, by_qkern = (load(directory)[0] for _ in range(2))
    for base in (by_peft, by_qkern):
        qkern.quantize_model(base, "nf4")
    by_peft = PeftModel.from_pretrained(by_peft, output)
    qkern.load_adapter(by_qkern, output)
    errors = [(probe(m, tokenizer) - expected).abs().max().item() for m in (by_peft, by_qkern)]
    print(
        f"largest difference of logits, reloaded by PEFT: {errors[0]:.1e}, qkern: {errors[1]:.1e}"
    )
    return 0 if losses[-1] < losses[0] and max(errors) < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
