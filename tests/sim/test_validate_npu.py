"""Published Ascend figures: read with their sources, fitted where they may be, and predicted where they may not."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest

from xllm_lab.cli import run
from xllm_lab.errors import ConfigError
from xllm_lab.hardware import hardware
from xllm_lab.sim import npu_fit
from xllm_lab.sim.npu_points import FILE, points
from xllm_lab.sim.validate.published import Point, PublishedValidation
from xllm_lab.sim.validate_npu import validate_npu
from xllm_lab.text import published_table


@pytest.fixture(scope="module")
def found() -> PublishedValidation:
    return validate_npu()


def test_the_two_constants_are_what_the_fit_finds() -> None:
    """To the digits that hardware.toml gives; Ascend parts of which nothing better is known have the same."""
    kernel_us, link_frac = npu_fit.fit()
    for name in (npu_fit.FITTED_DEVICE, "ascend-910b1", "ascend-910b2", "ascend-910b3", "ascend-910b4", "ascend-950dt"):
        device = hardware(name)
        assert device.kernel_us == round(kernel_us, 1)
        assert device.link.frac == device.far_link.frac == round(link_frac, 2)


def test_the_fit_is_a_minimum() -> None:
    """Neither constant can be changed for the better: the squares of both tables' errors grow either way."""
    best = npu_fit.fit()

    def squares(kernel_us: float, link_frac: float) -> float:
        device = npu_fit.with_constants(hardware(npu_fit.FITTED_DEVICE), kernel_us, link_frac)
        logs = [
            [
                math.log(npu_fit.collective_us(device, r["op"], r["devices"], r["num_bytes"]) / r["us"])
                for r in points("collectives").rows
            ],
            [
                math.log(getattr(npu_fit.mean_step(device, r["clients"]), f"{key}_us") / r[f"{key}_ms"] / 1e3)
                for r in points("steps").rows
                for key in ("compute", "communication")
            ],
        ]
        return sum(sum(x * x for x in table) / len(table) for table in logs)

    for change in (0.98, 1.02):
        assert squares(best[0] * change, best[1]) > squares(*best)
        assert squares(best[0], best[1] * change) > squares(*best)


@pytest.mark.slow
def test_only_the_hccl_and_the_step_table_are_fitted_to(found: PublishedValidation) -> None:
    fitted = {point.table for point in found.points if point.is_fitted}
    assert fitted == {"HCCL on an A3 node, us", "Qwen3-32B bf16 TP16 step, ms"}
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    assert {name for name in tables if name != "sources" and points(name).is_fitted} == {"collectives", "steps"}


@pytest.mark.slow
def test_every_published_row_is_shown(found: PublishedValidation) -> None:
    """A step row has four figures, a share row three, an MTP row two, two streams five, the others one."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    per_row = {"steps": 4, "deepseek_shares": 3, "mtp": 2, "dual_stream": 5}
    rows = sum(per_row.get(name, 1) * len(t["rows"]) for name, t in tables.items() if name != "sources")
    assert len(found.points) == rows
    for point in found.points:
        assert point.source
        assert point.published > 0
        if point.predicted is None:
            assert point.note.startswith("not modelled: ")
        else:
            assert 0 < point.predicted < math.inf


def test_the_split_of_a_step_adds_up() -> None:
    """The published rows do, which is why the model's parts are compared one by one."""
    for row in points("steps").rows:
        assert row["compute_ms"] + row["communication_ms"] + row["free_ms"] == pytest.approx(row["step_ms"], abs=0.11)


@pytest.mark.slow
def test_published_orders_are_predicted(found: PublishedValidation) -> None:
    """Whatever the errors: more clients make longer steps, MTP and cached prefixes help."""

    def ours(table: str) -> dict[str, float]:
        return {p.what: p.predicted for p in found.tables[table] if p.predicted is not None}

    mtp = ours("DeepSeek-R1 TPOT with and without MTP, ms")
    for clients in (1, 2, 4, 8, 16, 20, 40, 80):
        assert mtp[f"MTP, {clients} clients"] < mtp[f"base, {clients} clients"]
    assert mtp["base, 1 clients"] < mtp["base, 16 clients"] < mtp["base, 80 clients"]
    prompts = list(ours("vllm-ascend nightly, prompts/s").values())
    assert prompts[0] < prompts[1]
    assert prompts[2] < prompts[3]
    layers = list(ours("layers of DeepSeek-R1, us").values())
    assert layers[0] < layers[1]


def test_means_keep_residuals_and_predictions_apart() -> None:
    def point(published: float, is_fitted: bool = False, predicted: float | None = 1.0) -> Point:
        return Point(
            table="t", what="w", published=published, predicted=predicted, source="s", is_fitted=is_fitted, assumed="a"
        )

    made = PublishedValidation(
        (point(2.0), point(0.8), point(0.5, is_fitted=True), point(1.0, predicted=None)), "[why]"
    )
    assert made.mean_error_frac("t", is_fitted=False) == pytest.approx((0.5 + 0.25) / 2)
    assert made.mean_error_frac("t", is_fitted=True) == pytest.approx(1.0)
    text = published_table(made)
    assert "−50 %" in text
    assert "[+100 %]" in text
    assert "mean of |error| 38 %, mean of |residual| 100 %\n  assumed: a\n  s\n" in text


@pytest.mark.slow
def test_the_command_prints_what_it_found(found: PublishedValidation, capsys: pytest.CaptureFixture[str]) -> None:
    """The same in another run, as JSON wherever the option stands."""
    assert run(["validate", "npu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["predicted"] for row in printed] == [point.predicted for point in found.points]
    assert [row["error_frac"] for row in printed] == [point.error_frac for point in found.points]


def test_other_targets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "abacus"]) == 2
    assert "invalid choice: 'abacus'" in capsys.readouterr().err


def test_rows_without_a_source_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.toml"
    path.write_text('[sources]\nx = "X"\n[a]\nrows = [{ us = 1.0, source = "x" }, { us = 2.0 }]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="row 2 of a has source None; one of x is expected"):
        points("a", path)
    with pytest.raises(ConfigError, match="no table 'b'; accepted are a"):
        points("b", path)
