"""The GPU side beside other packages and the limits of the device.

python benches/bench_gpu.py [--stages linear,train] [--budget 540] [--out FILE] [--no-peers]
                            [--resume FILE]
python benches/bench_gpu.py --quick --device cpu

Kernels are compiled by several processes first. Cells then run in the order of their importance
until the budget (seconds) is spent; results are on disk after each, and --resume goes on from them.
Every engine is checked against fp64 before it is timed; engines take turns; weights rotate through
several times the L2; calls are replayed as CUDA graphs where they can be captured. Peers that are
missing are listed with the reason. Stages:

ceilings  copy, read, bf16 products, launches
checks    each operation on ragged shapes against fp64 and the host's bytes
decode    ways to look up a 4-bit code
linear    y = x W^T from 1 to 8192 tokens: cuBLAS, bitsandbytes, Unsloth's sequence of calls
train     forward and backward with LoRA, beside those and PEFT
model     eight blocks of Llama 8B: tokens/s and peak memory
codec     quantize and dequantize beside a copy

--quick on a CPU runs all of it on tiny shapes in Triton's interpreter: its times mean nothing.
Ends with 1 where a result is wrong or a cell failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
STAGES = ("ceilings", "checks", "decode", "linear", "train", "model", "codec")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does everything run?")
    parser.add_argument("--no-peers", action="store_true", help="qkern and torch alone")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all")
    parser.add_argument("--out", type=Path, help="results/gpu.json unless --quick")
    parser.add_argument("--resume", type=Path, help="results whose cells are not run again")
    parser.add_argument("--workers", type=int, default=0, help="that compile; 0: by cores")
    parser.add_argument("--worker", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages = tuple(options.stages.split(","))
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(STAGES)}")
    if options.device == "cpu" and not options.quick:
        parser.error("on a CPU kernels are interpreted: nothing but --quick makes sense")
    if options.out is None and not options.quick:
        options.out = HERE / "results" / "gpu.json"
    return options


def for_processes(options: argparse.Namespace) -> list[str]:
    """The options that a process of the same bench needs."""
    arguments = ["--stages", ",".join(options.stages), "--device", options.device]
    arguments += ["--quick"] * options.quick + ["--no-peers"] * options.no_peers
    return arguments + ["--out", str(options.out)] * (options.out is not None)


def main(arguments: list[str] | None = None) -> int:
    """Run, write and print; 1 where something is wrong."""
    start = time.time()
    options = parsed(arguments)
    if options.device == "cpu":  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    import gpu_run
    import torch
    from gpu_plan import Plan

    if options.device != "cpu" and not torch.cuda.is_available():
        print("error: torch sees no GPU here: --quick --device cpu shows that all runs")
        return 1
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    plan = Plan(device, options.quick, not options.no_peers)
    if options.compile:
        index, count = map(int, options.compile.split("/"))
        gpu_run.compile_share(plan, options.stages, index, count)
        return 0
    if options.worker is not None:
        results = gpu_run.Results.load(options.out)
        intact = gpu_run.work(plan, options.stages, results, options.worker)
        return 0 if intact else gpu_run.LOST
    return measure(options, plan, start)


def measure(options: argparse.Namespace, plan: object, start: float) -> int:
    """All of it: by processes on a GPU, here where it is quick."""
    import gpu_device
    import gpu_report
    from gpu_plan import Plan
    from gpu_run import Results, compile_in_parallel, supervise, work

    assert isinstance(plan, Plan)
    deadline = start + options.budget
    results = Results(options.out)
    content = results.content
    content["quick"] = plan.quick
    if plan.quick:
        content["meaning"] = "tiny cases, to see that all runs: no time here means anything"
    content["machine"] = gpu_device.facts(plan.device)
    content["before"] = gpu_device.state(plan.device)
    if options.resume is not None:
        why_not = results.resume(options.resume)
        done = f"not resumed: {why_not}" if why_not else f"{len(content['done'])} cells are done"
        print(f"{options.resume}: {done}", flush=True)
    results.save()
    if plan.quick:
        work(plan, options.stages, results, deadline)
    else:
        workers = options.workers or min(12, max((os.cpu_count() or 2) - 2, 1))
        seconds = compile_in_parallel(for_processes(options), workers)
        content["compiled"] = {"seconds": round(seconds, 1), "processes": workers}
        results.save()
        print(f"compiled by {workers} processes in {seconds:.0f} s", flush=True)
        supervise(for_processes(options), options.out, deadline)
        results = Results.load(options.out)
        content = results.content
    content["after"] = gpu_device.state(plan.device)
    content["goals"] = [] if plan.quick else gpu_report.goals(results.rows)
    content["seconds"] = round(time.time() - start, 1)
    results.save()
    print(gpu_report.report(content))
    if options.out is not None:
        print(f"wrote {options.out}")
    wrong = [row for row in results.rows if row.get("wrong")]
    return int(bool(wrong or content["failed"]))


if __name__ == "__main__":
    sys.exit(main())
