"""Notebooks run from top to bottom, and are committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_ends_with_its_answer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code cells, in order, in one namespace; the last one prints a number."""
    namespace: dict[str, object] = {}
    for cell in _code_cells(path):
        capsys.readouterr()
        exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    assert any(character.isdigit() for character in capsys.readouterr().out)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_carries_no_outputs(path: Path) -> None:
    """Outputs are what the reader's machine says."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in _code_cells(path))


def _code_cells(path: Path) -> list[dict[str, list[str]]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]
