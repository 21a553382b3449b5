"""The verb `import`: what a profiler or a production server wrote down, kept as the other verbs accept it."""

from __future__ import annotations

import argparse
from pathlib import Path

from xllm_lab.profiles import sources
from xllm_lab.profiles.imported import Imported
from xllm_lab.text import table


def options(parser: argparse.ArgumentParser) -> None:
    told = "; ".join(f"{source.NAME}: {source.HOLDS}" for source in sources().values())
    parser.add_argument("source", help=told)
    parser.add_argument("path", type=Path, help="what it wrote")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--kv-block-tokens", type=int, metavar="N", help="of the profiled server; to estimate lengths")


def as_text(imported: Imported, out: Path) -> str:
    """What is in the folder, what rests on what, what was left out, and what is missing."""
    rows = [[name, f"{num:,}"] for name, num in imported.parts.items()]
    parts = [f"{out}: from {imported.name}, {imported.source}\n{table(['', 'rows'], rows)}"]
    if imported.num_by_basis:
        parts.append("\n".join(f"{num:,} steps: {basis}" for basis, num in sorted(imported.num_by_basis.items())))
    if imported.left_out:
        left = [[f"{left.file}: {left.reason}", f"{left.num_rows:,}"] for left in imported.left_out]
        parts.append(f"not used\n{table(['', 'rows'], left)}")
    parts.append("\n".join(f"no {part}: {why}" for part, why in imported.missing.items()))
    if imported.notes:
        parts.append("\n".join(imported.notes))
    return "\n\n".join(parts)
