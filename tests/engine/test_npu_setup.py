"""What is missing for an NPU is said in one line, by a fresh process as users start one.

The packages here are our own, of a few lines, laid over the environment: what is shown is what we make of how torch_npu
fails, not torch_npu.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from xllm_lab.engine.device import npu_setup

TORCH = torch.__version__.partition("+")[0]
NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"


def package(folder: Path, version: str, program: str, *, autoload: bool = False) -> Path:
    """A torch_npu as an installer leaves it: importable, with its version and torch's entry point."""
    facts = folder / f"torch_npu-{version}.dist-info"
    (folder / "torch_npu").mkdir(parents=True)
    facts.mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(textwrap.dedent(program))
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    if autoload:
        (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def opened(folder: Path, driver: Path, **variables: str) -> tuple[int, list[str]]:
    """Exit status and lines of stderr of a replay on an NPU, on a machine with that driver, if its torch loads."""
    program = f"""
        import sys
        from pathlib import Path
        from xllm_lab.cli import run
        from xllm_lab.errors import ConfigError
        try:
            from xllm_lab.engine.device import npu_setup
            npu_setup.DRIVER = Path({str(driver)!r})
        except ConfigError:
            pass
        sys.exit(run(sys.argv[1:]))
    """
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    trace = driver.parent / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,4,2\n")
    words = ("replay", str(trace), "--device", "npu", "--out", str(driver.parent / "run"), "--quiet")
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        env={**environment, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "davinci_manager"
    path.touch()
    return path


def test_another_torch(tmp_path: Path, driver: Path) -> None:
    """Found before the package is imported, which would fail on a symbol that nobody has heard of."""
    folder = package(tmp_path / "site", "2.1.0.post4", "raise AssertionError('imported')")
    status, lines = opened(folder, driver)
    assert (status, len(lines)) == (2, 1)
    assert f"torch_npu 2.1.0.post4 is made for another torch than {torch.__version__}; accepted" in lines[0]


def test_no_driver(tmp_path: Path) -> None:
    folder = package(tmp_path / "site", f"{TORCH}.post3", NO_CANN)
    status, lines = opened(folder, tmp_path / "absent")
    assert (status, len(lines)) == (2, 1)
    assert f"there is no NPU driver, {tmp_path / 'absent'} is missing" in lines[0]


def test_no_cann(tmp_path: Path, driver: Path) -> None:
    status, lines = opened(package(tmp_path / "site", TORCH, NO_CANN), driver)
    assert (status, len(lines)) == (2, 1)
    assert "CANN is not on the library path, libhccl.so is not found; accepted: after `source set_env.sh`" in lines[0]


def test_a_package_that_torch_would_load_by_itself(tmp_path: Path, driver: Path) -> None:
    """Without CANN, its entry point breaks `import torch`, for those who never asked for an NPU, too."""
    folder = package(tmp_path / "site", TORCH, NO_CANN, autoload=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    for program, works in (("import torch", False), ("import xllm_lab.engine.engine", True)):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, capture_output=True, check=False)
        assert (done.returncode == 0) is works, done.stderr.decode()
    status, lines = opened(folder, driver)
    assert (status, len(lines)) == (2, 1)
    assert "CANN is not on the library path" in lines[0]
    status, lines = opened(folder, driver, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (status, len(lines)) == (2, 1)
    assert "accepted: TORCH_DEVICE_BACKEND_AUTOLOAD=0" in lines[0]


def test_no_device(tmp_path: Path, driver: Path) -> None:
    """Everything loads, and shows none; perhaps because of what hides them."""
    shows_none = """
        import types, torch
        torch.npu = types.SimpleNamespace(is_available=lambda: False)
    """
    folder = package(tmp_path / "site", TORCH, shows_none)
    status, lines = opened(folder, driver, ASCEND_RT_VISIBLE_DEVICES="7")
    assert (status, len(lines)) == (2, 1)
    assert "CANN and driver are there, but show no device in ASCEND_RT_VISIBLE_DEVICES=7" in lines[0]


def test_something_else(tmp_path: Path, driver: Path) -> None:
    """In its own words, on one line."""
    folder = package(tmp_path / "site", TORCH, "raise RuntimeError('two\\nlines')")
    status, lines = opened(folder, driver)
    assert (status, len(lines)) == (2, 1)
    assert "torch_npu does not load: two lines" in lines[0]


def test_auto_wants_driver_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either alone is a machine that computes on its CPU."""
    monkeypatch.setattr(npu_setup, "DRIVER", tmp_path / "davinci_manager")
    assert not npu_setup.is_expected()
    (tmp_path / "davinci_manager").touch()
    package(tmp_path / "site", TORCH, "")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert npu_setup.is_expected()
