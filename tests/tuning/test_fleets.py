"""Fleets are tuned as instances are: their policies' knobs are searched by themselves, if they do anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.small_runs import request
from tests.tuning.searches import CALIBRATION, WorkersHere, default, search, workload
from xllm_lab.candidate import Candidate, candidate, num_changes
from xllm_lab.errors import ConfigError
from xllm_lab.fleet_config import FLEET_DECISIONS, FleetConfig
from xllm_lab.outages import Outage
from xllm_lab.policies.api import Choice
from xllm_lab.policies.catalog import knobs, make_policy, policies, policy_name, values_of
from xllm_lab.policies.roles.static import Static
from xllm_lab.policies.routing import InstanceId
from xllm_lab.records import Records
from xllm_lab.report.tables import configurations
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.tuning import workers
from xllm_lab.tuning.export import export
from xllm_lab.tuning.objective import worth
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study, read_study
from xllm_lab.workload import Slo, Workload

OUTAGE = Outage(instance=InstanceId(0), start_us=50_000, end_us=400_000)
NUM_TRIALS = 5


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


def fleet(num_instances: int = 3, **changes: Any) -> Candidate:
    """Instances as of any small search, behind a router."""
    made = {name: make_policy(name, of) if isinstance(of, str) else of for name, of in changes.items()}
    return replace(default(), fleet=FleetConfig(**{"num_instances": num_instances, "heartbeat_us": 0, **made}))


SPLIT = fleet(route="cache-aware-corrected", roles="static")


def searched(one: Candidate, also: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Ranges of the knobs of its fleet's policies."""
    ranges: dict[str, list[Any]] = Space(one, also).describe()["knobs"]
    return {name: note for name, note in ranges.items() if name.partition(".")[0] in FLEET_DECISIONS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", WorkersHere)
        return search(tmp_path_factory.mktemp("fleet") / "study", space=Space(SPLIT), num_trials=NUM_TRIALS)


def test_the_first_trial_is_the_default_fleet(finished: Study) -> None:
    """And what differs in others is what decides: their instances are as many, and as far away."""
    assert finished.default.candidate == SPLIT
    assert len({repr(trial.candidate.fleet) for trial in finished.trials}) > 2
    for trial in finished.trials:
        assert trial.report["failure"] is None
        assert trial.candidate.fleet is not None
        kept = {decides: getattr(SPLIT.fleet, decides) for decides in FLEET_DECISIONS}
        assert replace(trial.candidate.fleet, **kept) == SPLIT.fleet


def test_the_study_says_it_all(finished: Study, tmp_path: Path) -> None:
    """What is read is what was found, and a trial is worth the same wherever it is evaluated again."""
    assert finished.spec["space"]["default"]["fleet"] == SPLIT.as_dict()["fleet"]
    read = read_study(finished.path)
    assert read.trials == finished.trials
    on = ([finished.path / "workload-0.jsonl"], finished.path / "calibration.json")
    assert worth(read.best.candidate, *on) == finished.best.report


def test_equal_seeds_give_equal_fleets(finished: Study, tmp_path: Path) -> None:
    assert search(tmp_path / "study", space=Space(SPLIT), num_trials=NUM_TRIALS).trials == finished.trials


def test_a_fleet_of_a_study_is_resumed(finished: Study, tmp_path: Path) -> None:
    """Of as many instances; another fleet makes another study."""
    lines = (finished.path / "trials.journal").read_bytes().splitlines(keepends=True)
    search(tmp_path / "study", space=Space(SPLIT), num_trials=2)
    (tmp_path / "study" / "study.json").unlink()
    (tmp_path / "study" / "trials.journal").write_bytes(b"".join(lines[: len(lines) // 2]))
    other = fleet(4, route="cache-aware-corrected", roles="static")
    for another in (default(), other):
        with pytest.raises(ConfigError, match=r"is a study of something else \(space differ\)"):
            search(tmp_path / "study", space=Space(another), num_trials=NUM_TRIALS)
    resumed = search(tmp_path / "study", space=Space(SPLIT), num_trials=NUM_TRIALS)
    assert resumed.trials[:2] == finished.trials[:2]
    assert len(resumed.trials) == NUM_TRIALS


def test_a_candidate_without_a_fleet_says_nothing_of_one() -> None:
    """Studies of one instance are what they were."""
    assert "fleet" not in default().as_dict()
    for one in (default(), SPLIT):
        assert candidate(one.as_dict()) == one


def test_changes_of_a_fleet_are_counted() -> None:
    """Each field that differs; another policy is one, and so is a router where there was none, with each of its own."""
    assert num_changes(SPLIT, SPLIT) == 0
    assert num_changes(SPLIT, fleet(route="round-robin", roles="static")) == 1
    assert num_changes(SPLIT, fleet(route="cache-aware-corrected", roles=Static(num_prefill=2))) == 1
    assert num_changes(SPLIT, fleet(4, route="cache-aware-corrected", roles="static")) == 1
    assert num_changes(SPLIT, default()) == num_changes(default(), SPLIT) == 1 + len(FLEET_DECISIONS)


def test_policies_of_a_fleet_are_chosen_from_where_there_is_one() -> None:
    """Each with its knobs, as those of an instance; where there is none, they are unknown."""
    space = Space(fleet(), ["roles.static", "prefix-affinity", "roles.slo-flip"])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, seen = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2)), set()
    for _ in range(40):
        trial = study.ask()
        found = space.suggest(trial).fleet
        assert found is not None
        assert policy_name(found.roles) == trial.params["roles"]
        seen.add((policy_name(found.route), policy_name(found.roles)))
        owners = {name.rpartition(".")[0] for name in trial.params if name.startswith("roles.")}
        assert owners == {f"roles.{trial.params['roles']}"} - {"roles.colocated"}
        study.tell(trial, 0.0)
    assert seen == {(a, b) for a in ("round-robin", "prefix-affinity") for b in ("colocated", "static", "slo-flip")}
    assert space.suggest(optuna.trial.FixedTrial(space.default_params())) == fleet()
    with pytest.raises(ConfigError, match="unknown policy 'slo-flip'; accepted: batch"):
        Space(default(), ["slo-flip"])


def test_no_more_instances_compute_prompts_than_can() -> None:
    """One has to go on from there; a default that says more is told so."""
    assert searched(fleet(5, roles="static"))["roles.num_prefill"] == [1, 4, False]
    assert searched(fleet(40, roles="static"))["roles.num_prefill"] == [1, 16, False]
    assert searched(fleet(2, roles="static")) == {}
    with pytest.raises(ConfigError, match=r"default roles\.num_prefill is 3, the space accepts 1 to 2"):
        Space(fleet(3, roles=Static(num_prefill=3)))


SURROUNDINGS = {"one": (1, ()), "two": (2, ()), "two that stay": (3, ()), "one that fails": (3, (OUTAGE,))}


def unsearched() -> Iterator[tuple[str, str, str, str]]:
    """(where, decision, policy, knob) that a tuner leaves alone."""
    for where, (num, outages) in SURROUNDINGS.items():
        for decides in FLEET_DECISIONS:
            for name, cls in policies(decides).items():
                own = searched(fleet(num, outages=outages, **{decides: name}))
                yield from ((where, decides, name, knob) for knob in knobs(cls) if f"{decides}.{knob}" not in own)


def served(one: Candidate) -> Records:
    machine = fitted_machine(CALIBRATION)
    predicted = machine.predicts(one.instance)
    known = {"step_time": machine.step_time, "fleet": one.fleet}
    return run_simulation(workload(), one.instance, one.policies, predicted, vocab_size=1000, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(("where", "decides", "name", "knob"), list(unsearched()))
def test_a_knob_that_is_not_searched_does_nothing(where: str, decides: str, name: str, knob: str) -> None:
    """At either end of its range, every record is the same: trials of it would be in vain."""
    num, outages = SURROUNDINGS[where]
    note = knobs(policies(decides)[name])[knob]
    ends = note.values if isinstance(note, Choice) else (note.low, note.high)
    whole = [make_policy(decides, name, {knob: value}) for value in ends]
    one, *others = [served(fleet(num, outages=outages, role_interval_us=20_000, **{decides: own})) for own in whole]
    assert all(other == one for other in others)


def test_some_knob_is_left_alone_and_with_more_around_it_is_searched() -> None:
    """So that the law above is about something, and every fleet's knob is searched somewhere."""
    left = set(unsearched())
    assert {where for where, *_ in left} >= {"one", "two", "two that stay"}
    for decides in FLEET_DECISIONS:
        for name, cls in policies(decides).items():
            own = searched(fleet(9, outages=(OUTAGE,), **{decides: name}))
            assert set(own) == {f"{decides}.{knob}" for knob in knobs(cls)}


PROMISE = Slo(ttft_us=250_000, tpot_us=3_500)
NUM_INSTANCES = 5


def mixed() -> Workload:
    """Two long prompts that ask for a token, then a short one that asks for many, and so on."""
    return Workload(
        requests=tuple(
            replace(request(i, 7000 * i, prompt=300 if i % 3 else 30, output=1 if i % 3 else 120), slo=PROMISE)
            for i in range(90)
        )
    )


def split(num_prefill: int) -> Candidate:
    one = fleet(NUM_INSTANCES, route="least-loaded", roles=Static(num_prefill=num_prefill))
    return replace(one, instance=replace(one.instance, num_kv_blocks=1024, max_seqs_per_batch=16))


@pytest.mark.slow
def test_the_tuner_finds_the_split_that_trying_all_finds(tmp_path: Path) -> None:
    """Three of five compute prompts: with fewer first tokens are late, with more the last one is too busy."""
    study = search(tmp_path / "study", space=Space(split(1)), on=mixed(), num_trials=24)
    on = ([study.path / "workload-0.jsonl"], study.path / "calibration.json")
    every = {n: worth(split(n), *on)["goodput_per_s"] for n in range(1, NUM_INSTANCES)}
    best = max(every, key=lambda n: every[n])
    assert every[best] > 1.5 * max(goodput for n, goodput in every.items() if n != best)
    assert study.default.goodput_per_s == every[1]
    found = study.best.candidate.fleet
    assert found is not None
    assert values_of(found.roles) == {"num_prefill": best}
    assert study.best.goodput_per_s >= 0.99 * every[best]


def test_what_one_instance_cannot_be_told_is_left_out() -> None:
    """An export is of an instance; a report shows all."""
    left = export(SPLIT, "xllm", kv_bytes_per_token=1).left_out
    assert left["num_instances"] == 3
    assert {decides: left[decides] for decides in FLEET_DECISIONS} == {
        decides: policy_name(policy) for decides, policy in SPLIT.decided() if decides in FLEET_DECISIONS
    }
    other = fleet(route="cache-aware-corrected", roles=Static(num_prefill=2))
    shown = configurations(SPLIT.as_dict(), other.as_dict())
    assert "roles.num_prefill" in shown
    assert "fleet.num_instances" in shown
