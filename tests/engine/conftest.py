"""One CPU device with one thread for all engine tests.

The wait policy must be set before torch is imported: threads that spin on a busy machine make steps 50 times slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from xllm_lab.engine.device import Device, open_device
from xllm_lab.engine.models import LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def device() -> Device:
    """Opened before any test computes, because oneDNN settles on an instruction set at its first operator."""
    return open_device("cpu", threads=1)


@pytest.fixture(scope="session")
def smollm2(device: Device) -> LoadedModel:
    """The embedded model in float32, loaded once."""
    return load_model("smollm2-135m", device=device, dtype=torch.float32)
