"""Tests on the fake NPU. They run with `make test-npu`, in an environment that has torch_npu; elsewhere they are not
collected, because without the fake `import torch` itself fails where torch_npu is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

collect_ignore_glob = ["test_*.py"]
if "tests.fake_cann.pytest_plugin" in sys.modules:
    from xllm_lab.engine.device import open_device

    collect_ignore_glob = []
    open_device(
        "cpu"
    )  # kernels of the fake are the CPU's: before the first, oneDNN is kept from matrix units that fail


@pytest.fixture(autouse=True)
def _back_to_the_default_stream() -> Iterator[None]:
    """A capture that fails leaves its own one behind."""
    yield
    npu = sys.modules.get("torch_npu.npu")
    if npu is not None and npu.is_initialized():
        npu.set_stream(npu.default_stream())
