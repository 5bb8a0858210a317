"""One adapter of a layer, or of all experts of a weight: its parameters and settings.

A layer may hold several, by name. PEFT has the adapters of E stacked experts as one linear layer of
rank E r, experts after each other in A's rows, and next to each other in B's columns:

    lora_A.weight   (E r, in)      row e r + j is A[e, j]
    lora_B.weight   (out, r E)     column j E + e is B[e, :, j]
"""

from __future__ import annotations

import math
import re
from typing import Final

import torch
from torch import Tensor, nn

from qkern import operands
from qkern.errors import DTypeError, FormatError, ShapeError
from qkern.merge_target import MergeTarget

DEFAULT: Final = "default"
# Initializations that need no weight: those with one are made by ``lora_init``.
PLAIN_INITS: Final = (True, False, "gaussian")
_NAME: Final = re.compile(r"[^.\s]+")


class LoRAAdapter(nn.Module):
    """The factors of ``scaling B A``, and for DoRA the magnitudes of the sum's rows.

    Args:
        out_features: rows of B.
        in_features: columns of A.
        r: rank, 1 or more.
        lora_alpha: the product is multiplied by ``lora_alpha / r``.
        lora_dropout: probability of zeroing an input of the adapter's part, in training.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead.
        use_dora: hold magnitudes too, see ``qkern.dora``; they are NaN until they are set.
        init_lora_weights: True, False or "gaussian", see ``reset``.
        dtype: of the parameters.
        device: of the parameters.
        experts: how many have factors of their own, stacked; None for a layer.

    Attributes:
        lora_A: (r, in_features), or (experts, r, in_features).
        lora_B: (out_features, r), or (experts, out_features, r).
        lora_magnitude: (out_features,), None without DoRA.
        changed_base: the initialization that took a part out of the base, empty if none did.
        merge_into: what it is trained to be merged into, see ``qkern.merge_aware``.

    Raises:
        ShapeError: for a rank below 1, or a dropout outside of [0, 1).
        FormatError: for another ``init_lora_weights``.
        DTypeError: for another dtype than float32, float16, bfloat16 and float64.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    merge_into: MergeTarget | None = None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            msg = f"the rank r must be 1 or more, got {r}"
            raise ShapeError(msg)
        if dtype not in operands.FLOATS:
            allowed = ", ".join(str(float_).removeprefix("torch.") for float_ in operands.FLOATS)
            msg = f"an adapter's dtype is one of {allowed}, got {dtype}"
            raise DTypeError(msg)
        operands.check_dropout(lora_dropout)
        self.r, self.lora_dropout, self.experts = r, lora_dropout, experts
        self.changed_base = ""
        self.set_scaling(lora_alpha, use_rslora=use_rslora)
        with torch.inference_mode(False):  # what is made under it could never be trained on
            stack = () if experts is None else (experts,)
            A = torch.empty(*stack, r, in_features, device=device, dtype=dtype)
            B = torch.empty(*stack, out_features, r, device=device, dtype=dtype)
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
            magnitude = None
            if use_dora:
                nan = torch.full((out_features,), torch.nan, device=device, dtype=dtype)
                magnitude = nn.Parameter(nan)
            self.register_parameter("lora_magnitude", magnitude)
            self.reset(init_lora_weights=init_lora_weights)

    @property
    def use_dora(self) -> bool:
        """Whether it has magnitudes."""
        return self.lora_magnitude is not None

    def set_scaling(self, lora_alpha: float, *, use_rslora: bool) -> None:
        """Set the factor of the product."""
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    def reset(self, *, init_lora_weights: bool | str = True) -> None:
        """Initialize the factors as PEFT does.

        Args:
            init_lora_weights: True: A as ``nn.Linear`` is, B zero; "gaussian": A normal of
                deviation 1/r, B zero; False: both as ``nn.Linear``. Those of experts: as the one
                layer that PEFT has of them.
        """
        if init_lora_weights not in PLAIN_INITS:
            msg = f"init_lora_weights is {init_lora_weights!r}: True, False or 'gaussian' are known"
            raise FormatError(msg)
        A, B = (factor.detach() for factor in (self.lora_A, self.lora_B))
        if self.experts is not None:  # the deviations depend on the sizes
            A, B = map(torch.empty_like, joined(A, B))
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.zeros_(B)
        if self.experts is not None:
            with torch.no_grad():
                for factor, values in zip(
                    (self.lora_A, self.lora_B), stacked(A, B, self.experts), strict=True
                ):
                    factor.copy_(values)

    def product(self, expert: int | None = None) -> Tensor:
        """``scaling B A``, fp32 (out_features, in_features); autocast or not.

        Args:
            expert: whose; None for a layer's, or all experts', stacked.
        """
        factors = (self.lora_A.detach(), self.lora_B.detach())
        A, B = (f.float() if expert is None else f[expert].float() for f in factors)
        if A.is_meta:  # which has no autocast
            return (B @ A) * self.scaling
        with torch.autocast(A.device.type, enabled=False):
            return (B @ A) * self.scaling

    def extra_repr(self) -> str:
        """Rank, scaling and kind, for ``print(model)``."""
        kind = ", DoRA" if self.use_dora else ""
        if self.merge_into is not None:
            kind += f", merge_into={self.merge_into.format} by {self.merge_into.method}"
        if self.experts is not None:
            kind += f", experts={self.experts}"
        return f"r={self.r}, scaling={self.scaling:g}{kind}"


def joined(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of experts, (E, r, in) and (E, out, r), as PEFT's (E r, in) and (out, r E)."""
    return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def stacked(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The opposite of ``joined``; r E is a multiple of ``experts``."""
    split = B.reshape(B.shape[0], -1, experts)
    return A.reshape(experts, -1, A.shape[-1]), split.permute(2, 0, 1).contiguous()


def check_name(name: str) -> None:
    """Refuse a name that no module can have.

    Raises:
        FormatError: for an empty one, one with a dot or a space, or that of a method.
    """
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        msg = f"{name!r} cannot be an adapter's name: no dot, no space, no name of a method"
        raise FormatError(msg)
