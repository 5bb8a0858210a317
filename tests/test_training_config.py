"""Settings of a run, and the order of its examples."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qkern import codec
from qkern.formats import QuantFormat
from qkern.training import FinetuneConfig, SettingError
from qkern.training.config import COMPUTE
from qkern.training.order import LengthGroupedOrder


def test_order_groups_lengths_and_depends_on_seed_and_epoch() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(101)]
    order = LengthGroupedOrder(lengths, batch=4, seed=3)
    first = list(order)
    assert sorted(first) == list(range(101))
    assert list(order) == first
    assert lengths[first[0]] == max(lengths)
    batches = [[lengths[i] for i in first[j : j + 4]] for j in range(0, 100, 4)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 8
    order.set_epoch(1)
    assert sorted(order) == sorted(first)
    assert list(order) != first
    assert list(LengthGroupedOrder(lengths, batch=4, seed=4)) != first


def test_int8_rows_need_no_blocksize_and_no_double_quantization() -> None:
    fmt = FinetuneConfig(quant_type="int8_row").format
    assert fmt == QuantFormat("int8_row", 0, double_quant=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0: allowed is more than 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0: allowed is 1 or more"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"dtype": "int4"}, "dtype is 'int4': allowed is auto, float32, bfloat16, float16"),
        ({"compute": "fp8"}, "compute is 'fp8': allowed is exact, int8"),
        ({"merge_into": "int4"}, "merge_into is 'int4': allowed is nf4, fp4"),
        ({"merge_into": "nf4", "lora_dropout": 0.1}, "0 and False with merge_into"),
        ({"merge_into": "nf4", "use_dora": True}, "0 and False with merge_into"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"max_length": 1}, "max_length is 1: allowed is 2 or more"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        FinetuneConfig(**changes)


def test_compute_is_what_the_codec_has() -> None:
    assert COMPUTE == codec.COMPUTE


def test_settings_survive_json() -> None:
    config = FinetuneConfig(steps=9, lora_dropout=0.1, target_modules=("q_proj", "v_proj"))
    config = dataclasses.replace(config, target_parameters=("experts.down_proj",))
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    older = {k: v for k, v in config.as_dict().items() if k != "compute"}
    assert FinetuneConfig.from_dict(older) == config


def test_steps_of_a_run() -> None:
    config = FinetuneConfig(epochs=2, batch_size=4, grad_accum=2)
    assert config.total_steps(24) == 6
    assert config.total_steps(25) == 8  # a short step at the end of each epoch
    assert config.total_steps(1) == 2
    assert dataclasses.replace(config, steps=3).total_steps(24) == 3
