"""Speculation beside everything else that is tuned: where requests are few it is found, where there are many it is not.

A made-up machine on which a row costs a tenth of a step that is otherwise empty, and six of ten drafts are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import request
from tests.tuning import searches
from tests.tuning.searches import WorkersHere
from xllm_lab.candidate import Candidate
from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.policies.catalog import knobs, make_policy, policies
from xllm_lab.policies.draft import METHODS, DraftPolicy
from xllm_lab.policies.draft.off import Off
from xllm_lab.sim.acceptance import LearntAcceptance, MethodProcess, Process, Rates
from xllm_lab.sim.calibrate import write_calibration
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.tuning import workers
from xllm_lab.tuning.objective import worth
from xllm_lab.tuning.search import tune
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Study
from xllm_lab.workload import Request, Slo, Workload

METHOD = "mtp"
_KEPT = Rates((0.6,), (0.0,))
_WEIGHTS = {"eager_us": 10_000.0, "token_us": 1_000.0}
CALIBRATION = replace(
    searches.CALIBRATION,
    step_time=StepTime(tuple(_WEIGHTS.get(term, 0.0) for term in TERMS)),
    acceptance=LearntAcceptance({METHOD: MethodProcess(Process(Rates((1.0,), (0.0,)), _KEPT, 1))}),
    draft_time=DraftTime({METHOD: Weights(depth_us=300.0, token_us=300.0)}),
)
# A lone request takes 11 ms a token without drafts, 7.2 with two at a time; 24 together take 34 ms for 24
# tokens without drafts, 66 ms for 38 with one at a time.
INTERACTIVE, OVERNIGHT = Slo(tpot_us=9_500), Slo(e2e_us=850_000)
OTHERS = [f"draft.{name}" for name in policies("draft") if name != "fixed"]


def default(**knobs_of_fixed: Any) -> Candidate:
    """Everybody drafts."""
    own_default = searches.default(num_kv_blocks=512, max_seqs_per_batch=64)
    fixed = make_policy("draft", "fixed", {"method": METHOD, **knobs_of_fixed})
    return replace(own_default, policies=replace(own_default.policies, draft=fixed))


def few() -> list[Request]:
    """One at a time, each in a hurry."""
    return [request(i, 500_000 * i, prompt=4, output=40, slo=INTERACTIVE) for i in range(6)]


def many(after: int = 0, arrival_us: int = 0) -> list[Request]:
    """All at once, and all want to be done."""
    return [request(after + i, arrival_us, prompt=4, output=20, slo=OVERNIGHT) for i in range(24)]


def work(requests: Sequence[Request]) -> Workload:
    return Workload(requests=tuple(requests), source=f"{len(requests)} requests")


FEW, MANY = work(few()), work(many())
# The load changes: a few by day, and then a pile.
DAY_AND_NIGHT = work([*few(), *many(after=6, arrival_us=3_000_000)])


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", WorkersHere)


def study(out: Path, workload: Workload, num_trials: int = 24) -> Study:
    space = Space(default(), OTHERS)
    return tune([workload], CALIBRATION, space, num_trials=num_trials, seed=0, out=out, num_workers=1)


def goodput_per_s(folder: Path, workload: Workload, candidate: Candidate, draft: DraftPolicy) -> float:
    """Of a candidate with another draft policy."""
    write_calibration(CALIBRATION, folder / "other.json")
    own.write(workload, folder / "other.jsonl")
    other = replace(candidate, policies=replace(candidate.policies, draft=draft))
    report = worth(other, [folder / "other.jsonl"], folder / "other.json")
    assert report["failure"] is None
    return float(report["goodput_per_s"])


def test_every_draft_policy_brings_its_own_knobs() -> None:
    """Whatever it declares, by its own name and with its own range; nobody listed them."""
    told = Space(default(), OTHERS).describe()
    assert set(told["policies"]["draft"]) == set(policies("draft"))
    found = {name for name in told["knobs"] if name.startswith("draft.")}
    assert found == {f"draft.{name}.{knob}" for name, cls in policies("draft").items() for knob in knobs(cls)}
    assert told["knobs"]["draft.load-aware.max_verify_tokens"] == [4, 1024, True]


def test_methods_that_nobody_can_draft_by_are_not_drawn() -> None:
    """A choice among all of them is one among those that the machine knows; "auto" stays."""
    known = Space(default(), OTHERS).where(methods=[METHOD]).describe()["knobs"]
    assert known["draft.fixed.method"] == known["draft.load-aware.method"] == [METHOD]
    assert known["draft.adaptive-pruning.method"] == ["auto", METHOD]
    assert Space(default(), OTHERS).describe()["knobs"]["draft.fixed.method"] == list(METHODS)
    with pytest.raises(ConfigError, match=r"default draft\.fixed\.method is 'ngram', the space accepts mtp"):
        Space(default(method="ngram"), OTHERS).where(methods=[METHOD])


def test_speculation_is_found_where_requests_are_few(tmp_path: Path) -> None:
    """Without it nobody has what was promised."""
    best = study(tmp_path / "study", FEW, 12).best
    assert not isinstance(best.candidate.policies.draft, Off)
    assert best.report["summaries"][0]["acceptance_length"] > 1.3
    assert goodput_per_s(tmp_path, FEW, best.candidate, Off()) == 0 < best.goodput_per_s


def test_no_speculation_is_found_where_requests_are_many(tmp_path: Path) -> None:
    """The default drafts, and pays for it; the best drafts next to nothing."""
    found = study(tmp_path / "study", MANY)
    told = found.best.report["summaries"][0]
    assert (told["num_drafted_tokens"] or 0) < 0.1 * sum(r.output_tokens for r in MANY.requests)
    assert found.best.goodput_per_s > 1.2 * found.default.goodput_per_s
    for depth in (1, 3, 8):
        drafts = make_policy("draft", "fixed", {"method": METHOD, "num_speculative_tokens": depth})
        assert goodput_per_s(tmp_path, MANY, found.best.candidate, drafts) < found.best.goodput_per_s


def test_a_policy_that_looks_at_the_load_is_found_where_the_load_changes(tmp_path: Path) -> None:
    """No fixed depth, nor none, does as well in its place."""
    found = study(tmp_path / "study", DAY_AND_NIGHT)
    best = found.best
    assert type(best.candidate.policies.draft) in {policies("draft")[n] for n in ("load-aware", "adaptive-pruning")}
    others = [make_policy("draft", "fixed", {"method": METHOD, "num_speculative_tokens": d}) for d in range(1, 9)]
    for other in (Off(), *others):
        assert goodput_per_s(tmp_path, DAY_AND_NIGHT, best.candidate, other) < 0.9 * best.goodput_per_s
