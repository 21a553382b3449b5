"""The real engine: plain PyTorch on npu, cuda and cpu. Read `engine.py`, then `runner.py`, then `model.py`."""

import os

from xllm_lab.errors import ConfigError

# An accelerator's package that is installed but cannot work here would break `import torch` itself; the device that a
# user asks for is loaded by `device`, which says what is missing.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
try:
    import torch  # noqa: F401
except RuntimeError as error:
    raise ConfigError(
        f"torch does not load: {' '.join(str(error).split())[:200]}; accepted: TORCH_DEVICE_BACKEND_AUTOLOAD=0 or unset"
    ) from error
