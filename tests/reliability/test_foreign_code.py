"""Code that knows nothing of quantized layers: it reads ``.weight``, hooks, prunes, subclasses."""

from __future__ import annotations

import copy

import pytest
import torch
from bodies import same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import T5Config, T5ForConditionalGeneration

import qkern
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.tensor import QuantizedTensor

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def layer(**settings: object) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(64, 32), **settings)


# -- the weight, read directly ---------------------------------------------------------------

READS = {
    "F.linear": lambda w: F.linear(X, w),
    "x @ w.T": lambda w: X @ w.T,
    "einsum": lambda w: torch.einsum("bti,oi->bto", X, w),
    "addmm": lambda w: torch.addmm(torch.ones(10, 32), X.reshape(10, 64), w.t()),
    "norm": lambda w: w.norm(dim=1),
    "rows": lambda w: w[3:7],
    "row": lambda w: w[2],
    "value": lambda w: w[0, 0],
    "cat": lambda w: torch.cat([w, w]),
    "embedding": lambda w: F.embedding(torch.tensor([1, 31]), w),
    "conv1d": lambda w: F.conv1d(X.mT, w[:, :, None]),
    "to": lambda w: w.to(torch.bfloat16) * 1,
    "view": lambda w: w.view(-1),
    "chunk": lambda w: w.chunk(2)[1],
    "comparison": lambda w: w > 0,
    "data": lambda w: X @ w.data.T,
    "dequantize": lambda w: w.dequantize() if isinstance(w, QuantizedTensor) else w,
}


@pytest.mark.case("D18")
@pytest.mark.parametrize("quant_type", ["nf4", "int8", "int8_row"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_the_weight_gets_the_value_that_the_layer_multiplies(
    read: object, quant_type: str
) -> None:
    weight = layer(quant_type=quant_type).weight
    with torch.no_grad():
        got, expected = read(weight), read(weight.dequantize())
        if isinstance(got, QuantizedTensor):  # rows of a weight are quantized too
            got = got.dequantize()
    assert type(got) is Tensor
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(got, expected)  # F.linear sums in another order than matmul


@pytest.mark.case("D18")
def test_what_asks_the_weight_about_itself_hears_of_a_dense_one() -> None:
    made, dense = layer(), nn.Linear(64, 32)
    for name in ("shape", "dtype", "device", "layout", "requires_grad"):
        expected = False if name == "requires_grad" else getattr(dense.weight, name)
        assert getattr(made.weight, name) == expected, name
    for name in ("size", "numel", "stride", "dim", "is_floating_point", "is_contiguous"):
        assert getattr(made.weight, name)() == getattr(dense.weight, name)(), name
    assert isinstance(made.weight, nn.Parameter)
    assert made.half().weight.dtype == torch.float16


@pytest.mark.case("D18")
def test_what_wants_the_memory_of_the_weight_is_refused() -> None:
    weight = layer().weight
    for ask in (weight.detach().numpy, weight.tolist):
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            ask()
    assert torch.tensor(weight.dequantize().tolist()).shape == (32, 64)


class Peeking(nn.Module):
    """Bypasses ``forward``, as code does that was written for dense layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.up.weight.dtype) @ self.up.weight.t() + self.up.bias
        return F.linear(torch.tanh(h), self.down.weight, self.down.bias)


@pytest.mark.case("D18")
def test_a_module_that_bypasses_forward_is_right_and_trains_what_is_before_it() -> None:
    model = Peeking()
    qkern.quantize_model(model)
    dense = nn.ModuleDict({n: m.dequantize() for n, m in model.named_children()})
    leaves = [X.clone().requires_grad_() for _ in range(2)]
    got, expected = model(leaves[0]), Peeking.forward(dense, leaves[1])
    torch.testing.assert_close(got, expected)
    for y in (got, expected):
        y.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.case("D18")
def test_torchs_encoder_has_a_fast_path_that_takes_the_weights() -> None:
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(one, 2).eval()})
    report = qkern.quantize_model(model)
    assert len(report.quantized) == 4
    dense = {row.name.rpartition(".")[2]: row.reason for row in report.rows if row.reason}
    assert dense["in_proj_weight"] == "MultiheadAttention.in_proj_weight, not nn.Linear"
    assert "not nn.Linear" in dense["out_proj"]
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    slow = model["encoder"](X, src_key_padding_mask=padded)
    with torch.no_grad():
        fast = model["encoder"](X, src_key_padding_mask=padded)
    torch.testing.assert_close(fast[~padded], slow[~padded])


@pytest.mark.case("D18")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_asks_its_weights_for_their_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).to(dtype).eval()
    qkern.quantize_model(model)
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense.set_submodule(name, module.dequantize())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        got, expected = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, dense))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


# -- what is no plain linear layer -----------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Zoo(nn.Module):
    """Layers that are nearly linear ones."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.gpt2 = Conv1D(64, 64)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.own = OwnLinear(64, 64)
        self.plain, self.bare = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.bilinear = nn.Bilinear(64, 64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt2(self.embed(ids))
        x = self.conv(x[:, None]).mean(1)
        x = self.bare(torch.tanh(self.plain(self.own(x))))
        return self.bilinear(x, x)


@pytest.mark.case("D19")
def test_every_layer_is_quantized_or_named_with_the_reason() -> None:
    model, ids = Zoo(), torch.arange(12).reshape(2, 6)
    before = copy.deepcopy(model)
    report = qkern.quantize_model(model)
    status = {row.name: (row.status, row.reason) for row in report.rows}
    matrices = {n.removesuffix(".weight") for n, p in before.named_parameters() if p.dim() > 1}
    assert set(status) == matrices
    assert status["plain"] == status["bare"] == ("nf4", "")
    assert model.bare.bias is None
    assert same_bits(model.plain.bias, before.plain.bias)
    for name, kind in {"embed": "Embedding", "conv": "Conv2d", "bilinear": "Bilinear"}.items():
        assert status[name] == ("dense", f"{kind}, not nn.Linear")
    assert status["own"] == ("dense", "OwnLinear, not nn.Linear")
    # What GPT-2 is made of: quantized with its transposed weight, or named.
    assert status["gpt2"] in {("nf4", ""), ("dense", "Conv1D, not nn.Linear")}
    for name, module in model.named_children():
        if status[name][0] == "dense":
            assert type(module) is type(getattr(before, name))
            assert same_bits(module.weight, getattr(before, name).weight)
    expected = before(ids)
    error = (model(ids) - expected).norm() / expected.norm()
    assert 0 < error < 0.3
    assert all(name in str(report) for name in status)


@pytest.mark.case("D19")
def test_a_report_that_leaves_too_much_can_be_an_error() -> None:
    with pytest.raises(qkern.CoverageError, match="own"):
        qkern.quantize_model(Zoo(), min_coverage=0.95)


@pytest.mark.case("D19")
def test_layers_that_have_a_forward_of_their_own_are_refused_one_by_one() -> None:
    for odd in (OwnLinear(64, 64), nn.Embedding(4, 64), nn.Conv2d(1, 2, 3), nn.Bilinear(8, 8, 8)):
        for build in (QuantizedLinear.from_linear, QLoRALinear.from_linear):
            with pytest.raises((qkern.DTypeError, qkern.FormatError), match=type(odd).__name__):
                build(odd)


# -- hooks, parametrizations, pruning --------------------------------------------------------


class Hooked(nn.Module):
    """A layer between others, and a log of the hooks that were called on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)
        self.log: list[str] = []
        hooked, log = self.first, self.log

        def note(name: str, result: object = None) -> object:
            return lambda module, *_: log.append(f"{name} {type(module).__name__}") or result

        self.handles = [
            hooked.register_forward_pre_hook(note("pre")),
            hooked.register_forward_hook(note("forward")),
            hooked.register_forward_hook(lambda m, x, kw, y: 2 * y, with_kwargs=True),
            hooked.register_full_backward_hook(note("backward")),
            hooked.register_state_dict_pre_hook(note("save")),
            hooked.register_state_dict_post_hook(note("saved")),
            hooked.register_load_state_dict_pre_hook(note("load")),
            hooked.register_load_state_dict_post_hook(note("loaded")),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def calls(self) -> list[str]:
        """What a step, saving and loading call."""
        self.log.clear()
        self(X.clone().requires_grad_()).sum().backward()
        self.load_state_dict(self.state_dict())
        return [entry.partition(" ")[0] for entry in self.log]


@pytest.mark.case("D20")
def test_hooks_are_carried_over_and_can_be_removed() -> None:
    model = Hooked()
    expected = model.calls()
    assert expected == ["pre", "forward", "backward", "save", "saved", "load", "loaded"]
    for step in (qkern.quantize_model, qkern.add_lora):
        step(model)
        assert model.calls() == expected
        assert {entry.partition(" ")[2] for entry in model.log} == {type(model.first).__name__}
        torch.testing.assert_close(
            model.first(X), 2 * F.linear(X, model.first.weight, model.first.bias)
        )
    for handle in model.handles:
        handle.remove()
    assert model.calls() == []
    assert torch.equal(model.first(X), F.linear(X, model.first.weight, model.first.bias))


def prune_half(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.case("D20")
@pytest.mark.parametrize(
    "compute", [parametrizations.weight_norm, parametrizations.orthogonal, prune_half]
)
def test_layers_whose_weight_is_computed_stay_dense_until_it_is_made_one(compute: object) -> None:
    model = nn.ModuleDict({"odd": nn.Linear(64, 64), "plain": nn.Linear(64, 64)})
    compute(model["odd"])
    expected = model["odd"](X)
    report = qkern.quantize_model(model)
    assert [row.name for row in report.quantized] == ["plain"]
    reasons = " ".join(row.reason for row in report.rows if row.name.startswith("odd"))
    assert "not nn.Linear" in reasons or "computed from" in reasons
    assert torch.equal(model["odd"](X), expected)
    if compute is prune_half:
        prune.remove(model["odd"], "weight")
    else:
        parametrize.remove_parametrizations(model["odd"], "weight")
    assert len(qkern.quantize_model(model).quantized) == 2
    error = (model["odd"](X) - expected).norm() / expected.norm()
    assert 0 < error < 0.15


@pytest.mark.case("D20")
@pytest.mark.parametrize("compute", [parametrizations.weight_norm, prune_half])
def test_a_weight_that_is_quantized_cannot_be_computed_from_others(compute: object) -> None:
    made = layer()
    before = [part.clone() for part in made.weight.parts if part is not None]

    def attempt() -> Tensor:
        compute(made)
        return made(X)

    with pytest.raises(qkern.QkernError, match=r"Tensor|gradient"):
        attempt()
    fresh = [part for part in layer().weight.parts if part is not None]
    assert all(map(same_bits, before, fresh))


@pytest.mark.case("D20")
def test_hooks_of_accelerate_are_refused_before_and_run_after() -> None:
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="it is accelerate's hooks that are tried"
    )
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    hooks.add_hook_to_module(model["b"], hooks.ModelHook())
    with pytest.raises(qkern.FormatError, match=r"^b\.weight: .*forward was replaced.*accelerate"):
        qkern.quantize_model(model)
    assert type(model["b"]) is nn.Linear
    hooks.remove_hook_from_module(model["b"])
    qkern.quantize_model(model)
    expected = model["b"](X)
    hooks.add_hook_to_module(model["b"], hooks.AlignDevicesHook("cpu"))
    assert torch.equal(model["b"](X), expected)
    with pytest.raises(qkern.FormatError, match="forward was replaced"):
        qkern.add_lora(model)
    hooks.remove_hook_from_module(model["b"])
    qkern.add_lora(model)
    assert torch.equal(model["b"](X), expected)
