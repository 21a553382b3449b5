"""Weights of quantised files as they are computed with, kept in the cache folder, because converting them takes a CPU
second for each hundred million.

    weights-<file>-<dtype>-<state>.safetensors      file: the path; state: its contents and how we convert them

There is one for each file and dtype: a new state replaces the old one. What cannot be read is converted anew, and where
nothing can be written, every start converts.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.weights import checked, read_safetensors_file
from xllm_lab.errors import ModelError

# Smaller models are converted in less time than a file takes to find.
LEAST_BYTES = 1 << 24
_MOST_OF_FREE_DISK = 0.1
_CONVERTERS = ("gguf_file.py", "gguf_weights.py", "weights_cache.py")


def cached_weights(
    path: Path,
    checksum: str,
    config: ModelConfig,
    dtype: torch.dtype,
    convert: Callable[[], dict[str, Tensor]],
    *,
    folder: Path,
) -> dict[str, Tensor]:
    """The weights of `path`, as `convert` gives them.

    Args:
        checksum: of what is in `path`; its time of change counts as well.
        folder: where converted weights are kept.

    Raises:
        ModelError: what `convert` raises.
    """
    kind = f"weights-{_digest(str(path.resolve()))}-{str(dtype).removeprefix('torch.')}-"
    kept = folder / f"{kind}{_state(path, checksum)}.safetensors"
    if kept.exists():
        with contextlib.suppress(ModelError):
            return checked(read_safetensors_file(kept, dtype), config, source=str(kept))
    weights = convert()
    with contextlib.suppress(OSError):
        _keep(weights, kept, kind)
    return weights


def _keep(weights: dict[str, Tensor], kept: Path, kind: str) -> None:
    from safetensors.torch import save_file

    num_bytes = sum(w.nbytes for w in weights.values())
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not LEAST_BYTES <= num_bytes <= _MOST_OF_FREE_DISK * shutil.disk_usage(kept.parent).free:
        return
    with tempfile.TemporaryDirectory(dir=kept.parent) as own:
        fresh = Path(own, kept.name)
        save_file(weights, fresh)
        for old in kept.parent.glob(f"{kind}*.safetensors"):
            old.unlink(missing_ok=True)  # who has it mapped keeps it
        fresh.replace(kept)


def _state(path: Path, checksum: str) -> str:
    told = path.stat()
    sources = [(Path(__file__).parent / name).read_bytes().hex() for name in _CONVERTERS]
    return _digest(checksum, str(told.st_size), str(told.st_mtime_ns), version("gguf"), *sources)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
