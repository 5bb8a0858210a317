"""A bitsandbytes program on a CPU, by itself and with qkern beneath it: nothing else changes.

python examples/bitsandbytes_plugin.py [--out-features 300] [--in-features 400]
"""

from __future__ import annotations

import argparse

import bitsandbytes as bnb
import torch

from qkern.integrations import bitsandbytes as plugin


def quantize_and_multiply(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Any program over bitsandbytes: the decoded weight, and a layer's output in training mode."""
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4")
    layer.weight.data.copy_(w)
    return bnb.functional.dequantize_4bit(packed, state), layer.to("cpu")(x)


def main() -> None:
    """Run it twice, and show how far weights and outputs are from the dense ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-features", type=int, default=300)
    parser.add_argument("--in-features", type=int, default=400)
    options, _ = parser.parse_known_args()
    torch.manual_seed(0)
    rows, columns = options.out_features, options.in_features
    w = torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1))
    x = torch.randn(4, columns)
    for name, switch in (("bitsandbytes", plugin.disable), ("with qkern", plugin.enable)):
        switch()
        decoded, y = quantize_and_multiply(w, x)
        worst = ((decoded - w).abs() / w.abs().amax(1, keepdim=True)).max()
        off = (y - x @ w.t()).norm() / (x @ w.t()).norm()
        print(f"{name}: largest error of a weight {worst:.3f} of its row's maximum, ", end="")
        print(f"error of the output {off:.3f}")
    plugin.disable()


if __name__ == "__main__":
    main()
