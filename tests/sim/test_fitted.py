"""The fitted cost model: many steps at once are bit for bit single ones, files keep all, odd input is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report_inputs import CONFIG, POLICY, as_engine, calibration, workload
from tests.sim.synthetic_machine import Machine, mixed_steps
from tests.tiny_loop import said
from xllm_lab.columns import step_feature_rows
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import own
from xllm_lab.policies.of_instance import Policies
from xllm_lab.runs import Run, read_run
from xllm_lab.sim.calibrate import (
    FORMAT,
    MIN_STEPS,
    Calibration,
    calibrate,
    calibrate_on,
    read_calibration,
    write_calibration,
)
from xllm_lab.sim.cost import Batch, batch_of
from xllm_lab.sim.cost.fitted import FittedCost
from xllm_lab.sim.cost.host import HostOverhead
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import simulate
from xllm_lab.sim.spread import UNKNOWN
from xllm_lab.step_samples import StepSample, samples
from xllm_lab.step_time import Chunk, feature_rows, features, fit


@cache
def fitted() -> Calibration:
    return Machine(drift_frac=0.02).calibrated(np.random.default_rng(5), 300)


chunks = st.builds(Chunk, st.integers(1, 3000) | st.just(1), st.integers(0, 200_000))


@st.composite
def decoding_batches(draw: st.DrawFn) -> Batch:
    """Around the edge of the calibrated range, and far from it."""
    contexts = draw(st.lists(st.integers(0, 1500) | st.integers(0, 300_000), min_size=1, max_size=64))
    return batch_of([Chunk(1, c) for c in contexts], draw(st.integers(0, 70)))


@given(decoding_batches(), st.integers(1, 300))
def test_decode_steps_are_steps(batch: Batch, num_steps: int) -> None:
    """Bit for bit: times, flags and standard errors."""
    cost = FittedCost(fitted())
    many = cost.decode_steps(batch, num_steps)
    ones = [cost.step(batch.later(k)) for k in range(num_steps)]
    assert many.us.tolist() == [p.us for p in ones]
    assert many.is_extrapolated.tolist() == [p.is_extrapolated for p in ones]
    assert np.asarray(many.std_us).tolist() == [p.std_us for p in ones]
    assert many.us.shape == many.is_extrapolated.shape == (num_steps,)


def test_the_edge_of_the_range_is_crossed_within_one_call() -> None:
    """Or the law above would not tell of it."""
    flags = FittedCost(fitted()).decode_steps(batch_of([Chunk(1, 300)] * 32, 32), 20_000).is_extrapolated
    assert not flags[0]
    assert flags[-1]
    assert (np.diff(flags.astype(int)) >= 0).all()


@given(st.lists(chunks, min_size=1, max_size=40), st.integers(0, 50), st.none() | st.integers(0, 9))
def test_a_price_is_the_weighted_sum(drawn: list[Chunk], num_logits: int, padding: int | None) -> None:
    """As `StepTime`, which policies see, says; and it is extrapolated if any factor is beyond the largest seen."""
    graph_tokens = None if padding is None else sum(c.num_tokens for c in drawn) + padding
    price = FittedCost(fitted()).step(batch_of(drawn, num_logits)._replace(graph_tokens=graph_tokens))
    assert price.us == pytest.approx(fitted().step_time.step_us(drawn, num_logits, graph_tokens))
    factors = features(drawn, num_logits, graph_tokens)
    assert price.is_extrapolated == any(f > m for f, m in zip(factors, fitted().highest, strict=True))
    assert price.std_us > 0


@given(st.lists(st.lists(chunks, min_size=1, max_size=9), min_size=1, max_size=9), st.data())
def test_factors_of_many_steps_are_those_of_each(drawn: list[list[Chunk]], data: st.DataObject) -> None:
    flat = [c for step in drawn for c in step]
    lengths = np.asarray([len(step) for step in drawn])
    padding = [data.draw(st.none() | st.integers(0, 9)) for _ in drawn]
    graphs = [
        None if more is None else more + sum(c.num_tokens for c in step)
        for step, more in zip(drawn, padding, strict=True)
    ]
    rows = feature_rows(
        lengths,
        np.asarray([c.num_tokens for c in flat]),
        np.asarray([c.num_computed_tokens for c in flat]),
        lengths,
        np.asarray([g or 0 for g in graphs]),
    )
    assert rows.tolist() == [features(step, len(step), graph) for step, graph in zip(drawn, graphs, strict=True)]


@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 500))
def test_a_decode_in_a_graph_is_a_batch_of_its_size(num_seqs: int, padding: int, context: int) -> None:
    """What pads is a sequence of one token, whose row the head computes, too."""
    size = num_seqs + padding
    padded = features([*[Chunk(1, context)] * num_seqs, *[Chunk(1, 0)] * padding], size)
    assert features([Chunk(1, context)] * num_seqs, num_seqs, size) == [0.0, 1.0, *padded[2:]]


def test_the_fitted_total_is_the_measured_one() -> None:
    """However much single steps scatter: queues grow with the sum, and a shortfall would never show in them alone."""
    rng = np.random.default_rng(2)
    steps = mixed_steps(rng, 400)
    times = Machine(scatter_frac=0.3).step_us(rng, steps)
    rows = [features(chunks, len(chunks)) for chunks in steps]
    assert float((np.asarray(rows) @ fit(rows, times.tolist()).weights).sum()) == pytest.approx(times.sum(), rel=1e-4)


def test_without_a_spread_nothing_is_claimed() -> None:
    """A calibration made by hand has no error to tell."""
    cost = FittedCost(replace(fitted(), spread=UNKNOWN))
    assert cost.step(batch_of([Chunk(1, 10)], 1)).std_us == 0.0


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    write_calibration(fitted(), tmp_path / "machine.json")
    assert read_calibration(tmp_path / "machine.json") == fitted()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, (f"format is 1, {FORMAT} is accepted",)),
        ({"spread": None}, ("accepted: a calibration",)),
        ({"spread": {"scatter_us": 1.0}}, ("weights_std",)),
        ({"spread": {"scatter_us": 1.0, "weights_std": [[1.0]]}}, ("weights_std has rows of [1]",)),
    ],
)
def test_files_of_other_forms_are_refused(change: dict[str, object], words: tuple[str, ...], tmp_path: Path) -> None:
    """A file from before spreads too: the runs it came from are still there to learn from."""
    path = tmp_path / "machine.json"
    write_calibration(fitted(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError) as refusal:
        read_calibration(path)
    for word in (str(path), *words):
        assert word in str(refusal.value)


@pytest.fixture(scope="module")
def engine_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("engine")
    return as_engine(
        simulate(workload(), CONFIG, Policies(POLICY), fitted_machine(calibration()), out=folder / "raw"),
        folder / "engine",
    )


def test_a_run_and_its_samples_teach_the_same(engine_run: Run) -> None:
    """Per-step rows need not come from an engine run of ours."""
    steps = list(samples(engine_run.records.steps))
    from_run = calibrate([engine_run])
    manifest = engine_run.manifest
    from_rows = calibrate_on(steps, model=manifest.model, hardware=manifest.hardware, sources=("engine",))
    assert replace(from_run, versions={}, measured_at_us=None) == from_rows


def test_a_runs_error_is_read_from_its_folder(engine_run: Run) -> None:
    """Batch by batch, as `simulate` does it."""
    learnt, by_hand = fitted().run_spread(), fitted().run_spread()
    for rows in step_feature_rows(engine_run.path / "steps.parquet"):
        learnt.add(rows)
    by_hand.add(np.asarray([s.features() for s in samples(engine_run.records.steps)]))
    assert learnt.us == pytest.approx(by_hand.us)
    assert learnt.half_width_frac() == pytest.approx(by_hand.half_width_frac())


def test_too_few_steps_are_refused() -> None:
    sample = StepSample(chunks=(Chunk(1, 1),), num_logits=1, step_us=5.0)
    with pytest.raises(ConfigError, match=f"trace.csv: 3 steps, at least {MIN_STEPS} are accepted"):
        calibrate_on([sample] * 3, model={}, hardware={}, sources=("trace.csv",))


def _split(host: HostOverhead) -> list[StepSample]:
    """Steps of the synthetic machine, whose host was timed apart."""
    steps = mixed_steps(np.random.default_rng(0), 200)
    times = Machine(scatter_frac=0.0).mean_us(steps).tolist()
    return [
        StepSample(chunks=c, num_logits=len(c), step_us=us, host_us=host.us(len(c)))
        for c, us in zip(steps, times, strict=True)
    ]


@pytest.mark.parametrize(("mode", "whole"), [("off", sum), ("on", max), ("length_aware", max)])
def test_a_host_that_was_timed_apart_is_hidden_by_planning_ahead(
    mode: str, whole: Callable[[list[float]], float]
) -> None:
    """In turns, device and host add up; side by side, the slower of the two decides."""
    host = HostOverhead(step_us=6000.0, sequence_us=20.0)
    fitted_to = calibrate_on(_split(host), model={"vocab_size": 10}, hardware={}, sources=("split",))
    cost = fitted_machine(fitted_to).cost_of(replace(CONFIG, async_scheduling=mode))
    for chunks in ([Chunk(1, 100)] * 2, [Chunk(200, 0), *[Chunk(1, 500)] * 20]):
        batch = batch_of(chunks, len(chunks))
        parts = [FittedCost(fitted_to).step(batch).us, host.us(len(chunks))]
        assert cost.step(batch).us == pytest.approx(whole(parts), rel=1e-6)


def test_steps_with_and_without_a_host_are_not_mixed() -> None:
    mixed = [*_split(HostOverhead(step_us=10.0)), StepSample(chunks=(Chunk(1, 1),), num_logits=1, step_us=5.0)]
    with pytest.raises(ConfigError, match="200 of 201 steps tell the host's time"):
        calibrate_on(mixed, model={}, hardware={}, sources=("mixed",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_us": 0.0}, "lasts 0.0 us"),
        ({"step_us": float("nan")}, "lasts nan us"),
        ({"step_us": float("inf")}, "lasts inf us"),
        ({"chunks": ()}, "no chunks"),
        ({"chunks": (Chunk(0, 5),)}, "num_tokens=0"),
        ({"chunks": (Chunk(1, -5),)}, "num_computed_tokens=-5"),
        ({"num_logits": -1}, "num_logits of a step is -1"),
        ({"host_us": -1.0}, "host_us of a step is -1.0"),
    ],
)
def test_samples_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    """With the value, and what is accepted."""
    with pytest.raises(ConfigError, match=words):
        replace(StepSample(chunks=(Chunk(1, 1),), num_logits=1, step_us=5.0), **change)


@pytest.mark.parametrize(("highest", "is_warned"), [(1e9, False), (300.0, True)])
def test_a_run_beyond_the_range_warns(highest: float, is_warned: bool, tmp_path: Path) -> None:
    """Above 5 % of the steps; the fraction is in the manifest either way, and is that of the steps."""
    own.write(workload(), tmp_path / "trace.jsonl")
    machine = calibration(highest=highest)
    write_calibration(machine, tmp_path / "machine.json")
    told = said(
        "simulate", tmp_path / "trace.jsonl", "--calibration", tmp_path / "machine.json", "--out", tmp_path / "r"
    )
    assert told.status == 0
    done = read_run(tmp_path / "r")
    cost = FittedCost(machine)
    flags = [cost.step(batch_of(s.chunks, s.num_logits)).is_extrapolated for s in samples(done.records.steps)]
    frac = sum(flags) / len(flags)
    assert done.manifest.timing["extrapolated_frac"] == frac
    assert (frac > 0.05) == is_warned
    assert ("outside the calibrated range" in told.err) == is_warned
    assert not is_warned or f"{frac:.0%} of the steps" in told.err
