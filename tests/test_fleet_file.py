"""Cluster files: what they say is what the fleet has, and what cannot be is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FleetConfig, LinkConfig, fleet_config
from xllm_lab.fleet_file import read_fleet
from xllm_lab.outages import FailureProcess, Outage
from xllm_lab.policies.api import Choice
from xllm_lab.policies.catalog import knobs, policies
from xllm_lab.policies.failover.cancel import Cancel
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.route.prefix_affinity import PrefixAffinity
from xllm_lab.policies.route.round_robin import RoundRobin
from xllm_lab.policies.routing import InstanceId

WHOLE = """
[fleet]
num_instances = 4
heartbeat_us = 250_000
role_interval_us = 5e6

[link]
latency_us = 100
bytes_per_s = 1.25e9

[router]
policy = "prefix-affinity"
max_load_factor = 2

[failover]
policy = "requeue"
waits_for_repair = false

[roles]
policy = "static"
num_prefill = 2

[[outage]]
instance = 2
start_us = 60
end_us = 90

[[outage]]
instance = 0
start_us = 10
end_us = 20
"""


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "cluster.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    """Every table, with 1.25e9 for an integer and 2 for a fraction."""
    assert read_fleet(written(tmp_path, WHOLE)) == FleetConfig(
        num_instances=4,
        heartbeat_us=250_000,
        link=LinkConfig(latency_us=100, bytes_per_s=1_250_000_000),
        route=PrefixAffinity(max_load_factor=2.0),
        failover=Requeue(waits_for_repair=False),
        roles=Static(num_prefill=2),
        role_interval_us=5_000_000,
        outages=(
            Outage(instance=InstanceId(0), start_us=10, end_us=20),
            Outage(instance=InstanceId(2), start_us=60, end_us=90),
        ),
    )


def test_the_least_that_can_be_said(tmp_path: Path) -> None:
    """The rest is as in production: in turn, half a second, lost with the instance."""
    fleet = read_fleet(written(tmp_path, "fleet.num_instances = 1"))
    assert fleet == FleetConfig(num_instances=1)
    assert (fleet.heartbeat_us, fleet.route, fleet.failover) == (500_000, RoundRobin(), Cancel())


def test_failures_are_drawn_for_the_whole_fleet(tmp_path: Path) -> None:
    """The same as those of the process that the table describes."""
    table = "[failures]\nmean_up_us = 900\nmean_repair_us = 100\nhorizon_us = 1e4\nseed = 5"
    fleet = read_fleet(written(tmp_path, f"[fleet]\nnum_instances = 3\n{table}"))
    process = FailureProcess(mean_up_us=900, mean_repair_us=100, horizon_us=10_000, seed=5)
    assert fleet.outages == process.outages(3)
    assert {o.instance for o in fleet.outages} == {0, 1, 2}


FOUR = "fleet.num_instances = 4\n"
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "no instance": ("[fleet]\nnum_instances = 0", ": [fleet] num_instances is 0, 1 to 65536 is accepted"),
    "too many": ("[fleet]\nnum_instances = 1e9", ": [fleet] num_instances is 1000000000, 1 to 65536 is accepted"),
    "not said how many": ("[link]", ": [fleet] num_instances is missing; an integer is accepted"),
    "a text": ("[fleet]\nnum_instances = '4'", ": [fleet] num_instances is '4'; an integer is accepted"),
    "half": ("[fleet]\nnum_instances = 2.5", ": [fleet] num_instances is 2.5; an integer is accepted"),
    "true": ("[fleet]\nnum_instances = true", ": [fleet] num_instances is True; an integer is accepted"),
    "no table": ("fleet = 4", ": [fleet] is 4; a table is accepted"),
    "unknown table": (
        "[flet]",
        ": has no table 'flet'; accepted: fleet, link, router, failover, roles, outage, failures",
    ),
    "unknown key": (
        "[fleet]\nnum_instance = 4",
        ": [fleet] has no key 'num_instance'; accepted: num_instances, heartbeat_us, role_interval_us, role_window_us",
    ),
    "heartbeat": (
        "[fleet]\nnum_instances = 4\nheartbeat_us = -1",
        ": [fleet] heartbeat_us is -1, 0 to 1000000000000000 is accepted",
    ),
    "slow link": (FOUR + "[link]\nbytes_per_s = 0", ": [link] bytes_per_s is 0, at least 1 is accepted"),
    "slower link": (FOUR + "[link]\nbytes_per_s = 0.5", ": [link] bytes_per_s is 0.5; an integer is accepted"),
    "endless link": (FOUR + "[link]\nbytes_per_s = inf", ": [link] bytes_per_s is inf; an integer is accepted"),
    "early": (FOUR + "[link]\nlatency_us = -3", ": [link] latency_us is -3, 0 to 1000000000000000 is accepted"),
    "no policy": (
        FOUR + "[failover]\nmax_failovers = 3",
        ": [failover] policy is missing; accepted: cancel, requeue",
    ),
    "unknown policy": (
        FOUR + "[failover]\npolicy = 'pray'",
        ": [failover] policy is 'pray'; accepted: cancel, requeue",
    ),
    "policy of another kind": (
        FOUR + "[failover]\npolicy = 'round-robin'",
        ": [failover] policy is 'round-robin'; accepted: cancel, requeue",
    ),
    "unknown knob": (
        FOUR + "[router]\npolicy = 'round-robin'\nspeed = 1",
        ": [router] has no key 'speed'; accepted: none",
    ),
    "bad knob": (
        FOUR + "[router]\npolicy = 'least-loaded'\nload = 'weight'",
        ": [router] load is 'weight', accepted: requests, seats, tokens",
    ),
    "knob out of range": (
        FOUR + "[router]\npolicy = 'prefix-affinity'\nmax_load_factor = 0.5",
        ": [router] max_load_factor is 0.5, at least 1 is accepted",
    ),
    "knob that is no number": (
        FOUR + "[router]\npolicy = 'prefix-affinity'\nmax_load_factor = nan",
        ": [router] max_load_factor is nan; a finite number is accepted",
    ),
    "outage of nobody": (
        FOUR + "[[outage]]\ninstance = 4\nstart_us = 1\nend_us = 2",
        ": outage of instance 4, 0 to 3 is accepted",
    ),
    "outage twice": (
        FOUR + "[[outage]]\ninstance = 1\nstart_us = 5\nend_us = 9\n[[outage]]\ninstance = 1\nstart_us = 1\nend_us = 6",
        ": outage of instance 1: start_us is 5, more than 6, the end of the one before, is accepted",
    ),
    "outage backwards": (
        FOUR + "[[outage]]\ninstance = 1\nstart_us = 1\nend_us = 2\n[[outage]]\ninstance = 2\nstart_us = 5\nend_us = 5",
        ": [[outage]] 2 end_us is 5, 6 to 1000000000000000 is accepted",
    ),
    "endless outage": (
        FOUR + "[[outage]]\ninstance = 1\nstart_us = 1",
        ": [[outage]] 1 end_us is missing; an integer is accepted",
    ),
    "one outage": (FOUR + "[outage]\ninstance = 1", ": outage is {'instance': 1}; tables [[outage]] are accepted"),
    "outages that are none": (FOUR + "outage = [1]", ": [[outage]] 1 is 1; a table is accepted"),
    "both": (FOUR + "[failures]\n[[outage]]", ": has [failures] and [[outage]]; one of them is accepted"),
    "no time to fail": (
        FOUR + "[failures]\nmean_up_us = 0\nmean_repair_us = 1\nhorizon_us = 1",
        ": [failures] mean_up_us is 0, 1 to 1000000000000000 is accepted",
    ),
    "no rest": (
        FOUR + "[failures]\nmean_up_us = 1\nmean_repair_us = 1\nhorizon_us = 1e12",
        ": [failures] about 2000000000000 outages within horizon_us, at most 1000000 is accepted",
    ),
    "no value": ("\n\nfleet = ", ":3: Invalid value; TOML is accepted"),
    "unfinished": ("fleet = '''", ":1: Expected \"'''\"; TOML is accepted"),
    "key twice": ("[link]\n[link]", ":2: Cannot declare ('link',) twice; TOML is accepted"),
    "too deep": ("fleet = " + "[" * 10_000, ": is nested too deeply; tables of plain values are accepted"),
    "no text": (b"[fleet]\nname = '\xff'", ":2: byte is 0xff; UTF-8 text is accepted"),
    "empty": ("", ": [fleet] num_instances is missing; an integer is accepted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    """With the file, its line or the table and key, the value, and what is accepted; in one line."""
    content, said = REFUSED[name]
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as refused:
        read_fleet(path)
    assert str(refused.value) == f"{path}{said}"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent", "cannot be read (No such file or directory); a readable cluster file is accepted"),
        (".", "is a directory; a cluster file is accepted"),
        ("/dev/null", "is not a regular file; a cluster file is accepted"),
    ],
)
def test_what_is_no_file_is_refused(path: str, said: str, tmp_path: Path) -> None:
    """Never read, so that a pipe cannot hold us."""
    with pytest.raises(ConfigError) as refused:
        read_fleet(tmp_path / path)
    assert str(refused.value) == f"{tmp_path / path}: {said}"


@st.composite
def fleets(draw: st.DrawFn) -> FleetConfig:
    """Any fleet, of any catalogued policies with any values of their knobs."""

    def policy(decides: str) -> Any:
        cls = draw(st.sampled_from(list(policies(decides).values())))
        values = {
            name: draw(
                st.sampled_from(knob.values)
                if isinstance(knob, Choice)
                else st.integers(int(knob.low), int(knob.high))
                if isinstance(knob.low, int)
                else st.floats(knob.low, knob.high)
            )
            for name, knob in knobs(cls).items()
        }
        return cls(**values)

    num_instances = draw(st.integers(1, 9))
    process = FailureProcess(mean_up_us=50, mean_repair_us=20, horizon_us=200, seed=draw(st.integers(0, 50)))
    return FleetConfig(
        num_instances=num_instances,
        heartbeat_us=draw(st.integers(0, 10**9)),
        link=LinkConfig(latency_us=draw(st.integers(0, 10**6)), bytes_per_s=draw(st.none() | st.integers(1, 10**13))),
        outages=tuple(draw(st.permutations(process.outages(num_instances)))),
        route=policy("route"),
        failover=policy("failover"),
        roles=policy("roles"),
        role_interval_us=draw(st.integers(1, 10**9)),
        role_window_us=draw(st.integers(1, 10**9)),
    )


@given(fleet=fleets())
def test_a_fleet_survives_being_written_down(fleet: FleetConfig) -> None:
    """As JSON in a manifest, and back."""
    assert fleet_config(json.loads(json.dumps(fleet.as_dict()))) == fleet


@given(fleet=fleets())
def test_a_fleet_can_be_said_in_a_file(tmp_path_factory: pytest.TempPathFactory, fleet: FleetConfig) -> None:
    """Whatever can be configured has its place there."""
    path = written(tmp_path_factory.mktemp("fleet"), as_toml(fleet))
    assert read_fleet(path) == fleet


def as_toml(fleet: FleetConfig) -> str:
    plain = fleet.as_dict()
    own = {key: value for key, value in plain.items() if isinstance(value, int)}
    tables = [("[fleet]", own), ("[link]", plain["link"]), ("[router]", plain["route"]), ("[roles]", plain["roles"])]
    tables += [("[failover]", plain["failover"]), *(("[[outage]]", o) for o in plain["outages"])]
    return "\n".join(line for head, cells in tables for line in (head, *_lines(cells)))


def _lines(cells: dict[str, Any]) -> list[str]:
    # A number, a text or a truth value looks the same in JSON and TOML.
    return [f"{key} = {json.dumps(value)}" for key, value in cells.items() if value is not None]
