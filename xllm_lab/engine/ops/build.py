"""Compiling `kernels/` with the system's compiler on first use, once per source, compiler and kind of core.

The result lies in the user's cache folder. Processes that compile at the same time each write a file of their own and
rename it: whoever comes last wins, and nobody reads half a library.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from xllm_lab.engine.device import cpu_facts

SOURCES = Path(__file__).parent / "kernels"
# No -ffast-math: sums may not be reordered behind our back, and infinities and NaNs stay what they are.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared", "-Wno-psabi"),
)
_COMPILE_SECONDS = 300


class NotBuiltError(Exception):
    """The kernels cannot be had here; the message says why. Callers fall back, users never see it."""


def library() -> Path:
    """The compiled kernels, from the cache or made now.

    Raises:
        NotBuiltError: no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = _compiler()
    try:
        built = cache_folder() / f"kernels-{_key(compiler)}.so"
        if not built.exists():
            _compile(compiler, built)
    except OSError as error:
        raise NotBuiltError(f"the cache folder {cache_folder()} cannot be used: {error}") from error
    return built


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/xllm-lab`, or ~/.cache/xllm-lab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "xllm-lab")


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "c++"):
        if found := shutil.which(name):
            return found
    raise NotBuiltError(f"no C++ compiler: {asked or 'g++'} is not on the path")


def _key(compiler: str) -> str:
    facts = cpu_facts()
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    for part in (*FLAGS, _version(compiler), facts.model_name, *sorted(facts.flags)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _compile(compiler: str, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder, built.name)
        _run([compiler, *FLAGS, str(SOURCES / "all.cpp"), "-o", str(fresh)])
        fresh.replace(built)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        raise NotBuiltError(f"{command[0]} failed: {first}") from error
    except (subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise NotBuiltError(f"{command[0]} failed: {error}") from error
    return done.stdout
