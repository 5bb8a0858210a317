"""An unmodified ``transformers.Trainer`` over a quantized model: PEFT's adapter, or qkern's own.

    python examples/trainer.py MODEL_DIR TEXT_FILE OUT_DIR [--adapter peft|qkern] [--steps N]

Both ways end in the same files, ``OUT_DIR/adapter``, which PEFT and qkern read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import qkern
from qkern.integrations.transformers import QkernConfig  # changed: registers qkern


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a directory of a dense model")
    parser.add_argument("text", type=Path, help="a text a line")
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", choices=("peft", "qkern"), default="peft")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def add_adapter(model: Any, kind: str) -> Any:
    """The model with an adapter on every quantized layer."""
    if kind == "qkern":
        qkern.add_lora(model, r=8, lora_alpha=16, target_modules="all-linear")
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def main() -> None:
    """Train, and save the adapter."""
    arguments = parse()
    # changed: QkernConfig for BitsAndBytesConfig
    config = QkernConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    model = add_adapter(model, arguments.adapter)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = [line for line in arguments.text.read_text(encoding="utf-8").splitlines() if line]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(arguments.steps // 4, 1),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=[tokenizer(line, truncation=True, max_length=128) for line in lines],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    if arguments.adapter == "qkern":
        qkern.save_adapter(model, arguments.out / "adapter")
    else:
        model.save_pretrained(arguments.out / "adapter")


if __name__ == "__main__":
    main()
