"""Files that go with a model's weights: which of them a quantized copy of it gets too. No torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from qkern.checkpoint.staging import FOLDER

# Weights in any format, and what may hold code that runs when it is opened.
_WEIGHTS: Final = (
    *(".bin", ".ckpt", ".ggml", ".gguf", ".h5", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx"),
    *(".onnx_data", ".ot", ".pkl", ".pt", ".pt2", ".pte", ".pth", ".safetensors", ".tflite"),
)
_ADAPTER: Final = ("adapter_config.json",)
_QUANTIZATION: Final = ("hf_quant_config.json", "quantize_config.json")


class OtherFiles(NamedTuple):
    """What lies beside the weights.

    Args:
        carried: names of files that are copied; "/" separates folders.
        left_out: why each other file or folder is not.
    """

    carried: tuple[str, ...]
    left_out: dict[str, str]


def other_files(directory: Path, written: Collection[str]) -> OtherFiles:
    """The files beside a checkpoint.

    Folders are carried whole, if there are no weights anywhere in them.

    Args:
        directory: of the checkpoint.
        written: names of files that are read, or made anew: the weights, their index, ...
    """
    carried: list[str] = []
    left_out: dict[str, str] = {}
    for path in sorted(directory.iterdir()):
        if path.name in written or path.name == FOLDER:
            continue
        reason = _why_not(path)
        if reason:
            left_out[path.name] = reason
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if not p.is_dir())
            reasons = (_why_not(p) for p in inside)
            if path.is_symlink() or next(filter(None, reasons), ""):
                left_out[f"{path.name}/"] = "a folder with weights, links or hidden files"
            else:
                carried += [p.relative_to(directory).as_posix() for p in inside]
        else:
            carried.append(path.name)
    return OtherFiles(tuple(carried), left_out)


def _why_not(path: Path) -> str:
    name = path.name
    if name.startswith("."):
        return "hidden"
    if name in _QUANTIZATION:
        return "says how the source is quantized"
    if name in _ADAPTER:
        return "an adapter of the dense model"
    if path.suffix.lower() in _WEIGHTS or name.endswith((*_WEIGHTS, ".index.json")):
        return "other weights"
    if not path.is_file() and not path.is_dir():
        return "no regular file"
    return ""
