"""One coordinator owns a study: it asks in rounds, has them judged, and tells in the order asked.

Killed at any moment and begun again, it goes on as if nothing had been: what is proposed is a function of the seed, of
numbers, and of the rounds before (`sampling.Repeatable`, `Propose`); a round is in the book, with its size, before
anything of it is drawn; and it is drawn whole before anything of it is judged.

    created, waiting -> asked, drawn -> judged, report kept by its content -> told
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from xllm_lab.candidate import Candidate, candidate
from xllm_lab.tuning.evaluations import Report
from xllm_lab.tuning.objective import Objective
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.study import Trial

# From the trials of all rounds before: parameters of each trial of the next one; those that are missing are drawn.
Propose = Callable[[Sequence[Trial]], list[dict[str, Any]]]
# Reports of candidates, given the trials of all rounds before.
Judge = Callable[[Sequence[Candidate], Sequence[Trial]], list[Report]]
_ROUND = "round"


def fill(
    study: optuna.Study, space: Space, objective: Objective, *, num_trials: int, propose: Propose, judge: Judge
) -> Iterator[Trial]:
    """Trials in order of number, those that were there first, until there are so many or nothing is proposed."""
    yield from (known := finished(study))
    while (end := _open_round(study, known, propose, num_trials)) > 0:
        played = []
        for trial in _played(study, space, objective, known, end=end, judge=judge):
            yield trial
            played.append(trial)
        known += played


def finished(study: optuna.Study) -> list[Trial]:
    """Trials that were told, in order of number."""
    return [
        Trial(
            number=t.number,
            candidate=candidate(t.user_attrs["candidate"]),
            report=t.user_attrs["report"],
            params=dict(t.params),
        )
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def _open_round(study: optuna.Study, known: Sequence[Trial], propose: Propose, num_trials: int) -> int:
    """How many trials end with the round that is open now; 0 if none is."""
    trials = study.get_trials(deepcopy=False)
    left = [t for t in trials if not t.state.is_finished()]
    if left:
        start, size = left[0].user_attrs[_ROUND]
    else:
        start = len(trials)
        size = min(len(propose(known)), num_trials - start)
        if size <= 0:
            return 0
    if len(trials) < start + size:
        proposed = propose([t for t in known if t.number < start])
        for k in range(len(trials) - start, size):
            params = proposed[k] if k < len(proposed) else {}
            study.enqueue_trial(params, user_attrs={_ROUND: [start, size]})
    return int(start + size)


def _played(
    study: optuna.Study, space: Space, objective: Objective, known: Sequence[Trial], *, end: int, judge: Judge
) -> Iterator[Trial]:
    left = [t for t in study.get_trials(deepcopy=False) if t.number < end and not t.state.is_finished()]
    start, _ = left[0].user_attrs[_ROUND]
    asked = [_asked(study, t) for t in left]
    chosen = [space.suggest(trial) for trial in asked]
    reports = judge(chosen, [t for t in known if t.number < start])
    for there, trial, one, report in zip(left, asked, chosen, reports, strict=True):
        for name, value in report["constraints"].items():
            if name not in there.constraints:  # told by a coordinator that came no further
                trial.set_constraint(name, value)
        for step, value in enumerate(report["by_workload_per_s"] if len(objective.directions) == 1 else ()):
            if step not in there.intermediate_values:
                trial.report(value, step)
        trial.set_user_attr("candidate", one.as_dict())
        trial.set_user_attr("report", report)
        study.tell(trial, objective.values(report))
        yield Trial(number=trial.number, candidate=one, report=report, params=dict(trial.params))


def _asked(study: optuna.Study, there: FrozenTrial) -> optuna.Trial:
    if there.state == TrialState.WAITING:
        trial = study.ask()
        assert trial.number == there.number, "waiting trials are asked in order"
        return trial
    return optuna.Trial(study, there._trial_id)  # it was asked before: what was drawn stays
