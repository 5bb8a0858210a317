"""A process of its own: loads base and adapter again, and compares with the training process.

    python reload.py MODEL ADAPTER DATA LOGITS

Exits with 1 unless the logits are equal to the bit.
"""

from __future__ import annotations

import sys

import torch
from evaluation import probe_logits
from safetensors.torch import load_file

from qkern.integrations.pretrained import load_tokenizer
from qkern.training import prepare_data
from qkern.training.base import load_finetuned, resolve_device, resolve_dtype
from qkern.training.libraries import quiet_libraries


def main() -> int:
    """Compare, and say what was found."""
    model_dir, adapter, data, expected = sys.argv[1:]
    quiet_libraries()
    examples = prepare_data(data, load_tokenizer(model_dir)).examples
    want = load_file(expected)["logits"]
    dtype = resolve_dtype("auto", resolve_device("cpu"))
    model = load_finetuned(model_dir, adapter, dtype=dtype)
    got = probe_logits(model, examples[: len(want)])
    equal = torch.equal(got, want)
    sys.stdout.write(
        f"{want.numel()} logits bit-equal" if equal else f"off by {(got - want).abs().max():.3g}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
