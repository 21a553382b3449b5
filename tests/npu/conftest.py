"""Tests on the fake NPU. They run with `make test-npu`, in an environment that has torch_npu; elsewhere they are not
collected, because without the fake `import torch` itself fails where torch_npu is installed."""

from __future__ import annotations

import sys

collect_ignore_glob = ["test_*.py"]
if "tests.fake_cann.pytest_plugin" in sys.modules:
    from xllm_lab.engine.device import open_device

    collect_ignore_glob = []
    open_device(
        "cpu"
    )  # kernels of the fake are the CPU's: before the first, oneDNN is kept from matrix units that fail
