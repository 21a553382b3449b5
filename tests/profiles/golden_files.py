"""Where the golden samples lie, and copies of them with a flaw."""

from __future__ import annotations

import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
# What `import` is given, of each source, in the folders of both releases.
NAMES = {
    "ascend-profiler": ".",
    "hccl-test": "all_reduce.txt",
    "msserviceprofiler": ".",
    "xllm-log": "xllm.INFO",
    "xllm-profile": "instance.json",
}


def releases(source: str) -> list[Path]:
    """The samples of a source: the same story as two releases tell it."""
    return [folder / NAMES[source] for folder in sorted((GOLDEN / source).iterdir())]


def copy_of(source: str, release: str, where: Path) -> Path:
    """A sample that may be spoilt."""
    shutil.copytree(GOLDEN / source / release, where)
    return where / NAMES[source]


def spoil(path: Path, text: str, instead: str) -> Path:
    """The file with every `text` replaced."""
    content = path.read_bytes()
    assert text.encode() in content
    path.write_bytes(content.replace(text.encode(), instead.encode()))
    return path
