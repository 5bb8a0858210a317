"""Architectures of transformers, built from their configurations: small to run, or as published.

python tests/architectures.py      prints the table of docs/models.md
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import qkern

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 128}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_EMBEDDING = "Embedding, not nn.Linear"
_HEAD = "the output head"
_LLAMA = {"model.embed_tokens": _EMBEDDING, "lm_head": _HEAD}
_BERT = {
    **{f"bert.embeddings.{k}_embeddings": _EMBEDDING for k in ("word", "position", "token_type")},
    "cls.predictions.transform.dense": _HEAD,
    "cls.predictions.decoder": _HEAD,
}
_BIAS = "a bias of experts"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class.

    Args:
        name: as people call it.
        model: name of the class.
        config: name of its configuration's class.
        sizes: that make it small.
        left: what stays dense, by path with ``*`` for a number, and why.
        adapters: layers that ``add_lora`` finds in the small model.
    """

    name: str
    model: str
    config: str
    sizes: dict[str, Any]
    left: dict[str, str]
    adapters: int

    def small(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """With random weights that keep the scale of what they multiply."""
        torch.manual_seed(0)
        model = self._build(self.sizes).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and name.endswith(("weight", "proj")):
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.1)
        return model.to(dtype)

    def published(self) -> nn.Module:
        """Of the sizes that the configuration has by itself, without values, in bf16."""
        with torch.device("meta"):
            return self._build({}).to(torch.bfloat16)

    def _build(self, sizes: dict[str, Any]) -> nn.Module:
        config = getattr(transformers, self.config)(**sizes)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model


ARCHITECTURES = (
    Architecture("Llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, _LLAMA, 14),
    Architecture(
        "Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 16}, _LLAMA, 14
    ),
    Architecture(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, "head_dim": 16},
        {
            "model.embed_tokens": "Gemma3TextScaledWordEmbedding, not nn.Linear",
            "lm_head": _HEAD,
        },
        14,
    ),
    Architecture("Mistral", "MistralForCausalLM", "MistralConfig", _DECODER, _LLAMA, 14),
    Architecture("Phi", "PhiForCausalLM", "PhiConfig", _DECODER, _LLAMA, 12),
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 96,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"transformer.wte": _EMBEDDING, "transformer.wpe": _EMBEDDING, "lm_head": _HEAD},
        8,
    ),
    Architecture(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
        {
            "model.decoder.embed_tokens": _EMBEDDING,
            "model.decoder.embed_positions": "OPTLearnedPositionalEmbedding, not nn.Linear",
            "lm_head": _HEAD,
        },
        12,
    ),
    Architecture(
        "BERT", "BertForMaskedLM", "BertConfig", {**_TEXT, "intermediate_size": 128}, _BERT, 12
    ),
    Architecture(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
        {
            "shared": _EMBEDDING,
            **{f"{side}.embed_tokens": _EMBEDDING for side in ("encoder", "decoder")},
            **{
                f"{side}.block.*.layer.*.SelfAttention.relative_attention_bias": _EMBEDDING
                for side in ("encoder", "decoder")
            },
            "lm_head": _HEAD,
        },
        32,
    ),
    Architecture(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "intermediate_size": 160, "num_local_experts": 4},
        {**_LLAMA, "model.layers.*.mlp.gate": "MixtralTopKRouter, not nn.Linear"},
        8,
    ),
    Architecture(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
        },
        {**_LLAMA, "model.layers.*.mlp.gate": "Qwen3MoeTopKRouter, not nn.Linear"},
        8,
    ),
    Architecture(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER,
            "intermediate_size": 96,
            "num_local_experts": 4,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            **_LLAMA,
            "model.layers.*.mlp.router": "GptOssTopKRouter, not nn.Linear",
            "model.layers.*.mlp.experts.gate_up_proj_bias": _BIAS,
            "model.layers.*.mlp.experts.down_proj_bias": _BIAS,
        },
        8,
    ),
    Architecture(
        "CLIP, vision",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        _VISION,
        {
            "embeddings.patch_embedding": "Conv2d, not nn.Linear",
            "embeddings.position_embedding": _EMBEDDING,
        },
        12,
    ),
    Architecture(
        "SigLIP, vision",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        _VISION,
        {
            "embeddings.patch_embedding": "Conv2d, not nn.Linear",
            "embeddings.position_embedding": _EMBEDDING,
            "head.probe": "SiglipMultiheadAttentionPoolingHead.probe, not nn.Linear",
            "head.attention.in_proj_weight": "MultiheadAttention.in_proj_weight, not nn.Linear",
            "head.attention.out_proj": "NonDynamicallyQuantizableLinear, not nn.Linear",
        },
        14,
    ),
)


def output(model: nn.Module) -> Tensor:
    """What a small model makes of the same tokens or pictures."""
    generator = torch.Generator().manual_seed(1)
    if hasattr(model.config, "patch_size"):
        dtype = model.dtype
        found = model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator).to(dtype))
        if found.pooler_output is None:
            return found.last_hidden_state  # type: ignore[no-any-return]
        return torch.cat([found.last_hidden_state, found.pooler_output[:, None]], 1)
    ids = torch.randint(3, 96, (2, 12), generator=generator)
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **both).logits  # type: ignore[no-any-return]


def left_dense(report: qkern.CoverageReport) -> dict[str, str]:
    """Paths of what is dense, numbers as ``*``, and why."""
    dense = (row for row in report.rows if row.status == "dense")
    return {re.sub(r"\.\d+(?=\.)", ".*", row.name): row.reason for row in dense}


def table() -> str:
    """The table of docs/models.md: what NF4 makes of each model as it was published."""
    lines = [
        "| architecture | class | quantized | of the values | bf16 | NF4 | stays dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        report = qkern.quantize_model(architecture.published())
        sizes = [f"{n / 1e9:.2f} GB" for n in (report.bytes_before, report.bytes_after)]
        left = ", ".join(sorted({_short(*item) for item in left_dense(report).items()}))
        lines.append(
            f"| {architecture.name} | `{architecture.model}` | {len(report.quantized)} of "
            f"{len(report.rows)} weights | {report.coverage:.1%} | {sizes[0]} | {sizes[1]} | "
            f"{left} |"
        )
    return "\n".join(lines)


def _short(name: str, reason: str) -> str:
    """What a reader calls a weight."""
    if "mbedding" in reason or "embedding" in name:
        return "embeddings"
    if "Router" in reason:
        return "routers"
    if reason == _HEAD:
        return "output head"
    return "biases of experts" if reason == _BIAS else "attention pooling"


if __name__ == "__main__":
    print(table())
