"""Engine processes and who may speak to them: on loopback, with the secret, in JSON; and what else goes wrong."""

from __future__ import annotations

import ast
import os
import signal
from pathlib import Path

import pytest

import xllm_lab
from tests.engine.cluster.conftest import options
from tests.engine.cluster.test_fleet import Killing, killer
from tests.engine.test_engine_serving import config, crowd
from tests.registry.etcd_server import etcd
from tests.tiny_models import tiny_model
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import EngineOptions
from xllm_lab.errors import ConfigError, InstanceError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.batch.unified_slo import UnifiedSlo
from xllm_lab.policies.failover.requeue import Requeue
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import FinishReason, Records
from xllm_lab.wire import GoneError, connect


def listening(pid: int) -> list[str]:
    """Local addresses that a process listens on, as Linux writes them: 0100007F:PORT is 127.0.0.1."""
    files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    inodes = {name.removeprefix("socket:[").removesuffix("]") for name in files if name.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
        found += [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]
    return found


def children() -> set[str]:
    """Processes that this one started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_nobody_listens_beyond_loopback(in_lockstep: EngineFleet) -> None:
    """Neither router nor engine processes: what the kernel says, not what they say."""
    ours = listening(os.getpid())
    assert ours, "the registry listens"
    everybody = [*ours, *(a for pid in in_lockstep.process_ids.values() for a in listening(pid))]
    assert not [address for address in everybody if not address.startswith("0100007F:")]


def test_it_says_where_it_listens(in_lockstep: EngineFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, with every address."""
    in_lockstep.tell_where()
    (line,) = capsys.readouterr().err.splitlines()
    assert in_lockstep.registry_url in line
    assert all(f"{k} at 127.0.0.1:" in line for k in range(3))


def test_who_has_no_secret_is_hung_up_on(tmp_path: Path) -> None:
    """A stranger that is quicker than the router, and whatever it says, keeps nobody from being served."""
    with EngineFleet(options("virtual"), 1) as fleet:
        records = Records()
        (address,) = fleet.addresses.values()
        with pytest.raises(GoneError):  # whoever comes after the router finds nobody
            connect(address, 5.0).hear(5.0)
        fleet.serve(crowd(2), FleetConfig(num_instances=1), config(), Policies(Fcfs()), records)
        assert len(records.requests) == 2


def test_nothing_unpickles_what_came_through_a_socket() -> None:
    """Nobody in the fleet's code imports what could, but for torch, which is not given any of it."""
    package = Path(xllm_lab.__file__).parent
    files = [*(package / "engine" / "cluster").glob("*.py"), *(package / "registry").glob("*.py"), package / "wire.py"]
    assert len(files) > 8
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing", "torch"}


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    """With the engine's own words; and no process is left."""
    before = children()
    with pytest.raises(InstanceError, match=r"instance 0 ended with status 2: model '/nope' is unknown"):
        EngineFleet(EngineOptions(model="/nope", device="cpu"), 2)
    assert children() <= before


def test_what_a_fleet_cannot_have_is_refused(in_lockstep: EngineFleet) -> None:
    """In one line each, before anything is served."""
    three = FleetConfig(num_instances=3)
    with pytest.raises(ConfigError, match="tensor_parallel is 2 in a fleet; accepted: 1"):
        EngineFleet(EngineOptions(model=str(tiny_model()), device="cpu", tensor_parallel=2), 2)
    with pytest.raises(ConfigError, match="num_instances is 2, and 3 processes are up"):
        in_lockstep.serve(crowd(2), FleetConfig(num_instances=2), config(), Policies(Fcfs()), Records())
    with pytest.raises(ConfigError, match="needs step times; accepted: a machine's calibration"):
        in_lockstep.serve(crowd(2), three, config(), Policies(UnifiedSlo()), Records())


def test_lockstep_on_wall_time_plans_nothing_ahead() -> None:
    """Host and device cannot be told apart there while one of them stands still."""
    slow = EngineOptions(model=str(tiny_model()), device="cpu", dtype="float32", clock="virtual", timer="wall")
    with EngineFleet(slow, 1) as fleet:
        one, records = FleetConfig(num_instances=1), Records()
        with pytest.raises(ConfigError, match="accepted: timer 'cpu', clock 'wall', or async_scheduling 'off'"):
            fleet.serve(crowd(2), one, config(async_scheduling="on"), Policies(Fcfs()), records)
        fleet.serve(crowd(2), one, config(), Policies(Fcfs()), records)
        assert len(records.requests) == 2


def test_a_fleet_registered_in_etcd_loses_one_and_goes_on(tmp_path: Path) -> None:
    """It hangs, its lease ends, and etcd says so."""
    with etcd(tmp_path) as address, EngineFleet(options("virtual"), 2, registry=f"etcd://{address}/fleet") as fleet:
        assert fleet.registry_url == f"etcd://{address}/fleet"
        records = Killing({3: killer(fleet, 1, signal.SIGSTOP)})
        how = FleetConfig(num_instances=2, failover=Requeue())
        served = fleet.serve(crowd(8), how, config(), Policies(Fcfs()), records)
        assert [r.finish_reason for r in records.requests] == [FinishReason.LENGTH] * 8
        assert [d.instance for d in served.deliveries if d.kind == "down"] == [1]
