"""PEFT's adapter kinds: the settings of each, and what it does over a quantized model."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern

CAUSAL = {"task_type": "CAUSAL_LM"}
ALL = {**CAUSAL, "target_modules": "all-linear"}
EXACT = "exact"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way of adapting a model.

    Args:
        name: as in its paper or in PEFT.
        config: the name of PEFT's class.
        settings: for it; a function that makes them where they need more of PEFT.
        merges: whether PEFT can merge it: else its own words.
        unmerges: "exact" where the bytes come back, "" where they do not, else PEFT's own words.
        starts_at_base: whether the base stays as it is when the adapter is made.
        call: more arguments of the model's forward.
        needs: a package that PEFT wants for it.
        lowers_loss: whether some steps on two sequences lower the loss visibly.
        single: why there cannot be a second one.
        base: settings of the model.
        prepare: what PEFT asks for before the adapter is made; without it no file can be loaded.
        after: what it asks for after.
    """

    name: str
    config: str = "LoraConfig"
    settings: dict[str, Any] | Callable[[], dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    merges: str = ""
    unmerges: str = ""
    starts_at_base: bool = True
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs: str = ""
    lowers_loss: bool = True
    single: str = ""
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[nn.Module, Any], None] | None = None
    after: Callable[[nn.Module], None] | None = None

    def make_config(self) -> Any:
        settings = self.settings() if callable(self.settings) else self.settings
        return getattr(peft, self.config)(**settings)

    def quantized(self) -> nn.Module:
        model = tiny_llama(**SIZES, **self.base)
        qkern.quantize_model(model)
        return model

    def adapted(self) -> nn.Module:
        """A quantized model with this adapter, not trained."""
        model, config = self.quantized(), self.make_config()
        if self.prepare is not None:
            self.prepare(model, config)
        torch.manual_seed(2)
        made = get_peft_model(model, config)
        if self.after is not None:
            self.after(made)
        return made

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.eval()(input_ids=token_ids(), **self.call).logits
        return logits

    def logits_of_base(self) -> Tensor:
        """Without the arguments that only an adapter takes."""
        with torch.no_grad():
            logits: Tensor = self.quantized()(input_ids=token_ids()).logits
        return logits

    def train(self, model: nn.Module, steps: int = 4) -> list[float]:
        parameters = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for step in range(steps):
            labels = token_ids()
            loss = model(input_ids=labels, labels=labels, **self.call).loss
            loss.backward()
            optimizer.step()
            if self.config == "AdaLoraConfig":
                model.base_model.update_and_allocate(step + 1)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def _lora(name: str, **settings: Any) -> Kind:
    own = {f.name for f in dataclasses.fields(Kind)}
    arguments = {key: settings.pop(key) for key in list(settings) if key in own}
    return Kind(name, settings={**ALL, "r": 4, "lora_alpha": 8, **settings}, **arguments)


def _lora_part(
    setting: str, cls: str, *, init: bool | str = True, **arguments: Any
) -> Callable[[], dict[str, Any]]:
    """LoRA with a configuration in the configuration."""

    def make() -> dict[str, Any]:
        part = getattr(importlib.import_module("peft.tuners.lora.config"), cls)
        settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": init, setting: part(**arguments)}
        return {**ALL, **settings}

    return make


def two_adapters() -> dict[str, str]:
    """Two LoRA adapters on disk, for kinds that route between them."""
    found = {}
    for seed in range(2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(**ALL, r=4, init_lora_weights=False)
        model = get_peft_model(KINDS["LoRA"].quantized(), config)
        found[str(seed)] = tempfile.mkdtemp()
        model.save_pretrained(found[str(seed)])
    return found


def _eva(model: nn.Module) -> None:
    rows = [{"input_ids": token_ids(8, 16)} for _ in range(3)]
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)


def _corda(model: nn.Module, config: Any) -> None:
    config.target_modules = ["q_proj", "v_proj", "down_proj"]  # it does not know "all-linear"
    corda = importlib.import_module("peft.tuners.lora.corda")
    corda.preprocess_corda(model, config, run_model=lambda: model(input_ids=token_ids(1, 16)))


def _lora_ga(model: nn.Module, config: Any) -> None:
    """It wants gradients of the base: a dense model gives them, a file brings them over."""
    preprocess = importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga
    config.target_modules = ["q_proj", "v_proj", "down_proj"]
    dense = tiny_llama(**SIZES)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/gradients.pt"

        def step() -> None:
            dense(input_ids=token_ids(), labels=token_ids()).loss.backward()

        preprocess(dense, config, step, cache_file=file)
        preprocess(model, config, step, cache_file=file)


PROMPT = {**CAUSAL, "num_virtual_tokens": 4}
NO_WEIGHTS = "no attribute 'merge_adapter'"
_BLOCKS = {
    "target_modules_bd_a": ["q_proj", "k_proj", "v_proj"],
    "target_modules_bd_b": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    "nblocks": 2,
}
_KINDS = [
    _lora("LoRA", unmerges=EXACT),
    _lora("rsLoRA", use_rslora=True, unmerges=EXACT),
    _lora("LoRA, Gaussian start", init_lora_weights="gaussian", unmerges=EXACT),
    _lora("LoRA, orthogonal start", init_lora_weights="orthogonal", unmerges=EXACT),
    _lora("EVA", init_lora_weights="eva", unmerges=EXACT, after=_eva),
    _lora("PiSSA", init_lora_weights="pissa", unmerges=EXACT, starts_at_base=False),
    _lora("OLoRA", init_lora_weights="olora", unmerges=EXACT, starts_at_base=False),
    Kind(
        "CorDA",
        settings=_lora_part("corda_config", "CordaConfig", init="corda"),
        unmerges=EXACT,
        starts_at_base=False,
        needs="attr",
        prepare=_corda,
    ),
    Kind(
        "LoRA-GA",
        settings=_lora_part("lora_ga_config", "LoraGAConfig", init="lora_ga"),
        unmerges=EXACT,
        starts_at_base=False,
        prepare=_lora_ga,
    ),
    _lora("MiCA", init_lora_weights="mica"),
    _lora("DoRA", use_dora=True),
    _lora("LoRA with biases", lora_bias=True, merges="the base layer has no bias"),
    _lora(
        "aLoRA",
        alora_invocation_tokens=token_ids()[0, 2:3].tolist(),
        merges="aLoRA does not support merging",
    ),
    Kind("BD-LoRA", settings=_lora_part("use_bdlora", "BdLoraConfig", **_BLOCKS)),
    Kind("KaSA", settings=_lora_part("kasa_config", "KasaConfig"), starts_at_base=False),
    Kind("VeLoRA", settings=_lora_part("velora_config", "VeloraConfig")),
    Kind("MonteCLoRA", settings=_lora_part("monteclora_config", "MontecloraConfig")),
    Kind(
        "AdaLoRA",
        "AdaLoraConfig",
        {**ALL, "init_r": 6, "target_r": 3, "total_step": 20, "tinit": 1, "tfinal": 2},
        unmerges=EXACT,
        single="supports only 1 trainable adapter",
    ),
    Kind(
        "X-LoRA",
        "XLoraConfig",
        lambda: {**CAUSAL, "hidden_size": 64, "xlora_size": 8, "adapters": two_adapters()},
        unmerges=EXACT,
        base={"use_cache": False},
        starts_at_base=False,  # its adapters are trained already
        lowers_loss=False,
    ),
    Kind(
        "AdaMSS",
        "AdamssConfig",
        {**ALL, "r": 8, "num_subspaces": 2},
        unmerges=EXACT,
        needs="sklearn",
    ),
    Kind("BOFT", "BOFTConfig", {**ALL, "boft_block_size": 4}),
    Kind("C3A", "C3AConfig", {**ALL, "block_size": 32}),
    Kind("DEFT", "DeftConfig", {**ALL, "r": 4}),
    Kind("DeLoRA", "DeloraConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind("FourierFT", "FourierFTConfig", {**ALL, "n_frequency": 50}, unmerges=EXACT),
    Kind("FRoD", "FrodConfig", {**ALL, "progressbar": False}, unmerges=EXACT),
    Kind("GraLoRA", "GraloraConfig", {**ALL, "r": 8}, unmerges=EXACT),
    Kind("HiRA", "HiraConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind("HRA", "HRAConfig", {**ALL, "r": 4}),
    Kind(
        "IA3",
        "IA3Config",
        {
            **CAUSAL,
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    Kind("Lily", "LilyConfig", {**ALL, "r": 4}, merges="not supported for Lily"),
    Kind("LoHa", "LoHaConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind("LoKr", "LoKrConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind("MiSS", "MissConfig", {**ALL, "r": 8}),
    Kind("MiSS, bat", "MissConfig", {**ALL, "r": 8, "init_weights": "bat"}),
    Kind("OFT", "OFTConfig", {**ALL, "r": 0, "oft_block_size": 16}),
    Kind(
        "OSF",
        "OSFConfig",
        {**ALL, "effective_rank": 8},
        unmerges="OSF models do not support unmerging",
    ),
    Kind("PEANuT", "PeanutConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind(
        "Poly",
        "PolyConfig",
        {**ALL, "r": 4, "n_tasks": 2, "n_skills": 2},
        merges="NotImplementedError",
        call={"task_ids": torch.tensor([0, 1])},
    ),
    Kind("PSOFT", "PsoftConfig", {**ALL, "r": 4}, unmerges=EXACT),
    Kind("PVeRA", "PveraConfig", {**ALL, "r": 16}, unmerges=EXACT, lowers_loss=False),
    Kind("RandLoRA", "RandLoraConfig", {**ALL, "r": 8}, unmerges=EXACT),
    Kind("RoAd", "RoadConfig", {**ALL, "group_size": 32}),
    Kind("SHiRA", "ShiraConfig", {**ALL, "r": 4, "random_seed": 0}, unmerges=EXACT),
    Kind("SuperTuning", "SupertuningConfig", ALL),
    Kind("TinyLoRA", "TinyLoraConfig", {**ALL, "u": 8}, unmerges=EXACT),
    Kind("UniLoRA", "UniLoraConfig", {**ALL, "theta_d_length": 32}, unmerges=EXACT),
    Kind(
        "VB-LoRA", "VBLoRAConfig", {**ALL, "vector_length": 32, "num_vectors": 16}, unmerges=EXACT
    ),
    Kind("VeRA", "VeraConfig", {**ALL, "r": 16}, unmerges=EXACT),
    Kind("WaveFT", "WaveFTConfig", {**ALL, "n_frequency": 50}, unmerges=EXACT),
    Kind("BEFT", "BeftConfig", {**CAUSAL, "target_modules": ["v_proj"]}, merges="has no bias"),
    # These touch no linear layer.
    Kind(
        "LN tuning",
        "LNTuningConfig",
        {**CAUSAL, "target_modules": ["input_layernorm"]},
        unmerges=EXACT,
    ),
    Kind(
        "Trainable tokens",
        "TrainableTokensConfig",
        {**CAUSAL, "token_indices": token_ids()[0, :2].tolist()},
        unmerges=EXACT,
    ),
    Kind("ShadowPEFT", "ShadowConfig", CAUSAL, merges="ShadowPEFT cannot be merged"),
    Kind("Prompt tuning", "PromptTuningConfig", PROMPT, merges=NO_WEIGHTS),
    Kind(
        "Multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        {**PROMPT, "num_tasks": 2},
        merges=NO_WEIGHTS,
        call={"task_ids": torch.tensor([0, 1])},
    ),
    Kind(
        "P-tuning", "PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 8}, merges=NO_WEIGHTS
    ),
    Kind("Prefix tuning", "PrefixTuningConfig", PROMPT, merges=NO_WEIGHTS),
    Kind("Cartridges", "CartridgeConfig", PROMPT, merges=NO_WEIGHTS),
    Kind(
        "Adaption prompt",
        "AdaptionPromptConfig",
        {**CAUSAL, "adapter_len": 4, "adapter_layers": 1},
        merges=NO_WEIGHTS,
    ),
]
KINDS = {kind.name: kind for kind in _KINDS}
# Members of PeftType that are not above, and why.
NAMED = {
    "GLORA": "refuses all subclasses of nn.Linear: 'is not a plain torch.nn.Linear'",
    "CPT": "a kind of prompt; its loss is NaN here, over the dense model too",
}
