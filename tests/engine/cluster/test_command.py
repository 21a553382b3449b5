"""One cluster file drives engine and simulator alike, through the verbs and through the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_engine_serving import crowd
from tests.tiny_models import MAX_POSITION, tiny_model
from xllm_lab import verbs
from xllm_lab.cli import run
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.fleet_file import read_fleet
from xllm_lab.formats import own
from xllm_lab.sim.calibrate import calibrate

FLEET = """
[fleet]
num_instances = 3
heartbeat_us = 2000
[link]
latency_us = 300
bytes_per_s = 1e6
[router]
policy = "prefix-affinity"
max_load_factor = 2
[failover]
policy = "requeue"
[[outage]]
instance = 2
start_us = 3000
end_us = 5000
"""
SETTINGS = {"max_model_len": MAX_POSITION, "num_kv_blocks": 64, "block_size": 8}


def test_a_cluster_file_drives_both_hosts(in_lockstep: EngineFleet, tmp_path: Path) -> None:
    """What the engine served is simulated on the fleet that the run says it had: link, outage, policies and all."""
    (tmp_path / "fleet.toml").write_text(FLEET, encoding="utf-8")
    fleet = tmp_path / "fleet.toml"
    done = verbs.replay(
        crowd(30), out=tmp_path / "run", engine=in_lockstep, fleet=fleet, settings=SETTINGS, progress=False
    )
    other = verbs.replay(
        crowd(30), out=tmp_path / "other", engine=in_lockstep, fleet=fleet, settings=SETTINGS, progress=False
    )
    assert verbs.parity(done).is_identical
    simulated = verbs.simulate(done, calibrate([done, other]), out=tmp_path / "simulated")
    assert simulated.manifest.fleet == done.manifest.fleet == read_fleet(fleet).as_dict()
    for each in (done, simulated):
        assert (each.path / "transfers.parquet").exists()
        assert len(each.records.requests) == 30
        assert {s.instance for s in each.records.steps} == {0, 1, 2}
        assert not [s for s in each.records.steps if s.instance == 2 and s.start_us < 5000 and s.end_us > 3000]


def test_the_command_replays_on_a_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where it listens, and parity names both kinds of decisions."""
    own.write(crowd(6), tmp_path / "trace.jsonl")
    out = str(tmp_path / "run")
    knobs = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    fleet = ["--instances", "2", "--route", "least-loaded", "--failover", "requeue"]
    model = ["--model", str(tiny_model()), "--device", "cpu", "--dtype", "float32", "--timer", "cpu"]
    assert run(["replay", str(tmp_path / "trace.jsonl"), *model, *fleet, *knobs, "--out", out]) == 0
    told = capsys.readouterr()
    assert "registry embedded://127.0.0.1:" in told.err
    assert "1 at 127.0.0.1:" in told.err
    assert run(["parity", out]) == 0
    assert "6 of the router" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--route", "round-robin"), "--route without a fleet; accepted: with --instances or --cluster"),
        (("--instances", "2", "--route", "nearest"), "unknown route policy 'nearest'"),
        (("--instances", "2", "--registry", "zookeeper"), "registry is 'zookeeper'; accepted: embedded"),
        (("--instances", "2", "--listen", "203.0.113.9"), "cannot listen on 203.0.113.9"),
        (("--instances", "0"), "num_instances is 0, 1 to"),
    ],
)
def test_what_a_fleet_cannot_be_is_one_line(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 2, before a process is started."""
    own.write(crowd(2), tmp_path / "trace.jsonl")
    assert run(["replay", str(tmp_path / "trace.jsonl"), *words, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
