"""A dense model, quantized while transformers reads it; saved, opened again, made dense again.

    python examples/transformers_load.py MODEL_DIR NEW_DIR

The lines that differ from a program that uses bitsandbytes are marked.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkern
from qkern.integrations.transformers import QkernConfig, model_config  # changed: registers qkern


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a directory of a dense model")
    parser.add_argument("new", help="a directory to write")
    return parser.parse_args()


def main() -> None:
    """Quantize one directory into the other, and compare what comes back."""
    arguments = parse()
    source, target = arguments.model, arguments.new
    # changed: QkernConfig for BitsAndBytesConfig
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=QkernConfig("nf4"))
    print(model.hf_quantizer.coverage)
    print(f"{qkern.memory_footprint(model):,} bytes")

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(tokens).logits

    # Nothing differs here: config.json names qkern, so the import above is all that is needed.
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    again = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        print("reloaded, same logits:", torch.equal(again(tokens).logits, expected))

    # Files that name bitsandbytes (its own, qkern.save's, qkern quantize's) by qkern:
    qkern.save(model, target)
    again = AutoModelForCausalLM.from_pretrained(target, config=model_config(target))
    with torch.no_grad():
        print("bitsandbytes' files, same logits:", torch.equal(again(tokens).logits, expected))

    again.dequantize()  # the same weights; torch's own product rounds at other places
    with torch.no_grad():
        difference = (again(tokens).logits - expected).abs().max().item()
    print(f"dense again, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
