"""GGUF files (quantised, llama.cpp's format) to trainable safetensors directories.

Weights stay rounded to the file's few bits, so quality is a little below the original's.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from headwater.assets import cache_dir, sha256_file

LAYOUT = 1  # raise when the written directory changes, so that old conversions are not reused


def is_gguf(path: Path) -> bool:
    """Whether a file begins with the GGUF magic; the name does not matter."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def convert_gguf(path: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Directory with weights of `dtype`, configuration, tokenizer and chat template, readable by plain transformers.

    Converted once per file content and dtype (14-90 s, about 2 bytes a parameter in bfloat16), then found in the cache;
    the directory is renamed into place when complete. Raises ValueError without the extra `gguf` and for other files.
    """
    if not is_gguf(path):
        raise ValueError(f"{path} is not a GGUF file (it must exist and begin with the bytes 'GGUF')")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"reading {path.name} needs {' and '.join(missing)}: pip install 'headwater[gguf]'")
    root = cache_dir() / "converted"
    target = root / f"{sha256_file(path)}-{str(dtype).removeprefix('torch.')}-{LAYOUT}"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".convert-", ignore_cleanup_errors=True) as work:
        built = Path(work) / "model"
        _write(path, built, dtype)
        try:
            os.rename(built, target)
        except OSError:
            # Another process finished the same conversion first; its directory is as good.
            if not target.exists():
                raise
    return target


def _write(path: Path, directory: Path, dtype: torch.dtype) -> None:
    source, name = str(path.parent), path.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=dtype)
    _forget_quantization(model)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(directory)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Drop the marks a GGUF load leaves on plain dense weights, which make `save_pretrained` refuse them."""
    model.hf_quantizer = None  # pyright: ignore -- set by the GGUF loader, not declared
    for owner, names in ((model.config, ("quantization_config",)), (model, ("is_quantized", "quantization_method"))):
        for name in names:
            vars(owner).pop(name, None)
