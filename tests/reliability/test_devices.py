"""Adapter and base on different devices or of different dtypes; where kernels are launched."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_net import adapted, assert_same_parts, inputs, parts_of, quantized
from torch import nn

import qkern
from qkern.layers import QLoRALinear

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def on_meta(layer: QLoRALinear) -> None:
    """Leave one half of the adapter behind, as a move that misses it does."""
    holder = next(module for module in layer.modules() if "lora_A" in module._parameters)
    holder.lora_A = nn.Parameter(layer.lora_A.to("meta"))


# -- devices ---------------------------------------------------------------------------------


@pytest.mark.case("D22")
def test_adapters_are_made_where_the_base_is_and_move_with_it() -> None:
    model = quantized().to("meta")
    qkern.add_lora(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    other = adapted()
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert all(parameter.is_meta for parameter in other.to("meta").parameters())


@pytest.mark.case("D22")
@pytest.mark.parametrize(
    ("work", "text"),
    [
        (lambda m, _: m(inputs()), r"up has its weight on cpu, lora_A is on meta: move one"),
        (lambda m, _: qkern.merge_adapter(m), r"down: its weight is on cpu.*cpu, meta.*nothing"),
        (qkern.save_adapter, "on meta, where it has no values to save"),
    ],
)
def test_half_an_adapter_elsewhere_is_an_error_that_changes_nothing(
    work: object, text: str, tmp_path: Path
) -> None:
    model = adapted()
    before = parts_of(model)
    on_meta(model.up if "lora_A" in text or "save" in text else model.down)
    with pytest.raises(qkern.DeviceError, match=text):
        work(model, tmp_path)
    assert_same_parts(model, before)
    assert not model.up.merged
    assert not any(tmp_path.iterdir())


@pytest.mark.case("D22")
def test_a_model_on_meta_takes_no_adapters_values(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    model = quantized().to("meta")
    with pytest.raises(qkern.DeviceError, match=r"is on meta.*load the base model first"):
        qkern.load_adapter(model, tmp_path)
    assert not any(isinstance(module, QLoRALinear) for module in model.modules())
    empty = adapted().to("meta")
    with pytest.raises(qkern.DeviceError, match="both on one device that holds values"):
        qkern.merge_adapter(empty)


# -- dtypes ----------------------------------------------------------------------------------


@pytest.mark.case("D22")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("base", FLOATS)
def test_an_adapter_of_any_dtype_serves_a_base_of_any(
    base: torch.dtype, dtype: torch.dtype
) -> None:
    model = quantized().to(base)
    torch.manual_seed(1)
    qkern.add_lora(model, r=3, dtype=dtype, init_lora_weights=False)
    x = inputs().to(base)
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == base
    assert model.up.lora_A.dtype == model.up.lora_A.grad.dtype == dtype
    assert model.up.lora_A.grad.norm() > 0
    single = quantized()  # the same factors, all in fp32
    qkern.add_lora(single, r=3, init_lora_weights=False)
    for mine, theirs in ((m, getattr(model, n)) for n, m in single.named_children()):
        if isinstance(mine, QLoRALinear):
            mine.lora_A.data.copy_(theirs.lora_A)
            mine.lora_B.data.copy_(theirs.lora_B)
    expected = single(inputs())
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(base, 1e-4)
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.case("D22")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_another_dtype_are_taken_with_their_values(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    trained = adapted()
    for module in trained.modules():
        if isinstance(module, QLoRALinear):
            module.lora_A.data, module.lora_B.data = (
                t.data.to(dtype) for t in (module.lora_A, module.lora_B)
            )
    qkern.save_adapter(trained, tmp_path)
    model = quantized()
    qkern.load_adapter(model, tmp_path)
    assert model.up.lora_A.dtype == torch.float32
    assert torch.equal(model.up.lora_A, trained.up.lora_A.float())
    torch.testing.assert_close(model(inputs()), trained(inputs()))
    before = parts_of(model)
    for each in (trained, model):  # whatever the dtypes of its factors
        qkern.merge_adapter(each)
        qkern.unmerge_adapter(each)
        assert_same_parts(each, before)


@pytest.mark.case("D22")
def test_an_input_elsewhere_or_of_another_kind_is_named() -> None:
    model = adapted()
    for x, error in (
        (inputs().to("meta"), qkern.DeviceError),
        (inputs().long(), qkern.DTypeError),
    ):
        with pytest.raises(error, match="up"):
            model.up(x)


@pytest.mark.case("D22")
def test_pefts_adapters_follow_a_base_of_bfloat16(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(quantized().bfloat16(), config)
    expected = model(inputs().bfloat16())
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized().bfloat16(), tmp_path, torch_device="cpu")
    assert torch.equal(again(inputs().bfloat16()), expected)


# -- launches --------------------------------------------------------------------------------

KERNELS = Path(qkern.__file__).parent / "kernels"


def launches(tree: ast.Module) -> list[tuple[ast.Call, list[ast.AST]]]:
    """Calls of the kind ``_some_kernel[grid](...)``, each with what is around it."""
    found = []

    def visit(node: ast.AST, around: list[ast.AST]) -> None:
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith(
            ("_kernel", "]")
        ):
            found.append((node, around))
        for child in ast.iter_child_nodes(node):
            visit(child, [*around, node])

    visit(tree, [])
    return found


def sets_device(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and any(
        "cuda.device_of(" in ast.unparse(item.context_expr) for item in node.items
    )


@pytest.mark.case("D23")
def test_every_launch_is_on_its_operands_device() -> None:
    """Triton launches on the current device and its current stream, whatever the operands are."""
    count = 0
    for file in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for call, around in launches(tree):
            count += 1
            if any(map(sets_device, around)):
                continue
            inside = next(n.name for n in reversed(around) if isinstance(n, ast.FunctionDef))
            callers = [
                a
                for n, a in calls_of(tree, inside)
                if not any(isinstance(x, ast.FunctionDef) and x.name == inside for x in a)
            ]
            where = f"{file.name}:{call.lineno} in {inside}"
            assert callers, f"{where} is launched on the current device, not on its operands'"
            assert all(any(map(sets_device, a)) for a in callers), where
    assert count >= 15


def calls_of(tree: ast.Module, name: str) -> list[tuple[ast.Call, list[ast.AST]]]:
    found = []

    def visit(node: ast.AST, around: list[ast.AST]) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            found.append((node, around))
        for child in ast.iter_child_nodes(node):
            visit(child, [*around, node])

    visit(tree, [])
    return found


LAUNCHER = Path(__file__).parents[1] / "launch_worker.py"


@pytest.mark.case("D23")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="kernels need triton")
def test_a_driver_is_asked_for_the_operands_device_and_its_stream() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (KERNELS.parents[1], LAUNCHER.parent)))
    run = subprocess.run(
        [sys.executable, str(LAUNCHER)],
        env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1] == "done"
    assert {line.split()[0] for line in lines[:-1]} >= {
        "_matvec_kernel",
        "_matmul_small_kernel",
        "_matmul_kernel",
        "_dequantize_kernel",
        "_quantize_4bit_kernel",
        "_hidden_kernel",
        "counters",
    }
    assert all(line.endswith("device 1 stream 7") for line in lines[:-1]), run.stdout
