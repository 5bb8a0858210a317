"""lm-eval's ``hf`` model class over a model before and after it is quantized.

    pip install "qkern[train,eval]"
    python examples/lm_eval/compare.py MODEL_DIR    # dense, then NF4
    python examples/lm_eval/compare.py QKERN_DIR    # what qkern.save or qkern quantize wrote

The tasks are the two of this folder, whose twelve lines are in ``stories.jsonl``: no network.
They show that it works; they are too few to judge a model by.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# lm_eval and datasets ask the hub about local files too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkern
from qkern.checkpoint.load import is_quantized
from qkern.training.libraries import quiet_libraries

HERE = Path(__file__).resolve().parent
TASKS = ("qkern_cloze", "qkern_text")


def stories() -> list[dict[str, Any]]:
    """The rows that the tasks are made of."""
    lines = (HERE / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def evaluate(model: Any, tokenizer: Any = None, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """The results of lm-eval.

    Args:
        model: a causal language model of transformers, dense or quantized; or the path of one, with
            its tokenizer. One that transformers saved by a ``QkernConfig`` opens by path once
            ``qkern.integrations.transformers`` is imported.
        tokenizer: of a model in memory.
        tasks: of this folder.
    """
    manager = TaskManager(include_path=str(HERE), include_defaults=False)
    if isinstance(model, str):
        wrapped = HFLM(pretrained=str(Path(model).resolve()), device="cpu", batch_size=4)
    else:
        wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4)
    before = Path.cwd()
    os.chdir(HERE)  # where the tasks look for their file
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
        )
    finally:
        os.chdir(before)
    return results


def main() -> int:
    """Print a table for each form of the model; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a model directory, dense or quantized")
    parser.add_argument("--quant-type", default="nf4", help="what a dense one becomes")
    parser.add_argument("--adapter", type=Path, help="what qkern or PEFT wrote, over the quantized")
    args = parser.parse_args()
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if is_quantized(args.model):
        forms = {"as it is": qkern.load(args.model)}
    else:
        quantized = qkern.load(args.model, quant_type=args.quant_type)
        dense = AutoModelForCausalLM.from_pretrained(args.model)
        forms = {"dense": dense, args.quant_type: quantized}
    if args.adapter is not None:
        qkern.load_adapter(list(forms.values())[-1], args.adapter)
    for name, model in forms.items():
        print(f"\n{args.model.name}, {name}")
        print(make_table(evaluate(model, tokenizer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
