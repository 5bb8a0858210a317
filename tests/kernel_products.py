"""Products through the kernels and in fp64, for the tests of ``tests/kernels``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernel_device import DEVICE, HOST, on_device
from torch import Tensor

from qkern import reference
from qkern.formats import QuantFormat
from qkern.kernels import launch
from qkern.kernels.launch import Weight

# Largest |y - exact| allowed, in units of what the sum of magnitudes loses by one rounding of a
# value of that dtype (fp32: of a long sum).
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ULPS = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Product(NamedTuple):
    """Operands of a product, and the dense weight that it multiplies."""

    x: Tensor  # (M, K)
    parts: reference.Parts
    fmt: QuantFormat
    dense: Tensor  # (N, K), dequantized to x's dtype, or to fp32
    bias: Tensor | None
    h: Tensor | None  # (M, r)
    lora_B: Tensor | None  # (N, r)

    @property
    def weight(self) -> Weight:
        """As kernels take it."""
        return launch.weight(*self.parts, self.fmt, self.dense.shape)

    def exact(self) -> tuple[Tensor, Tensor]:
        """y in fp64, (M, N), and the sum of the magnitudes of its terms."""
        x, w = self.x.double(), self.dense.double()
        y, size = x @ w.mT, x.abs() @ w.mT.abs()
        if self.h is not None and self.lora_B is not None:
            h, B = self.h.double(), self.lora_B.double()
            y, size = y + h @ B.mT, size + h.abs() @ B.mT.abs()
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        return y, size


def product(
    M: int,
    N: int,
    K: int,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    adapter: torch.dtype | None = None,
    bias: bool = False,
    rounded: bool = True,
) -> Product:
    """Random operands; fp32 scales have both signs. The weight is rounded to ``dtype``, or not."""
    fmt = QuantFormat(quant_type, blocksize, double_quant).for_shape((N, K))
    parts, dense = random_weight(N, K, fmt, dtype if rounded else torch.float32)
    adapter = adapter or dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=HOST).to(DEVICE)

    return Product(
        x=random(M, K).to(dtype),
        parts=parts,
        fmt=fmt,
        dense=dense,
        bias=random(N).to(dtype) if bias else None,
        h=random(M, rank).to(adapter) if rank else None,
        lora_B=(random(N, rank) / rank**0.5).to(adapter) if rank else None,
    )


def random_weight(
    N: int, K: int, fmt: QuantFormat, dtype: torch.dtype
) -> tuple[reference.Parts, Tensor]:
    """The parts of a random weight, and its values in ``dtype`` as the host's reference has them.

    fp32 scales have both signs.
    """
    with HOST:
        parts = reference.quantize(torch.randn(N, K) / K**0.5, fmt)
        if parts.nested_absmax is None:
            parts = parts._replace(absmax=parts.absmax * torch.randn(parts.absmax.shape).sign())
        dense = reference.dequantize(parts, fmt, N * K, dtype).reshape(N, K)
    return on_device(parts), dense.to(DEVICE)


def worst_error(y: Tensor, operands: Product) -> float:
    """The largest error, in units of its bound: an ulp of y and of the sum's magnitude in fp32."""
    exact, size = operands.exact()
    bound = exact.abs() * ULPS[y.dtype] + size * 2.0**-20
    error = (y.double() - exact).abs()
    assert not error.isnan().any(), "a value was not written"
    return float((error / bound).max())
