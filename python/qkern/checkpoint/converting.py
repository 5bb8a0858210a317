"""``convert_checkpoint``: quantized files in other programs' layout, or as dense ones. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

from qkern import codec
from qkern.checkpoint.block_weights import (
    METHODS,
    BlockWeights,
    as_codes,
    as_dense,
    check_carried,
    dropped,
    holds_transposed,
    leftover,
)
from qkern.checkpoint.conversion_report import ConversionReport, converted
from qkern.checkpoint.model_card import conversion_section
from qkern.checkpoint.model_config import dense_config, main_dtype, quantized_config, refuse_foreign
from qkern.checkpoint.outcomes import (
    Outcome,
    Places,
    carried,
    copied,
    in_file_order,
    written_dense,
)
from qkern.checkpoint.output_plan import OutputPlan
from qkern.checkpoint.quantization_report import QuantizationReport
from qkern.checkpoint.quantizing import quantize_checkpoint
from qkern.checkpoint.running import Progress, Run
from qkern.checkpoint.selection import why_vocabulary
from qkern.checkpoint.source import Source, StoredTensor, dtype_of_config
from qkern.checkpoint.stream import Done
from qkern.checkpoint.targets import is_conv1d, quantized_transposed
from qkern.errors import FormatError
from qkern.formats import DTYPES, QuantFormat, resolve_format

TARGETS: Final = ("qkern", "bitsandbytes", "dense", "bfloat16", "float16", "float32")


def convert_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str,
    *,
    quant_type: str | QuantFormat | None = None,
    threads: int = 0,
    mmap: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport | QuantizationReport:
    """Write a checkpoint in another layout or dtype, from file to file, without torch.

    Read are dense checkpoints, qkern's, those of bitsandbytes in 4 bits (with any
    ``quant_storage``) and int8, and MXFP4 and NVFP4 as transformers, compressed-tensors and
    ModelOpt write them. The codes of quantized weights stay as they are:

    - "qkern": codes and scales under bitsandbytes' keys, tables and states written anew;
      MXFP4 becomes the format "mxfp4", which is only read; NVFP4 is refused, as its scales are
      products that fp32 may have to round;
    - "bitsandbytes": the same, and refused is what bitsandbytes could not open;
    - a dtype: ``code * scale`` in fp32, rounded once, which is ``qkern.dequantize`` to the bit.
      Dense floating-point tensors get the dtype too, but for fp32 ones in a 16-bit model, which
      stay: it keeps them so on purpose. Stacked MXFP4 experts are transposed, as transformers'
      gpt-oss holds them; a thread then needs memory for one of them;
    - "dense": the dtype that ``config.json`` names.

    ``config.json`` says how the result is stored. Shards, their index, tied tensors and small files
    stay. Files are staged, resumed and committed as by ``quantize_checkpoint``.

    Args:
        src: a directory with safetensors files, or one such file.
        dst: a directory that is made, or that holds no checkpoint.
        to: "qkern", "bitsandbytes", "dense", "bfloat16", "float16" or "float32".
        quant_type: for a dense source that becomes a quantized one: see ``quantize_checkpoint``,
            whose report is returned then.
        threads: how many, 0 for one per core.
        mmap: map dense weights in place of copying them, which is faster. A file that is cut, or
            cannot be read, while it is mapped ends the process, and the next call goes on; with
            False it is an error.
        dry_run: only check and report what would be done; nothing is written.
        force: replace a checkpoint that is in ``dst``, and an unfinished one of other settings.
        progress: called with (bytes read since the last call, bytes of all).

    Raises:
        FileNotFoundError: if there are no safetensors weights.
        CorruptFileError: if a file is not readable, contradicts itself, or changes meanwhile.
        FormatError: for an unknown setting, for what ``to`` cannot hold without loss, and for
            "dense" where ``config.json`` names no dtype.
        NonFiniteError: for a value that is too large for float16, naming its tensor.
        OutputError: if ``dst`` cannot be written, or holds what would be replaced.
        LockedError: if another process writes there.
        OutOfSpaceError: if there is not enough room.
    """
    codec.check_choice("to", to, TARGETS)
    source, directory = Source(src), Path(dst)
    blocks = BlockWeights(source)
    _check_readable(source, blocks)
    to = _named_dtype(source) if to == "dense" else to
    if not source.is_quantized and not blocks and to not in DTYPES:
        fmt = _asked_format(source, to, quant_type)
        return quantize_checkpoint(
            src,
            dst,
            fmt,
            threads=threads,
            mmap=mmap,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    if quant_type is not None:
        msg = (
            f"{source.path}: a format is for dense sources that are quantized: "
            + ("a dtype was asked for" if to in DTYPES else "this one is quantized already; ")
            + ("" if to in DTYPES else "to change its format, convert it to a dtype first")
        )
        raise FormatError(msg)
    outcomes = _as_dense(source, to, blocks) if to in DTYPES else _as_codes(source, to, blocks)
    plan = OutputPlan(source, outcomes, {"to": to})
    run = Run(
        _Converting(plan, to), directory, threads=threads, mmap=mmap, force=force, progress=progress
    )
    return run.check_only() if dry_run else run.write()


@dataclasses.dataclass(frozen=True)
class _Converting:
    """What a run is to do, see ``running.Task``."""

    plan: OutputPlan
    to: str

    def report(self, directory: Path, done: Mapping[str, Done], **run: Any) -> ConversionReport:
        """The report; without ``run``, what happened, that of a dry run."""
        del done
        plan = self.plan
        return ConversionReport(
            source=plan.source.path,
            path=directory,
            to=self.to,
            tensors=tuple(converted(outcome) for outcome in plan.outcomes),
            tied=plan.source.tied,
            files=plan.names,
            left_out=plan.others.left_out,
            dry_run=not run,
            **run,
        )

    def check(self, report: ConversionReport) -> None:
        """Nothing is refused late."""

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        if self.to in DTYPES:
            return dense_config(self.plan.source.config, self.to)
        return quantized_config(self.plan)

    def section(self, report: ConversionReport) -> str:
        """Of the model card."""
        return conversion_section(report.to, report.summary())


def _named_dtype(source: Source) -> str:
    """The dtype that a source's own configuration names."""
    named = dtype_of_config(source.config)
    if named is None:
        msg = (
            f"to='dense' is the dtype that config.json names, and {source.path} has none that does "
            "so: name it in place of dense, bfloat16, float16 or float32 (--to bfloat16)"
        )
        raise FormatError(msg)
    return named


def _check_readable(source: Source, blocks: BlockWeights) -> None:
    """Refuse a source that is quantized in a way that is not read here, or in part."""
    refuse_foreign(source, METHODS if blocks else ())
    left = leftover(source, blocks) if blocks else ""
    if left:
        entry = source.entries[left]
        msg = (
            f"{source.path}: {left} is {entry.dtype} {list(entry.shape)}, which is neither MXFP4 "
            "nor NVFP4: checkpoints of several formats are not read; start from the dense model"
        )
        raise FormatError(msg)


def _as_dense(source: Source, dtype: str, blocks: BlockWeights) -> list[Outcome]:
    places, main = Places(source), main_dtype(source)
    transposed = transposed_weights(source)
    outcomes = []
    for tensor in in_file_order(source):
        if tensor.name in blocks.by_codes:
            outcomes.append(as_dense(blocks.by_codes[tensor.name], source, places, dtype))
        elif tensor.name in blocks.unused:
            outcomes.append(dropped(tensor))
        elif tensor.name in blocks.parts:
            continue
        elif tensor.format is not None:
            is_transposed = tensor.name in transposed
            outcomes.append(written_dense(tensor, dtype, places, transposed=is_transposed))
        elif is_cast(tensor, main):
            outcomes.append(written_dense(tensor, dtype, places))
        else:
            outcomes.append(copied(tensor, places, why_kept(tensor)))
    return outcomes


def transposed_weights(source: Source) -> set[str]:
    """Quantized weights that are the transposes of what the model's class holds."""
    quantized = [tensor for tensor in source.tensors.values() if tensor.format is not None]
    model_type = source.config.get("model_type")
    found = {tensor.name for tensor in quantized if holds_transposed(tensor, model_type)}
    conv1d = [tensor for tensor in quantized if is_conv1d(tensor, source.config)]
    is_transposed = quantized_transposed(conv1d)
    if conv1d and is_transposed is None:
        msg = (
            f"{source.path}: {conv1d[0].name} is a quantized Conv1D, and nothing says whether it "
            "is transposed: open the model with what wrote it, and save it dense there"
        )
        raise FormatError(msg)
    if is_transposed:
        found |= {tensor.name for tensor in conv1d}
    return found


def is_cast(tensor: StoredTensor, main: str) -> bool:
    """Whether a dense tensor follows the dtype of a model of which most values are of ``main``."""
    return tensor.dtype in DTYPES and (tensor.dtype != "float32" or main == "float32")


def why_kept(tensor: StoredTensor) -> str:
    """Why it does not, if that could be a surprise."""
    return "float32 in a 16-bit model: kept" if tensor.dtype == "float32" else ""


def _as_codes(source: Source, to: str, blocks: BlockWeights) -> list[Outcome]:
    check_carried(source, blocks.by_codes)
    if to == "bitsandbytes":
        _check_bitsandbytes(source, blocks)
    places, main = Places(source), main_dtype(source)
    outcomes = []
    for tensor in in_file_order(source):
        if tensor.name in blocks.by_codes:
            outcomes.append(as_codes(blocks.by_codes[tensor.name], source, places, main))
        elif tensor.name in blocks.parts:
            continue
        elif tensor.format is None:
            outcomes.append(copied(tensor, places))
        else:
            outcomes.append(carried(tensor, places))
    return outcomes


def _check_bitsandbytes(source: Source, blocks: BlockWeights) -> None:
    """Refuse what transformers could not open with bitsandbytes."""
    quantized = [tensor for tensor in source.tensors.values() if tensor.format is not None]
    reasons = {weight.name: "mxfp4 has no twin there" for weight in blocks.by_codes.values()}
    reasons |= {tensor.name: _why_not_bitsandbytes(tensor) for tensor in quantized}
    widths = {tensor.format.bits: tensor for tensor in quantized if tensor.format is not None}
    if len(widths) > 1 and not any(reasons.values()):
        reasons[widths[8].name] = "it has 8 bits and others have 4: bitsandbytes opens one of both"
    found = {name: reason for name, reason in reasons.items() if reason}
    if found:
        name, reason = next(iter(found.items()))
        msg = (
            f"{source.path}: {len(found)} tensors cannot become bitsandbytes', the first is "
            f"{name}: {reason}; convert them to a dtype (--to bfloat16), and quantize that to "
            "another format if need be"
        )
        raise FormatError(msg)


def _why_not_bitsandbytes(tensor: StoredTensor) -> str:
    fmt = tensor.format
    assert fmt is not None
    if not (fmt.kind.state or "bitsandbytes").startswith("bitsandbytes"):
        return f"{fmt.quant_type} has no twin there"
    if len(tensor.shape) != 2 or tensor.name.rpartition(".")[2] != "weight":
        return f"{list(tensor.shape)}, which is no linear layer's weight"
    if why_vocabulary(tensor).startswith("an embedding"):
        return "an embedding, which bitsandbytes keeps dense"
    return ""


def _asked_format(source: Source, to: str, quant_type: str | QuantFormat | None) -> QuantFormat:
    if quant_type is None:
        msg = (
            f"{source.path} is dense: name the format that it is to be quantized to (--format nf4)"
        )
        raise FormatError(msg)
    fmt = resolve_format(quant_type)
    if to == "bitsandbytes" and not (fmt.kind.state or "bitsandbytes").startswith("bitsandbytes"):
        msg = f"{fmt.quant_type} has no twin in bitsandbytes: nf4, fp4 and int8_row have"
        raise FormatError(msg)
    return fmt
