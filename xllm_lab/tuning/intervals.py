"""What a configuration is predicted to do: an interval a metric, where numbers come from, and which knobs matter.

An interval has three parts, put together as independent errors are:

    seeds       the mean over so many arrivals is known no better than they differ (Student's t); nothing where the
                very same arrivals will be measured
    step times  the same arrivals on machines as much slower, and faster, as the calibration may be wrong over a run:
                the queue makes more of it than the steps do, and simulating says how much more
    simulator   what it was wrong by, metric by metric, on engine runs that are known (`known_error`); else as much as
                `compare` accepts of it

All metrics together lie within their intervals with 95 % confidence, so each has more (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from xllm_lab.candidate import Candidate
from xllm_lab.draft_time import DraftTime, Weights
from xllm_lab.errors import ConfigError, PolicyError, RequestTooLargeError, RunError
from xllm_lab.metrics import Summary, metric_value, summarize
from xllm_lab.policies.catalog import policy_name, values_of
from xllm_lab.records import Records
from xllm_lab.runs import Run
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.compare import ACCEPTED_ERROR_FRAC
from xllm_lab.sim.cost.host import HostOverhead
from xllm_lab.sim.simulator import EXTRAPOLATED_FRAC_WARNING, run_simulation
from xllm_lab.sim.spread import UNKNOWN
from xllm_lab.step_time import StepTime, feature_rows
from xllm_lab.tuning.evidence import METRICS, mean_metrics, warm
from xllm_lab.tuning.gain import CONFIDENCE, paired_gain
from xllm_lab.tuning.study import EQUAL_FRAC
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.workload import Workload

# A machine is not taken to be faster than this.
_LEAST_FACTOR = 0.1
# Of the error, each way: what a queue makes of it need not be largest at its end.
_PARTS = (-1.0, -0.5, 0.5, 1.0)
_DECODE_METRICS, _PREFILL_METRICS = ("tpot_us",), ("ttft_us",)


class Provenance(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ANALYTIC = "analytic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Of one metric.

    Attributes:
        provenance: of the step times behind it: within the calibrated range, beyond it, or of a link or store whose
            rates were given.
        parts_frac: half widths by source (above), relative to what is expected.
    """

    expected: float
    low: float
    high: float
    provenance: Provenance
    parts_frac: dict[str, float]

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobEffect:
    """What the candidate's goodput owes to one of its changes: candidate less the same with that knob at its default.

    Attributes:
        effect_frac, low_frac, high_frac: relative to the goodput without the change, with a 95 % interval over
            arrivals; None: it cannot run, or keeps no promise, without it.
    """

    knob: str
    default: str
    tuned: str
    effect_frac: float | None
    low_frac: float | None
    high_frac: float | None

    @property
    def is_in_noise(self) -> bool:
        """It is not shown to be worth, or to cost, more than two configurations that count as equal may differ by."""
        if self.low_frac is None or self.high_frac is None:
            return False
        return self.low_frac <= EQUAL_FRAC and self.high_frac >= -EQUAL_FRAC


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A candidate beside its default, as predicted.

    Attributes:
        default, tuned: intervals by metric of the mean over the workloads; of metrics that every run has.
        knobs: one for each change.
        num_workloads: over which means are taken.
        is_error_measured: the simulator's own error comes from engine runs.
    """

    default: dict[str, Interval]
    tuned: dict[str, Interval]
    knobs: tuple[KnobEffect, ...]
    num_workloads: int
    is_error_measured: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `recommendation` turns it back."""
        knobs = [{**asdict(k), "is_in_noise": k.is_in_noise} for k in self.knobs]
        return {**asdict(self), "knobs": knobs}


def recommendation(value: Mapping[str, Any]) -> Recommendation:
    """Inverse of `Recommendation.as_dict`. KeyError, TypeError or ValueError for anything else."""

    def intervals(of: Mapping[str, Any]) -> dict[str, Interval]:
        return {metric: Interval(**{**one, "provenance": Provenance(one["provenance"])}) for metric, one in of.items()}

    knobs = ({name: v for name, v in knob.items() if name != "is_in_noise"} for knob in value["knobs"])
    return Recommendation(
        default=intervals(value["default"]),
        tuned=intervals(value["tuned"]),
        knobs=tuple(KnobEffect(**knob) for knob in knobs),
        num_workloads=value["num_workloads"] + 0,
        is_error_measured=bool(value["is_error_measured"]),
    )


class Foresight:
    """A calibrated machine that is asked what configurations would do.

    Args:
        known: relative error of the simulator by metric, see `known_error`.
    """

    def __init__(
        self, calibration: Calibration, tiers: Tiers | None = None, known: Mapping[str, float] | None = None
    ) -> None:
        self.calibration, self.tiers, self._is_error_measured = calibration, tiers or Tiers(), known is not None
        self._known = known or {}

    def recommend(
        self,
        default: Candidate,
        tuned: Candidate,
        workloads: Sequence[Workload],
        counted_from: Sequence[int] | None = None,
        *,
        same_arrivals: bool = False,
    ) -> Recommendation:
        """Intervals of both, and what each change is worth.

        Args:
            workloads: the arrivals over which means are taken, at least two.
            same_arrivals: these, and no others, will be measured.
            counted_from: requests that are warm-up, a workload.

        Raises:
            ConfigError: fewer than two workloads; and as simulating either of them does.
        """
        if len(workloads) < 2:
            raise ConfigError(f"{len(workloads)} workload to predict on; accepted: at least 2, for their spread")
        cuts = tuple(counted_from or (0,) * len(workloads))
        return Recommendation(
            default=self._intervals(default, workloads, cuts, same_arrivals),
            tuned=self._intervals(tuned, workloads, cuts, same_arrivals),
            knobs=tuple(self._effects(default, tuned, workloads, cuts)),
            num_workloads=len(workloads),
            is_error_measured=self._is_error_measured,
        )

    def _intervals(
        self, one: Candidate, workloads: Sequence[Workload], counted_from: Sequence[int], same_arrivals: bool
    ) -> dict[str, Interval]:
        runs = self._runs(one, workloads, 1.0)
        counted = [summarize(warm(run, num)) for run, num in zip(runs, counted_from, strict=True)]
        level = 1 - (1 - CONFIDENCE) / len(METRICS)
        wrong = self._wrong_frac(runs[0], level)
        others = [
            mean_metrics(self._summaries(one, workloads, counted_from, factor))
            for factor in (max(_LEAST_FACTOR, 1 + part * wrong) for part in _PARTS)
        ]
        steps = _StepKinds(runs[0], self.calibration.highest)
        found = {}
        for metric, expected in mean_metrics(counted).items():
            ends = [other.get(metric, expected) for other in others]
            seeds = 0.0 if same_arrivals else _half_width([metric_value(c, metric) or 0.0 for c in counted], level)
            simulator = self._known.get(metric, ACCEPTED_ERROR_FRAC) * expected
            down, up = expected - min(expected, *ends), max(expected, *ends) - expected
            parts = {"seeds": seeds, "step_time": max(down, up), "simulator": simulator}
            found[metric] = Interval(
                expected=expected,
                low=max(0.0, expected - math.hypot(seeds, simulator, down)),
                high=expected + math.hypot(seeds, simulator, up),
                provenance=self._provenance(one, steps.extrapolated_frac(metric)),
                parts_frac={name: part / expected if expected else 0.0 for name, part in parts.items()},
            )
        return found

    def goodputs_per_s(self, one: Candidate, workloads: Sequence[Workload]) -> list[float] | None:
        """On each workload; None if it cannot run."""
        try:
            return [s.goodput_per_s for s in self._summaries(one, workloads, (0,) * len(workloads), 1.0)]
        except (RequestTooLargeError, ConfigError, PolicyError):
            return None

    def run(self, one: Candidate, workload: Workload, factor: float = 1.0) -> Records:
        """Simulate on a machine whose steps take `factor` times as long as calibrated."""
        machine = self.tiers.machine(scaled(self.calibration, factor), one.policies)
        machine.refuse_if_not_priced(one.policies, one.instance)
        for request in workload.requests:
            one.instance.refuse_if_too_large(request)
        # A policy is told what was calibrated, however the machine is.
        told = self.calibration.step_time_with_host()
        return run_simulation(
            workload,
            one.instance,
            one.policies,
            machine.predicts(one.instance),
            vocab_size=machine.model["vocab_size"],
            step_time=told,
            draft_time=self.calibration.draft_time,
            copy_time=machine.copy_time,
            fleet=one.fleet,
        )

    def _runs(self, one: Candidate, workloads: Sequence[Workload], factor: float) -> list[Records]:
        return [self.run(one, workload, factor) for workload in workloads]

    def _summaries(
        self, one: Candidate, workloads: Sequence[Workload], counted_from: Sequence[int], factor: float
    ) -> list[Summary]:
        runs = self._runs(one, workloads, factor)
        return [summarize(warm(run, num)) for run, num in zip(runs, counted_from, strict=True)]

    def _wrong_frac(self, run: Records, level: float) -> float:
        """By which the calibration may be wrong over all of this run's steps."""
        if self.calibration.spread == UNKNOWN:
            return self.calibration.residual.p90_frac
        spread = self.calibration.run_spread()
        spread.add(_rows(run))
        return spread.half_width_frac(level)

    def _provenance(self, one: Candidate, extrapolated_frac: float) -> Provenance:
        given = self.tiers.host_link_bytes_per_s is not None or self.tiers.store is not None
        if given and one.policies.copies:
            return Provenance.ANALYTIC
        if extrapolated_frac > EXTRAPOLATED_FRAC_WARNING:
            return Provenance.EXTRAPOLATED
        return Provenance.INTERPOLATED

    def _effects(
        self, default: Candidate, tuned: Candidate, workloads: Sequence[Workload], counted_from: Sequence[int]
    ) -> Iterator[KnobEffect]:
        with_all = [s.goodput_per_s for s in self._summaries(tuned, workloads, counted_from, 1.0)]
        for knob, was, became, without in one_fewer(default, tuned):
            try:
                summaries = self._summaries(without, workloads, counted_from, 1.0)
            except (RequestTooLargeError, ConfigError, PolicyError):
                yield KnobEffect(knob=knob, default=was, tuned=became, effect_frac=None, low_frac=None, high_frac=None)
                continue
            gain = paired_gain([s.goodput_per_s for s in summaries], with_all)
            yield KnobEffect(
                knob=knob,
                default=was,
                tuned=became,
                effect_frac=gain.gain_frac,
                low_frac=gain.low_frac,
                high_frac=gain.high_frac,
            )


def scaled(calibration: Calibration, factor: float) -> Calibration:
    """A machine on which steps, and the host's part of them, take `factor` times as long; copies take as long."""
    if factor == 1.0:
        return calibration
    host = HostOverhead(step_us=calibration.host.step_us * factor, sequence_us=calibration.host.sequence_us * factor)
    drafts = {m: Weights(*(w * factor for w in ws)) for m, ws in calibration.draft_time.weights.items()}
    step_time = StepTime(tuple(w * factor for w in calibration.step_time.weights))
    return replace(calibration, step_time=step_time, host=host, draft_time=DraftTime(drafts))


def known_error(calibration: Calibration, runs: Sequence[Run], tiers: Tiers | None = None) -> dict[str, float]:
    """The largest relative error of the simulator on engine runs, by metric.

    Raises:
        ConfigError: a run of the simulator; and as simulating does.
        RunError: a run cannot be read.
    """
    foresight, worst = Foresight(calibration, tiers), dict[str, float]()
    for run in runs:
        if run.manifest.host != "engine":
            raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted: engine runs")
        if run.manifest.fleet is not None:
            raise ConfigError(f"{run.path}: is a fleet's; accepted: runs of one instance")
        own = Candidate(instance=run.manifest.instance_config(), policies=run.manifest.instance_policies())
        try:
            simulated = summarize(foresight.run(own, run.workload))
        except PolicyError as error:
            raise RunError(f"{run.path}: cannot be simulated: {error}; accepted: a run of a legal policy") from None
        measured = mean_metrics([summarize(run.records)])
        for metric, predicted in mean_metrics([simulated]).items():
            if measured.get(metric):
                error_frac = abs(predicted - measured[metric]) / measured[metric]
                worst[metric] = max(worst.get(metric, 0.0), error_frac)
    return worst


def one_fewer(default: Candidate, tuned: Candidate) -> Iterator[tuple[str, str, str, Candidate]]:
    """(knob, its default, its value, the candidate without the change), for each change of the candidate.

    Another policy is one change. KV memory is never more than the default's.
    """
    ours, theirs = values_of(tuned.instance), values_of(default.instance)
    for name, value in ours.items():
        if value != theirs[name]:
            instance = replace(tuned.instance, **{name: theirs[name]})
            most = default.instance.num_kv_tokens // instance.block_size
            instance = replace(instance, num_kv_blocks=min(instance.num_kv_blocks, most))
            yield name, str(theirs[name]), str(value), replace(tuned, instance=instance)
    there = dict(default.decided())
    for decides, policy in tuned.decided():
        other = there.get(decides)
        if other is None or other == policy:
            continue
        if policy_name(other) != policy_name(policy):
            yield decides, policy_name(other), policy_name(policy), _deciding(tuned, decides, other)
            continue
        for name, value in values_of(policy).items():
            was = values_of(other)[name]
            if value != was:
                without = _deciding(tuned, decides, replace(policy, **{name: was}))
                yield f"{decides}.{name}", str(was), str(value), without


def _deciding(one: Candidate, decides: str, policy: Any) -> Candidate:
    if decides in dict(one.policies):
        return replace(one, policies=replace(one.policies, **{decides: policy}))
    assert one.fleet is not None, "what no instance decides, a fleet does"
    return replace(one, fleet=replace(one.fleet, **{decides: policy}))


def _half_width(values: Sequence[float], level: float) -> float:
    count = len(values)
    deviation = float(np.std(values, ddof=1))
    return float(stdtrit(count - 1, 0.5 + 0.5 * level)) * deviation / math.sqrt(count)


def _rows(run: Records) -> npt.NDArray[np.float64]:
    steps = run.steps
    return feature_rows(
        np.asarray([len(s.ids) for s in steps], dtype=np.int64),
        np.asarray([n for s in steps for n in s.num_tokens], dtype=np.int64),
        np.asarray([n for s in steps for n in s.num_computed_tokens], dtype=np.int64),
        np.asarray([s.num_logits for s in steps], dtype=np.int64),
        np.asarray([s.graph_tokens or 0 for s in steps], dtype=np.int64),
    )


class _StepKinds:
    """Which steps of a run a metric depends on, and how many of those lie beyond the calibrated range."""

    def __init__(self, run: Records, highest: Sequence[float]) -> None:
        prompts = {int(r.id): r.prompt_tokens for r in run.requests}
        self._is_beyond: npt.NDArray[np.bool_] = np.any(_rows(run) > np.asarray(highest), axis=1)
        self._prefills = np.asarray([_has(s.ids, s.num_computed_tokens, prompts, True) for s in run.steps])
        self._decodes = np.asarray([_has(s.ids, s.num_computed_tokens, prompts, False) for s in run.steps])

    def extrapolated_frac(self, metric: str) -> float:
        """First tokens wait for prompts, the others for decodes, and the rest for both."""
        latency = metric.split(".", maxsplit=1)[0]
        which = np.ones_like(self._is_beyond)
        if latency in _PREFILL_METRICS:
            which = self._prefills
        elif latency in _DECODE_METRICS:
            which = self._decodes
        return float(self._is_beyond[which].mean()) if which.any() else 0.0


def _has(ids: Sequence[int], computed: Sequence[int], prompt_tokens: Mapping[int, int], is_prompt: bool) -> bool:
    """A chunk of a prompt, or of what comes after one."""
    return any((done < prompt_tokens[one]) == is_prompt for one, done in zip(ids, computed, strict=True))
