"""What two gloo processes check; run by test_distributed.py.

    python tests/distributed_worker.py [LEG...]

Prints one line per leg that worked; any difference from one process is an error. The processes are
forked after the imports, which take longer than all legs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import qkern
from qkern.layers import QuantizedLinear

sys.path.insert(0, str(Path(__file__).parent))
from toys import Stack, tiny_llama, token_ids

WORLD_SIZE = 2
BATCH = 8
ALIGNED = (256, 192, 320, 256)
KINDS = ("nf4", "int8_row")
UNEVEN = (256, 65, 257)  # rows that two ranks cannot share evenly; 65 inputs: blocks cross rows


def batch(step: int, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, widths[0], generator=generator)
    return x, torch.randn(BATCH, widths[-1], generator=generator)


def train(model: nn.Module, widths: tuple[int, ...], steps: int = 3) -> list[float]:
    """Losses of a few AdamW steps, each rank on its share of the batch, averaged."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    wrappers = (DistributedDataParallel, FullyShardedDataParallel)
    if not isinstance(model, wrappers) and not hasattr(model, "unshard"):
        share = slice(None)
    # A gradient that is all rounding must not decide the sign of a whole step.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)
    losses = []
    for step in range(steps):
        x, y = batch(step, widths)
        loss = (model(x[share]) - y[share]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if share != slice(None):
            dist.all_reduce(mean)
            mean /= world
        losses.append(mean.item())
    return losses


def frozen(model: nn.Module) -> nn.Module:
    """The model with only its adapters trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def sharded(widths: tuple[int, ...], quant_type: str = "nf4", **policy: object) -> nn.Module:
    """The model with every layer and the whole sharded over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = frozen(Stack(widths, quant_type=quant_type))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def check_equal(widths: tuple[int, ...], model: nn.Module, quant_type: str = "nf4") -> None:
    """Losses and adapters as one process gets them."""
    alone = frozen(Stack(widths, quant_type=quant_type))
    expected, got = train(alone, widths), train(model, widths)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    pairs = zip(inner.named_parameters(), alone.named_parameters(), strict=True)
    for (_, mine), (name, theirs) in pairs:
        if theirs.requires_grad:
            full = mine.full_tensor() if isinstance(mine, DTensor) else mine
            difference = (full - theirs).abs().max().item()
            assert difference < 2e-5, f"{name} differs by {difference}"


def ddp_equals_one_process() -> None:
    """DistributedDataParallel as it is."""
    for quant_type in KINDS:
        model = frozen(Stack(ALIGNED, quant_type=quant_type))
        before = [layer.weight.packed.clone() for layer in model.layers]
        check_equal(ALIGNED, DistributedDataParallel(model), quant_type)
        for layer, packed in zip(model.layers, before, strict=True):
            assert torch.equal(layer.weight.packed, packed), "DDP changed the packed bytes"


def ddp_spreads_rank_0() -> None:
    """A rank that starts with another weight gets rank 0's values."""
    model = frozen(Stack(ALIGNED))
    expected = model.layers[0].weight.dequantize()
    if dist.get_rank() == 1:
        model.layers[0].weight.packed.zero_()
    DistributedDataParallel(model)
    error = (model.layers[0].weight.dequantize() - expected).abs().max() / expected.abs().max()
    assert error < 1e-2, f"rank 1 is off by {error:.3g} after the broadcast"


def fsdp2_equals_one_process() -> None:
    """fully_shard: half of the bytes on each rank, the same losses."""
    foreseen = qkern.fsdp_ready(frozen(Stack(ALIGNED))).bytes_per_rank(dist.get_world_size())
    model = sharded(ALIGNED)
    assert sum(layer.weight._local_tensor.nbytes for layer in model.layers) == foreseen
    local = model.layers[0].weight._local_tensor
    assert local.packed.shape[0] * dist.get_world_size() == 192, local.packed.shape
    check_equal(ALIGNED, model)


def fsdp2_uneven_rows() -> None:
    """Rows that do not divide, and rows that share blocks (held whole by every rank)."""
    for quant_type in KINDS:
        check_equal(UNEVEN, sharded(UNEVEN, quant_type), quant_type)


def fsdp2_unshards_the_same_bytes() -> None:
    """What a rank gathers is what was quantized."""
    for quant_type in KINDS:
        whole, model = Stack(ALIGNED, quant_type=quant_type), sharded(ALIGNED, quant_type)
        for mine, theirs in zip(model.layers, whole.layers, strict=True):
            mine.unshard()
            assert torch.equal(mine.weight.packed, theirs.weight.packed)
            assert torch.equal(mine.weight.dequantize(), theirs.weight.dequantize())


def fsdp2_mixed_precision_keeps_scales() -> None:
    """A bf16 policy changes the dtype of the product, never the scales."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(ALIGNED, mp_policy=policy)
    train(model, ALIGNED, steps=1)
    model.layers[0].unshard()
    weight = model.layers[0].weight
    assert weight.dtype == torch.bfloat16
    assert weight.nested_absmax.dtype == torch.float32
    assert torch.equal(weight.packed, Stack(ALIGNED).layers[0].weight.packed)


def fsdp2_state_dict_round_trip() -> None:
    """Sharded and full state dicts under the flat keys, and back into other weights."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    for quant_type in KINDS:
        model = sharded(UNEVEN, quant_type)
        state = get_model_state_dict(model)
        other = sharded(UNEVEN, quant_type)
        for layer in other.layers:
            layer.weight._local_tensor.packed.zero_()
            layer.weight._local_tensor.absmax.zero_()
        set_model_state_dict(other, state)
        full = get_model_state_dict(other, options=StateDictOptions(full_state_dict=True))
        whole = Stack(UNEVEN, quant_type=quant_type)
        if dist.get_rank() == 0:
            for key, value in whole.state_dict().items():
                assert torch.equal(full[key].reshape(-1), value.reshape(-1)), key
            whole.load_state_dict(full, strict=True)
        check_equal(UNEVEN, other, quant_type)
        for layer in other.layers:
            layer.weight._local_tensor.packed.zero_()
        dense = ("bias", "lora_A", "lora_B")
        entire = {k: v for k, v in whole.state_dict().items() if not k.endswith(dense)}
        set_model_state_dict(other, {**state, **entire})  # each rank takes its rows
        check_equal(UNEVEN, other, quant_type)


def fsdp2_checkpointing_and_compile() -> None:
    """Recomputation inside a sharded layer, and a compiled model."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = frozen(Stack(ALIGNED))
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, QuantizedLinear))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    alone = frozen(Stack(ALIGNED))
    expected = train(alone, ALIGNED)
    torch.testing.assert_close(train(model, ALIGNED), expected, rtol=1e-5, atol=0)
    compiled = torch.compile(sharded(ALIGNED), backend="aot_eager")
    x, y = batch(0, ALIGNED)
    loss = (compiled(x) - y).square().mean()
    loss.backward()
    torch.testing.assert_close(loss.item(), expected[0], rtol=1e-5, atol=0)


def ddp_of_a_whole_model() -> None:
    """A language model after ``add_lora`` under DDP as it is, and what it saved afterwards."""
    alone, model = tiny_model(), tiny_model()
    ids = token_ids(4, 16)
    share = ids[dist.get_rank() * 2 :][:2]
    wrapped = DistributedDataParallel(model)
    for net, batch_ids in ((alone, ids), (wrapped, share)):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            net(input_ids=batch_ids, labels=batch_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if theirs.requires_grad:
            difference = (mine - theirs).abs().max().item()
            assert difference < 2e-5, f"{name} differs by {difference}"


def tiny_model() -> nn.Module:
    """A quantized language model with an adapter, the same on every rank."""
    model = tiny_llama()
    qkern.quantize_model(model)
    torch.manual_seed(3)
    qkern.add_lora(model, r=4, init_lora_weights=False)
    return model


def fsdp1_shards_adapters_alone() -> None:
    """FSDP1 with the frozen parameters as ``ignored_states``; without, an error that says so."""
    try:
        FullyShardedDataParallel(frozen(Stack(ALIGNED)), use_orig_params=True, device_id=CPU)
    except qkern.ShapeError as error:
        message = str(error)
    else:
        message = "no error"
    assert "ignored_states" in message, message
    assert "FSDP2" in message, message
    model = frozen(Stack(ALIGNED))
    before = [layer.weight.packed.clone() for layer in model.layers]
    fixed = list(qkern.fsdp_ready(model).frozen)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, ignored_states=fixed, device_id=CPU
    )
    alone = frozen(Stack(ALIGNED))
    expected, got = train(alone, ALIGNED), train(wrapped, ALIGNED)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)
    for layer, packed in zip(model.layers, before, strict=True):
        assert torch.equal(layer.weight.packed, packed), "FSDP1 changed the packed bytes"


def fsdp2_shards_experts() -> None:
    """Stacked experts and their adapters, each whole on one rank: logits, gradients, state."""
    from architectures import ARCHITECTURES, output

    import qkern

    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").small()
    qkern.quantize_model(model)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    qkern.add_lora(model, r=4, init_lora_weights=False, target_parameters=parameters)
    expected = output(model)
    expected.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    experts = model.model.layers[0].mlp.experts
    assert experts._parameters["down_proj"]._local_tensor.packed.shape[0] == 2
    for turn in range(2):
        found = output(model)
        assert torch.equal(found, expected)
        if turn == 0:
            found.square().mean().backward()
            for name, parameter in model.named_parameters():
                if name in grads:
                    torch.testing.assert_close(parameter.grad.full_tensor(), grads[name])
            sharded_state = model.state_dict()
            for key, value in sharded_state.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(whole.reshape(-1), state[key].reshape(-1)), key
            model.load_state_dict(sharded_state)


CPU = torch.device("cpu")
DDP: tuple[Callable[[], None], ...] = (
    ddp_equals_one_process,
    ddp_spreads_rank_0,
    ddp_of_a_whole_model,
    fsdp1_shards_adapters_alone,
)
FSDP2: tuple[Callable[[], None], ...] = (
    fsdp2_equals_one_process,
    fsdp2_uneven_rows,
    fsdp2_unshards_the_same_bytes,
    fsdp2_mixed_precision_keeps_scales,
    fsdp2_state_dict_round_trip,
    fsdp2_checkpointing_and_compile,
    fsdp2_shards_experts,
)
# Not in torch 2.6, where gathering shards between CPU processes ends with an AttributeError.
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")
LEGS = DDP + FSDP2 if HAS_FSDP2 else DDP


def work(rank: int, folder: str, names: list[str]) -> None:
    """One of the processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=30),
    )
    for leg in LEGS:
        if not names or leg.__name__ in names:
            leg()
            dist.barrier()
            if rank == 0:
                print(f"works: {leg.__name__}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the legs named on the command line, or all."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, sys.argv[1:])
        start_processes(work, arguments, nprocs=WORLD_SIZE, start_method="fork")


if __name__ == "__main__":
    main()
