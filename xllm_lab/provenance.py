"""Where a number comes from: versions, commit, hardware. Written into every manifest."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("xllm-lab", "numpy", "pyarrow", "scipy", "torch", "torch-npu", "transformers", "simpy", "optuna"),
    "mooncake-transfer-engine-non-cuda",
)


def versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed, and which build of this package runs."""
    found = {"python": platform.python_version(), "build": build()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def build() -> str:
    """`compiled` if the control loop is a C extension (see setup.py), else `pure`."""
    found = importlib.util.find_spec("xllm_lab.scheduler")
    assert found is not None, "a package without its scheduler"
    return "pure" if str(found.origin).endswith(".py") else "compiled"


def commit() -> str:
    """Commit of the checkout the package runs from, `-dirty` if it differs; "none" for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        name = _git(here, "rev-parse", "HEAD")
        return name + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def hardware() -> dict[str, str | int]:
    """CPU model, cores this process may use, memory in bytes, operating system."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
