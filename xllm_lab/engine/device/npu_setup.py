"""Ascend NPUs: what has to be there, and the one line that says what is missing.

torch_npu registers itself only when imported. It could be loaded by `import torch` itself (its wheel has an entry
point for that), but then a machine without CANN could not import torch at all; `engine/__init__.py` keeps it from that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch

from xllm_lab.errors import ConfigError

DRIVER = Path("/dev/davinci_manager")  # made by the driver when it is loaded
INSTALL = "pip install 'xllm-lab[npu]'"


def is_expected() -> bool:
    """Whether this machine has both the driver and the package."""
    return DRIVER.exists() and importlib.util.find_spec("torch_npu") is not None


def load() -> None:
    """Imports torch_npu and looks for a device.

    Raises:
        ConfigError: the package, its torch, the driver, CANN or a device is missing; the first of them.
    """
    if importlib.util.find_spec("torch_npu") is None:
        raise ConfigError(f"device 'npu' needs the package torch_npu, which is not installed; accepted: {INSTALL}")
    _refuse_other_torch(importlib.metadata.version("torch_npu"), torch.__version__)
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(_why_not(" ".join(str(error).split()))) from error
    if not api().is_available():
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        seen = "" if visible is None else f" in ASCEND_RT_VISIBLE_DEVICES={visible}"
        raise ConfigError(_no_driver() or f"device 'npu': CANN and driver are there, but show no device{seen}")


def api() -> Any:
    """`torch.npu`, which is there once it is loaded."""
    return torch.npu  # type: ignore[attr-defined]


def describe() -> str:
    """The hardware and what drives it, asked of the runtime: `npu-smi` may not be there."""
    from torch_npu.npu.utils import get_cann_version

    properties = api().get_device_properties(api().current_device())
    cores = f"{properties.cube_core_num} cube and {properties.vector_core_num} vector cores"
    version, cann = importlib.metadata.version("torch_npu"), get_cann_version() or "of unknown version"
    return f"{properties.name}, {cores}, {properties.total_memory} bytes, torch_npu {version}, CANN {cann}"


def _refuse_other_torch(npu: str, other: str) -> None:
    made_for, installed = (re.match(r"\d+\.\d+\.\d+", version) for version in (npu, other))
    if made_for is None or installed is None or made_for[0] != installed[0]:
        raise ConfigError(
            f"device 'npu': torch_npu {npu} is made for another torch than {other}; accepted: the same release of "
            f"both, as by {INSTALL}"
        )


def _why_not(error: str) -> str:
    if absent := _no_driver():
        return absent
    if library := re.search(r"lib\w+\.so[.\d]*", error):
        return (
            f"device 'npu': CANN is not on the library path, {library[0]} is not found; accepted: after "
            "`source set_env.sh` of the CANN toolkit"
        )
    return f"device 'npu': torch_npu does not load: {error}"


def _no_driver() -> str | None:
    if DRIVER.exists():
        return None
    return f"device 'npu': there is no NPU driver, {DRIVER} is missing; accepted: on a machine with an Ascend NPU"
