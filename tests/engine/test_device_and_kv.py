"""Devices say what they are; the pool refuses what does not fit."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from xllm_lab.engine.device import Device, open_device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.errors import ConfigError

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=10,
    hidden_size=16,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=32,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def test_the_cpu_describes_itself(device: Device) -> None:
    """For the manifest: the machine and the threads."""
    assert device.name == device.torch_device.type == "cpu"
    assert "1 threads" in device.description
    free_bytes, total_bytes = device.memory()
    assert 0 < free_bytes <= total_bytes
    device.synchronize()


def test_auto_finds_something() -> None:
    assert open_device("auto").name in {"cpu", "cuda", "npu"}


def test_an_unknown_device() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is unknown; accepted are cpu, cuda, npu, auto"):
        open_device("tpu")


def test_no_threads() -> None:
    with pytest.raises(ConfigError, match="threads is 0, at least 1 is accepted"):
        open_device("cpu", threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_accelerator_names_what_is_there() -> None:
    with pytest.raises(ConfigError, match="device 'cuda' is not available here; available are cpu"):
        open_device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="it is installed")
def test_npu_without_its_package() -> None:
    with pytest.raises(ConfigError, match="needs the package torch_npu, which is not installed; accepted: pip install"):
        open_device("npu")


def test_the_pool_counts_its_bytes(device: Device) -> None:
    """2 (K and V) x 3 layers x 2 heads x 4 x 2 bytes = 96 bytes a token."""
    assert CONFIG.kv_bytes_per_token(torch.bfloat16) == 96
    pool = KvPool(CONFIG, num_blocks=5, block_size=8, dtype=torch.bfloat16, device=device)
    assert pool.num_bytes == 5 * 8 * 96 == sum(t.numel() * t.itemsize for layer in pool.layers for t in layer)
    assert all(t.shape == (5, 8, 2, 4) for layer in pool.layers for t in layer)


def test_a_pool_that_does_not_fit(device: Device) -> None:
    with pytest.raises(ConfigError, match=r"num_blocks is 10{12}: .* are free on cpu; at most \d+ blocks are accepted"):
        KvPool(CONFIG, num_blocks=10**12, block_size=8, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "message"), [(0, 8, "num_blocks is 0"), (8, 0, "block_size is 0")]
)
def test_an_empty_pool(device: Device, num_blocks: int, block_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}, at least 1 is accepted"):
        KvPool(CONFIG, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device=device)
