"""What PEFT's ``adapter_config.json`` says, and which of it can be applied here. No torch."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qkern.errors import AdapterMismatchError, CorruptFileError, FormatError
from qkern.patterns import matching_paths

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
# Metadata keys of the weights: the format of the quantized base, and its fingerprint.
FORMAT_KEY: Final = "qkern"
BASE_KEY: Final = "qkern_base"
# ... the initialization that took a part out of that base.
CHANGED_KEY: Final = "qkern_changed_base"
# ... and how many tokens the model's embeddings have.
TOKENS_KEY: Final = "qkern_tokens"
# Names of the weights of stacked experts, in the order in which modules hold them.
EXPERT_WEIGHTS: Final = ("gate_up_proj", "up_proj", "down_proj")
# Settings of PEFT that change what an adapter computes, with the values that are plain LoRA.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Settings that say where, how it was trained, or what is asked of elsewhere.
_HARMLESS: Final = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    *("ensure_weight_tying",),
)
# Initializations that subtract the first adapter from the base.
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_config(
    config: Mapping[str, Any],
    directory: Path,
    *,
    applied: Collection[str] = (),
    allow_unknown: bool = True,
) -> None:
    """Refuse adapters that compute something else than what is done with them.

    Args:
        config: content of ``adapter_config.json``.
        directory: of the adapter, for errors.
        applied: settings beyond plain LoRA that the caller applies.
        allow_unknown: ignore settings that are not known here, as PEFT's new versions add.

    Raises:
        AdapterMismatchError: naming the setting.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        msg = f"{directory}: the adapter is of type {kind!r}: only LORA can be loaded here"
        raise AdapterMismatchError(msg)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        msg = (
            f"{directory}: init_lora_weights={start!r} changed the base weights: convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion), or load it there"
        )
        raise AdapterMismatchError(msg)
    for key, value in config.items():
        plain = _PLAIN.get(key)
        if plain is not None:
            is_foreign = value not in plain
        else:
            is_foreign = not allow_unknown and key not in _HARMLESS and bool(value)
        if is_foreign and key not in applied:
            msg = (
                f"{directory}: {key}={value!r} is not supported: load this adapter with "
                "PEFT over the quantized model"
            )
            raise AdapterMismatchError(msg)


def alphas_of(config: Mapping[str, Any], names: Iterable[str], directory: Path) -> dict[str, float]:
    """lora_alpha of each layer, by its path."""
    return _by_layer(config, names, "lora_alpha", 8.0, "alpha_pattern", directory)


def ranks_of(config: Mapping[str, Any], names: Iterable[str], directory: Path) -> dict[str, float]:
    """The rank of each layer, by its path; 0 where the settings do not say."""
    return _by_layer(config, names, "r", 0.0, "rank_pattern", directory)


def _by_layer(
    config: Mapping[str, Any],
    names: Iterable[str],
    key: str,
    default: float,
    pattern_key: str,
    directory: Path,
) -> dict[str, float]:
    """A number for each layer; the keys of patterns are regular expressions, as in PEFT."""
    default = number_of(config, key, default, directory)
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        msg = f"{directory}: {pattern_key} is a {type(patterns).__name__}, an object is needed"
        raise CorruptFileError(msg)
    known = {pattern: number_of(patterns, pattern, default, directory) for pattern in patterns}
    return by_pattern(names, default, known, f"{directory}: {pattern_key}")


def by_pattern(
    names: Iterable[str], default: float, patterns: Mapping[str, float], what: str
) -> dict[str, float]:
    """A number for each layer: that of the first pattern that matches, or the default.

    Args:
        names: paths.
        default: where no pattern matches.
        patterns: regular expressions for the end of a path, as in PEFT.
        what: what errors call the patterns.

    Raises:
        AdapterMismatchError: for an expression that cannot be matched here.
    """
    numbers = dict.fromkeys(names, default)
    for pattern in reversed([*patterns]):  # the first one that matches decides
        try:
            found = matching_paths(pattern, numbers)
        except FormatError as error:
            msg = f"{what} {pattern[:80]!r} cannot be matched here: {error}"
            raise AdapterMismatchError(msg) from error
        numbers |= dict.fromkeys(found, patterns[pattern])
    return numbers


def number_of(content: Mapping[str, Any], key: str, default: float, directory: Path) -> float:
    """A finite number of the configuration; the default where it is null or missing."""
    value = content.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        msg = f"{directory}: {key[:80]!r} is {str(value)[:40]!r}, a finite number is needed"
        raise CorruptFileError(msg)
    return float(value)


def pair_keys(shapes: Mapping[str, tuple[int, ...]], directory: Path) -> dict[str, tuple[str, str]]:
    """The keys of A and B of each layer, by its path.

    Args:
        shapes: of the entries ``base_model.model.<path>.lora_A.weight``, (r, in), and ``lora_B``,
            (out, r), by key.
        directory: of the adapter, for errors.

    Raises:
        AdapterMismatchError: for any other entry, for half a pair, for shapes that do not fit each
            other, and if there is none.
    """
    found: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        known = key.startswith(PREFIX) and key.endswith(".weight")
        if not known or part not in ("lora_A", "lora_B") or len(shape) != 2:
            msg = f"{directory}: unexpected entry {key} of shape {shape}"
            raise AdapterMismatchError(msg)
        found.setdefault(name.removeprefix(PREFIX), {})[part] = key
    for name, parts in found.items():
        pair = {part: shapes[key] for part, key in parts.items()}
        if len(pair) != 2 or pair["lora_A"][0] != pair["lora_B"][1]:
            msg = f"{directory}: {name} needs lora_A (r, in) and lora_B (out, r), found {pair}"
            raise AdapterMismatchError(msg)
    if not found:
        msg = f"{directory}: the file holds no adapter"
        raise AdapterMismatchError(msg)
    return {name: (parts["lora_A"], parts["lora_B"]) for name, parts in found.items()}


def peft_paths(names: list[str]) -> dict[str, str]:
    """Where PEFT's files have adapters of parameters, by the paths of these.

    PEFT wraps the module once for each, the last parameter outermost: that one's adapter is found
    at the module's path, and each other one's inside, at one ``base_layer`` more.

    Args:
        names: paths of all the parameters, those of a module in its order.
    """
    found = {}
    depth: dict[str, int] = {}
    for name in reversed(names):
        module = name.rpartition(".")[0]
        found[name] = module + ".base_layer" * depth.get(module, 0)
        depth[module] = depth.get(module, 0) + 1
    return {name: found[name] for name in names}


def places_of_experts(
    names: Iterable[str], targets: Collection[str], directory: Path
) -> dict[str, str]:
    """Where an adapter's file has the weights of experts, by the paths of these.

    Args:
        names: paths of the file's entries.
        targets: its ``target_parameters``: paths or ends of paths.
        directory: of the adapter, for errors.

    Raises:
        AdapterMismatchError: for a target without an entry, and an entry without a target.
    """
    names = list(names)
    modules = dict.fromkeys(re.sub(r"(\.base_layer)+$", "", name) for name in names)
    paths = [f"{m}.{w}" for m in modules if f".{m}".endswith(".experts") for w in EXPERT_WEIGHTS]
    wanted = [p for p in paths if any(f".{p}".endswith(f".{target}") for target in targets)]
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in wanted):
            msg = (
                f"{directory}: target_parameters has {target!r}, and the file no entry of such "
                f"experts; known are {', '.join(EXPERT_WEIGHTS)} of modules called experts"
            )
            raise AdapterMismatchError(msg)
    places = peft_paths(wanted)
    lost = [f"{path} at {place}" for path, place in places.items() if place not in names]
    of_experts = {name.rpartition(".")[0] for name in wanted}
    taken = set(places.values())
    more = [n for n in names if n not in taken and re.sub(r"(\.base_layer)+$", "", n) in of_experts]
    if lost or more:
        found = f"lacks an entry of {lost[0]}" if lost else f"has an entry {more[0]} of no target"
        msg = f"{directory}: target_parameters={list(targets)}, and the file {found}"
        raise AdapterMismatchError(msg)
    return places


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like one that is not there, for errors."""
    return ", ".join(difflib.get_close_matches(name, [*names], n=3)) or "none"


def not_found(missing: Sequence[str], total: int, names: Collection[str]) -> str:
    """What errors say of an adapter's modules that are not there, after the first one's name.

    Args:
        missing: paths, one at least.
        total: of all modules of the adapter.
        names: what is there.
    """
    near = nearest(missing[0], names)
    text = f"nearest: {near}. {len(missing)} of the adapter's {total} modules are missing here"
    if not names:
        return f"{text}: no layer is quantized here, call qkern.quantize_model first"
    if near == "none":
        text += f"; what is here is called like {max(names, key=lambda name: name.count('.'))}"
    return (
        f"{text}: is this the base model that {CONFIG_NAME} names (base_model_name_or_path), "
        "opened by the same class?"
    )
