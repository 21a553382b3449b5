"""Compiles the stub CANN runtime with g++ against the headers of the installed torch_npu wheel.

`python -m tests.fake_cann.build [FOLDER]` prints the folder of the libraries. They are built again when a source, the
wheel's version or the compiler changes; a library takes a few seconds. The folder defaults to build/npu/lib.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "src"
DEFAULT_FOLDER = Path(__file__).parents[2] / "build" / "npu" / "lib"
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")

# Library, its sources, and the libraries of ours it needs. torch_npu asks for more names: those stay empty.
LIBRARIES = {
    "ascendcl": (("control", "scheduler", "graph", "memory", "runtime"), ()),
    "acl_op_compiler": (("op_compiler",), ("ascendcl",)),
    "hccl": (("hccl",), ("ascendcl",)),
    "ge_runner": ((), ()),
    "graph": ((), ()),
    "acl_tdt_channel": ((), ()),
}
# The allocator's listener: compiled against torch itself, and loaded after it.
POISON = "fake_poison"


def site_packages(package: str) -> Path:
    """The folder of an installed package, found without importing it (torch imports torch_npu, which needs us)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is not installed in {sys.prefix}: run `make test-npu`")
    return Path(spec.origin).parent


def _fingerprint() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(importlib.metadata.version("torch_npu").encode())
    digest.update(subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout)
    return digest.hexdigest()


def _compile(out: Path, sources: list[Path], arguments: list[str]) -> None:
    command = ["g++", *FLAGS, "-o", str(out), *map(str, sources), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(folder: Path = DEFAULT_FOLDER) -> Path:
    """Makes the libraries in `folder` unless they are there already; returns `folder`."""
    stamp = folder / "fingerprint"
    fingerprint = _fingerprint()
    if stamp.exists() and stamp.read_text() == fingerprint:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    include = site_packages("torch_npu") / "include"
    third_party = include / "third_party"
    folders = (include, third_party / "acl" / "inc", third_party / "hccl" / "inc")
    headers = [f"-isystem{one}" for one in folders]
    empty = folder / "empty.cpp"
    empty.write_text("")
    for name, (sources, needed) in LIBRARIES.items():
        paths = [SOURCE / f"{source}.cpp" for source in sources] or [empty]
        libraries = [
            f"-Wl,-soname,lib{name}.so",
            "-pthread",
            "-ldl",
            "-Wl,--no-as-needed",
            *(f"-l{one}" for one in needed),
        ]
        _compile(folder / f"lib{name}.so", paths, [*headers, f"-L{folder}", *libraries])
    torch = site_packages("torch") / "include"
    torch_headers = [f"-isystem{one}" for one in (include, torch, torch / "torch" / "csrc" / "api" / "include")]
    library = [f"-L{site_packages('torch_npu') / 'lib'}", "-l:libtorch_npu.so", f"-L{folder}", "-lascendcl"]
    library += ["-Wl,--allow-shlib-undefined"]
    _compile(folder / f"lib{POISON}.so", [SOURCE / "poison.cpp"], [*headers, *torch_headers, *library])
    stamp.write_text(fingerprint)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ.get("FAKE_CANN_LIB", DEFAULT_FOLDER))
    sys.stdout.write(f"{build(target)}\n")
