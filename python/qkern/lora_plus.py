"""LoRA+: B learns faster than A. Hayou et al., https://arxiv.org/abs/2402.12354."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkern.errors import AdapterMismatchError, FormatError


def lora_plus_groups(
    model: nn.Module, *, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What is trainable, in groups for any optimizer of torch; those of PEFT's LoRA+.

    B, and vectors (magnitudes, norms, biases), learn at ``lr * ratio``, all else at ``lr``. Biases
    and the weights of ``nn.LayerNorm`` do not decay.

    Args:
        model: with adapters, by ``add_lora`` or PEFT.
        lr: learning rate of A.
        ratio: how many times as fast B learns, 1 or more.
        weight_decay: of the other parameters.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``.

    Raises:
        AdapterMismatchError: if nothing is trainable, or no adapter is.
        FormatError: for a rate that is not positive, or a ratio below 1.

    Example:
        >>> import qkern, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = qkern.quantize_model(model)
        >>> layers = qkern.add_lora(model)
        >>> groups = qkern.lora_plus_groups(model, lr=1e-4, ratio=16)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    if not (lr > 0 and ratio >= 1):
        msg = f"LoRA+ needs lr above 0 and a ratio of 1 or more, got {lr} and {ratio}"
        raise FormatError(msg)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    has_adapters = hasattr(model, "peft_config")  # PEFT's other kinds have other names
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            path = f"{name}.{key}"
            parts = path.split(".")
            has_adapters = has_adapters or any(part.startswith("lora_") for part in parts)
            is_fast = "lora_B" in parts or parameter.dim() == 1  # PEFT: "lora_B.default.weight"
            decays = not is_fast or not (isinstance(module, nn.LayerNorm) or "bias" in path)
            rates = (lr * ratio if is_fast else lr, weight_decay if decays else 0.0)
            members = groups.setdefault((rates[0], rates[1]), [])
            if not any(parameter is other for other in members):
                members.append(parameter)
    if not groups:
        msg = "the model has nothing to train: call qkern.add_lora or qkern.set_adapter first"
        raise AdapterMismatchError(msg)
    if not has_adapters:
        msg = (
            "the model has no adapters to train, LoRA+ is for theirs: call qkern.add_lora or "
            "PEFT's get_peft_model first"
        )
        raise AdapterMismatchError(msg)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
