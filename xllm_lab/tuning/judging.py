"""From candidates to reports of trials: what is known already, what need not be known, and what is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from xllm_lab.candidate import Candidate
from xllm_lab.tuning.evaluations import Evaluations, Report, Spec, address, job
from xllm_lab.tuning.objective import Objective, failed
from xllm_lab.tuning.study import Trial
from xllm_lab.tuning.workers import DIED, Executor, Function

# Why a candidate need not be evaluated; None if it must.
Screen = Callable[[Candidate], str | None]
SCREENED = "Screened"
# With fewer workloads nobody is given up: of two even the smallest error probability is 1/4.
FEWEST_TO_PRUNE = 3


def passes_all(_: Candidate) -> None:
    """Every candidate is evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Satisfies `coordinator.Judge`.

    Attributes:
        evaluate: from a job to a report, run by the executor.
        templates: a specification for each workload, but for the candidate.
        inputs: where they lie, by what they hold.
        prune_p: see `search.tune`.
    """

    objective: Objective
    evaluate: Function
    templates: Sequence[Spec]
    inputs: Mapping[str, str]
    evaluations: Evaluations
    executor: Executor
    screen: Screen = passes_all
    prune_p: float | None = None

    def __call__(self, candidates: Sequence[Candidate], known: Sequence[Trial]) -> list[Report]:
        found: list[list[Report]] = [self._screened(one) for one in candidates]
        going = [k for k, reports in enumerate(found) if not reports]
        # Side by side on all workloads; or on one after the other, as long as a candidate is worth it.
        turns = [self.templates] if self.prune_p is None else [[template] for template in self.templates]
        best = self._best(known)
        for turn in turns:
            specs = [{**template, "candidate": candidates[k].as_dict()} for k in going for template in turn]
            reports = iter(self._evaluated(specs))
            for k in going:
                found[k] += [next(reports) for _ in turn]
            going = [k for k in going if not self._is_given_up(found[k], best)]
        return [self.objective.report(reports, len(self.templates)) for reports in found]

    def known(self, one: Candidate) -> list[Report]:
        """What was kept of a candidate's evaluations."""
        found = [self.evaluations.find({**template, "candidate": one.as_dict()}) for template in self.templates]
        return [report for report in found if report is not None]

    def _screened(self, one: Candidate) -> list[Report]:
        reason = self.screen(one)
        return [] if reason is None else [failed(SCREENED, reason)]

    def _evaluated(self, specs: Sequence[Spec]) -> list[Report]:
        found = {address(spec): self.evaluations.find(spec) for spec in specs}
        missing = {key: spec for spec in specs if found[key := address(spec)] is None}
        jobs: list[dict[str, Any]] = [job(spec, self.inputs) for spec in missing.values()]
        for (key, spec), report in zip(missing.items(), self.executor.run(self.evaluate, jobs), strict=True):
            found[key] = report
            # Who was killed may live where there is more memory; everything else is as the specification says.
            if report["failure"] is None or report["failure"]["category"] != DIED:
                self.evaluations.keep(spec, report)
        reports = [found[address(spec)] for spec in specs]
        return [report for report in reports if report is not None]

    def _best(self, known: Sequence[Trial]) -> Sequence[float]:
        """Of the best trial of all rounds before, by workload."""
        feasible = [t for t in known if t.is_feasible]
        best = max(feasible, key=lambda t: (t.value_per_s, -t.number), default=None)
        return () if best is None else best.report["by_workload_per_s"]

    def _is_given_up(self, reports: Sequence[Report], best: Sequence[float]) -> bool:
        if reports[-1]["failure"] is not None:
            return True
        if self.prune_p is None or not best or len(reports) < FEWEST_TO_PRUNE:
            return False
        own = [float(r["summary"]["goodput_per_s"]) / r["num_devices"] for r in reports]
        return is_worse(own, best[: len(own)], self.prune_p)


def is_worse(own: Sequence[float], best: Sequence[float], p: float) -> bool:
    """Wilcoxon's signed-rank test, one-sided, on pairs of one workload each, as `optuna.pruners.WilcoxonPruner` has it.

    That one compares with the best trial of the moment; a resumed study would compare with another.
    """
    if math.fsum(own) >= math.fsum(best):
        return False
    differences = [a - b for a, b in zip(own, best, strict=True)]
    return bool(stats.wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue < p)
