"""`xllm-lab simulate` on machines nobody calibrated, and with fleets: what a run says it was, and repeating it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.report_inputs import calibration, workload
from tests.sim.cost.profile_bundles import write_bundle
from tests.tiny_loop import Said, said
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig, fleet_config
from xllm_lab.fleet_file import read_fleet
from xllm_lab.formats import own
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.route.least_loaded import LeastLoaded
from xllm_lab.runs import Run, read_run
from xllm_lab.sim.calibrate import write_calibration
from xllm_lab.sim.machine import Deployment, profiled_machine

FLEET = """
[fleet]
num_instances = 3
heartbeat_us = 50_000
[link]
latency_us = 200
bytes_per_s = 1_000_000
[router]
policy = "least-loaded"
[failover]
policy = "requeue"
[[outage]]
instance = 1
start_us = 60_000
end_us = 700_000
[[outage]]
instance = 0
start_us = 1_000_000
end_us = 1_050_000
"""
ROOFLINE = ("--hardware", "ascend-910c", "--model-config", "qwen3-8b")
FILES = ("requests.parquet", "steps.parquet", "transfers.parquet")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, a calibration, a bundle of operators and a cluster file."""
    folder = tmp_path_factory.mktemp("inputs")
    own.write(workload(), folder / "trace.jsonl")
    write_calibration(calibration(), folder / "machine.json")
    write_calibration(calibration(highest=60.0), folder / "small.json")
    write_bundle(folder / "bundle")
    (folder / "cluster.toml").write_text(FLEET, encoding="utf-8")
    return folder


def simulated(inputs: Path, out: Path, *words: str | Path) -> tuple[Said, Run]:
    got = said("simulate", inputs / "trace.jsonl", *words, "--out", out, "--json", "--quiet")
    assert got.status == 0, got.err
    return got, read_run(out)


def machine_words(inputs: Path, kind: str) -> tuple[str | Path, ...]:
    return {
        "fitted": ("--calibration", inputs / "machine.json"),
        "roofline": ROOFLINE,
        "profiled": ("--profile", inputs / "bundle"),
    }[kind]


@pytest.mark.parametrize("kind", ["fitted", "roofline", "profiled"])
def test_any_machine_serves_everybody(kind: str, inputs: Path, tmp_path: Path) -> None:
    """And the manifest says what priced the steps."""
    got, run = simulated(inputs, tmp_path / "run", *machine_words(inputs, kind))
    assert json.loads(got.out)["num_served"] == 24
    assert run.manifest.timing["cost_model"] == kind
    assert run.manifest.step_time_model() is not None


def test_a_roofline_says_its_error_is_unknown(inputs: Path, tmp_path: Path) -> None:
    """With the device, how the model was put there, and no error that nobody measured."""
    words = ("--tensor-parallel", "2", "--precision", "w8a8", "--shapes", "vllm-buckets", "--host-us", "1500")
    _, run = simulated(inputs, tmp_path / "run", *ROOFLINE, *words)
    timing, graphs = run.manifest.timing, run.manifest.graphs
    assert graphs is not None
    assert graphs["replays"] > 0 == len(graphs["eager"])
    assert (timing["device"], timing["tensor_parallel"], timing["precision"]) == ("ascend-910c", 2, "w8a8")
    assert timing["host"]["step_us"] == 1500
    assert "unknown" in timing["error"]
    assert "total_error_frac" not in timing


def test_a_fitted_run_tells_how_far_to_trust_it(inputs: Path, tmp_path: Path) -> None:
    """How much of it extrapolates, and within what its total is known."""
    got, run = simulated(inputs, tmp_path / "run", "--calibration", inputs / "machine.json")
    assert run.manifest.timing["extrapolated_frac"] == 0
    assert run.manifest.timing["total_error_frac"] >= 0
    assert "outside" not in got.err


def test_more_than_a_twentieth_outside_is_warned_of(inputs: Path, tmp_path: Path) -> None:
    """On stderr, with the percentage that the manifest has."""
    got, run = simulated(inputs, tmp_path / "run", "--calibration", inputs / "small.json")
    frac = run.manifest.timing["extrapolated_frac"]
    assert frac > 0.05
    assert f"{frac:.0%} of the steps are outside the calibrated range" in got.err


@pytest.mark.parametrize("kind", ["fitted", "roofline", "profiled"])
@pytest.mark.parametrize("fleet", [(), ("--cluster", "cluster.toml")], ids=["alone", "fleet with outages"])
def test_files_are_the_same_step_by_step(kind: str, fleet: tuple[str, ...], inputs: Path, tmp_path: Path) -> None:
    """Skipping equal steps is an exact shortcut: byte for byte, with links, outages and failovers."""
    words = [*machine_words(inputs, kind), *(inputs / w if w.endswith("toml") else w for w in fleet)]
    (fast, _), (slow, _) = (
        simulated(inputs, tmp_path / "fast", *words),
        simulated(inputs, tmp_path / "slow", *words, "--no-fast-forward"),
    )
    for name in FILES if fleet else FILES[:2]:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes(), name
    assert without_run(fast) == without_run(slow)


def without_run(got: Said) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(got.out)
    del value["run"]
    return value


def test_a_run_without_steps_keeps_its_requests(inputs: Path, tmp_path: Path) -> None:
    """The same bytes; steps.parquet is there and empty."""
    simulated(inputs, tmp_path / "with", *ROOFLINE)
    got, run = simulated(inputs, tmp_path / "without", *ROOFLINE, "--no-steps")
    assert (tmp_path / "with" / FILES[0]).read_bytes() == (tmp_path / "without" / FILES[0]).read_bytes()
    assert pq.read_metadata(tmp_path / "without" / "steps.parquet").num_rows == 0
    assert (json.loads(got.out)["num_steps"], run.records.steps) == (0, [])


def test_a_fleets_manifest_is_its_cluster_file(inputs: Path, tmp_path: Path) -> None:
    """Router, failover, link and outages come back as they were given."""
    cluster = inputs / "cluster.toml"
    _, run = simulated(inputs, tmp_path / "run", *ROOFLINE, "--cluster", cluster)
    assert run.manifest.fleet is not None
    assert fleet_config(run.manifest.fleet) == read_fleet(cluster)
    assert any(r.num_failovers for r in run.records.requests)


def test_instances_take_turns(inputs: Path, tmp_path: Path) -> None:
    """`--instances` is the plainest fleet."""
    _, run = simulated(inputs, tmp_path / "run", *ROOFLINE, "--instances", "4")
    assert run.manifest.fleet is not None
    assert fleet_config(run.manifest.fleet) == FleetConfig(num_instances=4)
    assert [r.instance for r in run.records.requests] == [k % 4 for k in range(24)]


def test_policies_of_a_fleet_are_given_with_their_knobs(inputs: Path, tmp_path: Path) -> None:
    """By name, and behind a colon what is not as it comes."""
    chosen = ("--roles", "static:num_prefill=2", "--route", "least-loaded:load=tokens", "--failover", "requeue")
    _, run = simulated(inputs, tmp_path / "run", *ROOFLINE, "--instances", "4", *chosen)
    assert run.manifest.fleet is not None
    fleet = fleet_config(run.manifest.fleet)
    assert (fleet.roles, fleet.route, fleet.failover) == (
        Static(num_prefill=2),
        LeastLoaded(load="tokens"),
        Requeue(),
    )
    several = [r for r in run.records.requests if r.output_tokens > 1]
    assert {r.prefill_instance for r in several} == {0, 1}
    assert {r.instance for r in several} == {2, 3}


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ("static:2", "--roles 'static:2' is not accepted; accepted: NAME, or NAME:KNOB=VALUE,..."),
        ("static:num_prefill=0", "static: num_prefill is 0, at least 1 is accepted"),
        ("halves", "unknown roles policy 'halves'; accepted: colocated, slo-flip, static"),
    ],
)
def test_a_policy_of_a_fleet_that_cannot_be_is_refused(inputs: Path, tmp_path: Path, roles: str, told: str) -> None:
    """In one line."""
    words = ("simulate", inputs / "trace.jsonl", *ROOFLINE, "--instances", "2", "--roles", roles)
    refused = said(*words, "--out", tmp_path / "run")
    assert refused.status == 2
    assert told in refused.err


def test_a_run_like_a_fleets_is_that_fleet(inputs: Path, tmp_path: Path) -> None:
    """The same bytes; and another fleet when one is asked for."""
    cluster = ("--cluster", inputs / "cluster.toml")
    simulated(inputs, tmp_path / "one", *ROOFLINE, *cluster)
    assert said("simulate", "--like", tmp_path / "one", *ROOFLINE, "--out", tmp_path / "two").status == 0
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    other = ("simulate", "--like", tmp_path / "one", *ROOFLINE, "--instances", "2", "--out", tmp_path / "three")
    assert said(*other).status == 0
    assert {r.instance for r in read_run(tmp_path / "three").records.requests} == {0, 1}


def test_a_profile_is_of_the_precision_it_was_taken_in(tmp_path: Path) -> None:
    """What its tables cannot answer is refused, not ignored, from a notebook too."""
    with pytest.raises(ConfigError, match="'bf16' is accepted"):
        profiled_machine(tmp_path, deployment=Deployment(precision="w8a8"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host-link", "1e9"), "1e+09 bytes/s is given, and cache policy device-only copies nothing; accepted: with"),
        (("--page-us", "20"), "kv_layout 'paged' maps none; accepted: with kv_layout 'virtual'"),
    ],
)
def test_what_would_have_no_effect_is_refused(words: tuple[str, ...], told: str, inputs: Path, tmp_path: Path) -> None:
    """And has one where there is something to copy, or to map."""
    command = ("simulate", inputs / "trace.jsonl", *ROOFLINE, *words, "--out", tmp_path / "run", "--quiet")
    got = said(*command)
    assert got.status == 2
    assert told in got.err
    assert not (tmp_path / "run").exists()
    other = ("--cache", "lru") if "--host-link" in words else ("--set", "kv_layout=virtual")
    assert said(*command, *other).status == 0


def test_a_link_without_copies_is_refused_before_an_engine_opens(inputs: Path, tmp_path: Path) -> None:
    """The model is not even looked for."""
    command = ("replay", inputs / "trace.jsonl", "--model", "no such model", "--host-link", "1e9")
    got = said(*command, "--out", tmp_path / "run", "--quiet")
    assert got.status == 2
    assert "a link to the host of 1e+09 bytes/s is given, and cache policy device-only copies nothing" in got.err
