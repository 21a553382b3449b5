"""Tests on the fake NPU. They run with `make test-npu`, in an environment that has torch_npu; elsewhere they are not
collected, because without the fake `import torch` itself fails where torch_npu is installed."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if "tests.fake_cann.pytest_plugin" in sys.modules else ["test_*.py"]
