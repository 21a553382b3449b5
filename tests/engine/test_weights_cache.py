"""Converted weights come back as they were, never those of another file, and nothing depends on the cache folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.tiny import tiny_model
from xllm_lab.engine import weights_cache
from xllm_lab.engine.model_config import ModelConfig, from_transformers
from xllm_lab.engine.models import weights_checksum
from xllm_lab.engine.weights import read_safetensors, read_safetensors_file
from xllm_lab.engine.weights_cache import cached_weights

Weights = dict[str, Tensor]


class Converting:
    """Stands for a slow conversion, and counts how often it was needed."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.times = weights, 0

    def __call__(self) -> Weights:
        self.times += 1
        return dict(self._weights)


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_cache, "LEAST_BYTES", 0)


@pytest.fixture
def config() -> ModelConfig:
    reference = tiny_model("llama").reference
    return from_transformers(reference.config.to_dict(), source="the tiny model")


@pytest.fixture
def converting(config: ModelConfig) -> Converting:
    return Converting(read_safetensors(tiny_model("llama").folder, config, torch.bfloat16))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"quantised")
    return path


@pytest.fixture
def load(source: Path, config: ModelConfig, converting: Converting, tmp_path: Path) -> Callable[[], Weights]:
    def loading() -> Weights:
        checksum = weights_checksum([source])
        return cached_weights(source, checksum, config, torch.bfloat16, converting, folder=tmp_path / "cache")

    return loading


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_the_second_start_reads_what_the_first_converted(
    load: Callable[[], Weights], converting: Converting, tmp_path: Path
) -> None:
    """Bit for bit, under the same names, in the same order."""
    first, second = load(), load()
    assert converting.times == 1
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(kept(tmp_path)) == 1


def test_a_changed_file_is_converted_anew(
    load: Callable[[], Weights], converting: Converting, source: Path, tmp_path: Path
) -> None:
    """Whether its bytes changed or only its time of change, for a checksum of samples may miss a byte."""
    load()
    source.write_bytes(b"quantized")
    load()
    os.utime(source, ns=(1, 1))
    load()
    load()
    assert converting.times == 3
    assert len(kept(tmp_path)) == 1, "old weights stay for ever"


def test_a_broken_copy_is_replaced(load: Callable[[], Weights], converting: Converting, tmp_path: Path) -> None:
    """The disk was full, or somebody else's tool was there."""
    load()
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    load()
    load()
    assert converting.times == 2


def test_a_folder_that_cannot_be_written_costs_time_only(
    load: Callable[[], Weights], converting: Converting, tmp_path: Path
) -> None:
    """The cache folder's name is taken by a file."""
    (tmp_path / "cache").write_text("not a folder")
    assert list(load()) == list(load())
    assert converting.times == 2


def test_small_models_are_not_kept(
    load: Callable[[], Weights], converting: Converting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fill the folder with files that save nothing."""
    monkeypatch.setattr(weights_cache, "LEAST_BYTES", 1 << 24)
    load()
    load()
    assert converting.times == 2
    assert kept(tmp_path) == []


def test_vectors_do_not_keep_the_file_in_memory(tmp_path: Path) -> None:
    """A model packs its matrices and lets go of them; norms and biases stay, and must not hold the mapped file."""
    # A copy of its own: some other test's model may have the original mapped.
    path = Path(shutil.copy(tiny_model("llama_biased").folder / "model.safetensors", tmp_path))
    weights = read_safetensors_file(path, torch.float32)
    assert str(path) in Path("/proc/self/maps").read_text(), "matrices are copied: this test shows nothing"
    vectors = [w for w in weights.values() if w.dim() == 1]
    del weights
    assert vectors
    assert str(path) not in Path("/proc/self/maps").read_text()
