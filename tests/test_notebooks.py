"""Notebooks answer the question that they ask, about the reader's own trace, and are committed without outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import request
from tests.tiny_models import tiny_model
from xllm_lab.arrivals import poisson, with_arrivals
from xllm_lab.formats import own
from xllm_lab.workload import Prompt, Workload, stream

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def tiny_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny model can serve: forty short questions that repeat themselves."""
    path = tmp_path_factory.mktemp("trace") / "mine.jsonl"
    generator = stream(0, "notebooks")
    requests = []
    for i in range(40):
        words = generator.integers(16, 250, 6).tolist() * 4
        prompt = Prompt(num_tokens=len(words), token_ids=tuple(words))
        requests.append(replace(request(i, i, prompt=4, output=8 + i % 9), prompt=prompt))
    own.write(with_arrivals(Workload(requests=tuple(requests)), poisson(40, 5.0, seed=1)), path)
    return path


@pytest.mark.slow
@every_notebook
def test_a_notebook_answers_about_the_trace_of_its_first_cell(
    path: Path, tiny_trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as Jupyter runs it, in a kernel, from its own folder; pictures in between, a number last."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
    for name, value in (
        ("XLLM_LAB_TRACE", str(tiny_trace)),
        ("XLLM_LAB_MODEL", str(tiny_model())),
        ("XLLM_LAB_TRIALS", "8"),
        ("PYTHONPATH", str(path.parents[1])),
    ):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs), "a picture"
    answer = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    assert "mine.jsonl" in answer
    assert any(character.isdigit() for character in answer.replace("mine.jsonl", ""))


@every_notebook
def test_a_notebook_asks_first_and_names_its_trace_next(path: Path) -> None:
    first, second, *_ = _cells(path)
    assert first["cell_type"] == "markdown"
    assert first["source"][0].startswith("# ")
    assert first["source"][0].rstrip().endswith("?")
    assert any(line.startswith("TRACE = ") for line in second["source"])


@every_notebook
def test_a_notebook_carries_no_outputs(path: Path) -> None:
    """Outputs are what the reader's machine says."""
    code = [cell for cell in _cells(path) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def _cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells
