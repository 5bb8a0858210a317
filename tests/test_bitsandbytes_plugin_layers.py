"""The bitsandbytes plug-in: bitsandbytes' layers, and what stands on them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from plugin_weights import DTYPES, NEAR, assert_same, bnb, decoded, linear4bit, relative, scaled

import qkern
from qkern.integrations import bitsandbytes as plugin


# Rows that are no multiple of 32, and rows of codes that end within a block: bitsandbytes refuses
# both in eval mode where it repacks.
@pytest.mark.parametrize(("in_features", "out_features"), [(96, 50), (100, 64), (128, 64)])
def test_layers_agree_with_their_weight_in_training_and_eval(
    with_plugin: None, in_features: int, out_features: int
) -> None:
    for nested, dtype in itertools.product((False, True), DTYPES):
        layer = linear4bit(
            in_features, out_features, compress_statistics=nested, compute_dtype=dtype
        )
        weight = decoded(layer.weight.data, layer.weight.quant_state, dtype).double()
        for x in (scaled(1, in_features), scaled(2, 3, in_features)):
            expected = x.to(dtype).double() @ weight.t() + layer.bias.double()
            for mode in (True, False):
                y = layer.train(mode)(x)
                assert relative(y, expected) < 2 * NEAR[dtype], (nested, dtype, mode)


def test_eval_leaves_the_checkpoint_and_the_gradient_as_they_were(with_plugin: None) -> None:
    for nested in (False, True):
        layer = linear4bit(128, 64, compress_statistics=nested)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with torch.no_grad():
            layer.eval()(scaled(2, 128))
        assert_same(layer.state_dict(), before, nested)
        x = scaled(2, 128).requires_grad_()
        layer.train()(x).sum().backward()
        weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
        assert relative(x.grad, weight.sum(0).expand(2, -1)) < 1e-6


def test_gradients_are_those_of_the_decoded_weight(with_plugin: None) -> None:
    layer = linear4bit(96, 50)
    x, grad = scaled(3, 96).requires_grad_(), scaled(3, 50, seed=2)
    layer(x).backward(grad)
    weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
    assert relative(x.grad, grad @ weight) < 1e-6
    assert relative(layer.bias.grad, grad.sum(0)) < 1e-6


def test_layers_that_ran_before_keep_their_results(without_plugin: None) -> None:
    layer, x = linear4bit(128, 64, compute_dtype=torch.bfloat16).eval(), scaled(3, 128)
    with torch.no_grad():
        before = layer(x)  # repacks, where the processor has bf16 instructions
        plugin.enable()
        assert relative(layer(x), before) < 1e-2
        plugin.disable()
        assert torch.equal(layer(x), before)


def test_a_layer_compiles_in_one_piece(with_plugin: None) -> None:
    layer, x = linear4bit(96, 50).eval(), scaled(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_embeddings_and_qkern_read_the_same_weight(with_plugin: None) -> None:
    table = bnb.nn.EmbeddingNF4(10, 64)
    dense = table.weight.data.clone()
    table.to("cpu")
    rows = torch.tensor([3, 9, 3])
    expected = qkern.dequantize(qkern.quantize(dense, "nf4", double_quant=False))[rows]
    assert relative(table(rows), expected) < 0.02  # its scales are double-quantized


def test_transformers_and_peft_above_it_compute_with_the_decoded_weights(
    with_plugin: None, tmp_path: Path
) -> None:
    """in_features of 96 in blocks of 64: what bitsandbytes alone decodes wrongly or refuses."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bits, device_map="cpu", dtype=torch.float32
    )
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = decoded(layer.weight.data, layer.weight.quant_state, torch.float32)
        dense.get_submodule(name).weight.data.copy_(weight)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert relative(model.eval()(ids).logits, dense.eval()(ids).logits) < 1e-5
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all(p.grad is not None and p.grad.any() for p in trained)
