"""The gate to production: a verified candidate passes with its evidence, or is told why not.

A promotion is a folder. What one needs to go back comes first, then the evidence, and what production reads last:

    rollback.SUFFIX          the default, as the target reads it
    manifest.json            evidence, predictions, the workload's fingerprint, checksums of the files beside it
    calibration.json         of the simulator that predicted, for `drift`
    analysis-template.yaml   the predictions as conditions of a canary
    promoted.SUFFIX          the candidate, as the target reads it
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from xllm_lab.candidate import Candidate, candidate
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.runs import Manifest, Run, new_file, read_json, read_run, write_json
from xllm_lab.sim.calibrate import read_calibration, write_calibration
from xllm_lab.tuning.argo import analysis_template, yaml_of
from xllm_lab.tuning.evidence import Evidence, mean_metrics
from xllm_lab.tuning.export import export, suffix
from xllm_lab.tuning.fingerprint import Fingerprint, fingerprint, fingerprint_from
from xllm_lab.tuning.intervals import Interval, Recommendation, recommendation
from xllm_lab.tuning.study import EQUAL_FRAC
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.tuning.verify import Calibrated, Verification, read_evidence, read_verification, runs_of
from xllm_lab.wording import metric_label, metric_text, percent, signed_percent
from xllm_lab.workload import Slo

FORMAT = 1
# A promise holds if its P99 is within it.
MIN_KEPT_FRAC = 0.99
MAX_CALIBRATION_AGE_S = 30 * 24 * 3600
# Another of these is another engine.
ENGINE_VERSIONS = ("xllm-lab", "build", "torch", "torch-npu", "transformers")


class Reason(StrEnum):
    """Why a candidate is refused."""

    NOTHING_CHANGED = "nothing-changed"
    NOT_THE_INCUMBENT = "not-the-incumbent"
    NOT_MEASURED = "not-measured"
    NOT_PREDICTED = "not-predicted"
    COLD_CACHE = "cold-cache"
    STALE_CALIBRATION = "stale-calibration"
    CHANGED_TOKENS = "changed-tokens"
    LOST_REQUESTS = "lost-requests"
    GAIN_IN_NOISE = "gain-in-noise"
    GAIN_AT_SOME_ARRIVALS = "gain-at-some-arrivals"
    PROMISE_BROKEN = "promise-broken"
    OUTSIDE_PREDICTION = "outside-prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One reason, with the numbers behind it."""

    reason: Reason
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is asked of a candidate.

    Attributes:
        min_kept_frac: of requests, for which each promise is kept in the worst repeat.
        max_calibration_age_s: older measurements of the machine are not believed.
    """

    min_kept_frac: float = MIN_KEPT_FRAC
    max_calibration_age_s: int = MAX_CALIBRATION_AGE_S

    def __post_init__(self) -> None:
        if not 0 <= self.min_kept_frac <= 1:
            raise ConfigError(f"min_kept_frac is {self.min_kept_frac}, from 0 to 1 is accepted")
        if self.max_calibration_age_s < 0:
            raise ConfigError(f"max_calibration_age_s is {self.max_calibration_age_s}, at least 0 is accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What was handed to production, as `manifest.json` says.

    Attributes:
        slo: what all requests of the verified workload were promised; None where they were promised different things.
    """

    path: Path
    to: str
    promoted: Candidate
    rollback: Candidate
    alternatives: tuple[Candidate, ...]
    recommendation: Recommendation
    fingerprint: Fingerprint
    tiers: Tiers
    slo: Slo | None
    files: dict[str, str]

    @property
    def config(self) -> Path:
        return self.path / f"promoted.{suffix(self.to)}"


def refusals(
    path: Path, terms: Terms | None = None, *, incumbent: Candidate | None = None, now_us: int | None = None
) -> list[Refusal]:
    """Why the candidate of a verification may not serve; empty if it may.

    Everything is worked out from the verification's runs; of its summary only what was predicted is taken.

    Args:
        incumbent: what serves now; None: nobody knows of anything else than the verification's default.
        now_us: Unix time; None is this machine's.

    Raises:
        RunError: something is missing or unreadable.
    """
    return _refusals(_Case(path, terms or Terms(), incumbent, time.time_ns() // 1000 if now_us is None else now_us))


def promote(
    path: Path,
    *,
    to: str,
    out: Path,
    version: str | None = None,
    terms: Terms | None = None,
    now_us: int | None = None,
) -> tuple[Promotion | None, list[Refusal]]:
    """Hand the candidate of a verification to production, or say why not; then nothing is written.

    `out` may hold an earlier promotion, whose candidate has to be this verification's default; its configuration is
    replaced in one step, after all else is there.

    Raises:
        ConfigError: the target cannot express the candidate or the default.
        RunError: something is missing, unreadable, or cannot be written.
    """
    terms = terms or Terms()
    at_us = time.time_ns() // 1000 if now_us is None else now_us
    case = _Case(path, terms, _serving(out), at_us)
    if found := _refusals(case):
        return None, found
    verified, foreseen = case.verified, case.verified.recommendation
    assert foreseen is not None, "it would have been refused"
    ending, token_bytes = suffix(to), verified.model["kv_bytes_per_token"]
    texts = {
        f"{name}.{ending}": export(one, to, kv_bytes_per_token=token_bytes, version=version)
        for name, one in (("rollback", verified.default), ("promoted", verified.tuned))
    }
    template = yaml_of(analysis_template(foreseen.tuned, to, name="xllm-lab-predicted"))
    files = {name: made.text for name, made in texts.items()} | {"analysis-template.yaml": template}
    manifest = {
        "format": FORMAT,
        "to": to,
        "version": version,
        "promoted_at_us": at_us,
        "verification": str(path),
        "promoted": verified.tuned.as_dict(),
        "rollback": verified.default.as_dict(),
        "left_out": texts[f"promoted.{ending}"].left_out,
        "alternatives": [one.as_dict() for one in verified.alternatives],
        "terms": asdict(terms),
        "evidence": case.evidence.as_dict(),
        "measured": mean_metrics(case.evidence.tuned),
        "predicted": foreseen.as_dict(),
        "calibrated": None if verified.calibrated is None else asdict(verified.calibrated),
        "measured_on": case.measured_on(),
        "fingerprint": fingerprint(case.runs[0].workload).as_dict(),
        "tiers": asdict(verified.tiers),
        "slo": _common_slo(case.runs[0]),
        "files": {name: _checksum(text) for name, text in files.items()},
    }
    _write(out / f"rollback.{ending}", files[f"rollback.{ending}"])
    with new_file(out / "manifest.json") as file:
        write_json(file, manifest)
    write_calibration(read_calibration(path / "calibration.json"), out / "calibration.json")
    _write(out / "analysis-template.yaml", template)
    _write(out / f"promoted.{ending}", files[f"promoted.{ending}"])
    return read_promotion(out), []


def read_promotion(path: Path) -> Promotion:
    """Open a promotion. RunError if it is none, was interrupted, or its files are not those that were written."""
    found = _read_manifest(path)
    if (changed := _changed_file(found)) is not None:
        raise RunError(
            f"{changed}: is not what the manifest tells; accepted: as `promote` wrote it (it was interrupted, or the "
            "file was changed: promote again, or go back by the rollback beside it)"
        )
    return found


def _serving(out: Path) -> Candidate | None:
    """What an earlier promotion into this folder left serving; None if there was none."""
    if not (out / "manifest.json").exists():
        if out.exists() and any(not file.name.startswith("rollback.") for file in out.iterdir()):
            raise RunError(f"{out}: holds something that is no promotion; accepted: a new folder, or a promotion")
        return None
    before = _read_manifest(out)
    return before.promoted if _changed_file(before) is None else before.rollback


def _changed_file(promotion: Promotion) -> Path | None:
    for name, checksum in promotion.files.items():
        file = promotion.path / name
        if not file.exists() or _checksum(file.read_text(encoding="utf-8")) != checksum:
            return file
    return None


def _read_manifest(path: Path) -> Promotion:
    accepted = "a folder that `promote` wrote"
    value = read_json(path / "manifest.json", accepted)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format is {value['format']}, {FORMAT} is accepted")
        return Promotion(
            path=path,
            to=value["to"],
            promoted=candidate(value["promoted"]),
            rollback=candidate(value["rollback"]),
            alternatives=tuple(candidate(one) for one in value["alternatives"]),
            recommendation=recommendation(value["predicted"]),
            fingerprint=fingerprint_from(value["fingerprint"]),
            tiers=Tiers(**value["tiers"]),
            slo=None if value["slo"] is None else Slo(**value["slo"]),
            files=dict(value["files"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path / 'manifest.json'}: {error!r}; accepted: {accepted}") from None


class _Case:
    """A verification before the gate, its runs opened once."""

    def __init__(self, path: Path, terms: Terms, incumbent: Candidate | None, now_us: int) -> None:
        self.verified: Verification = read_verification(path)
        self.evidence: Evidence = read_evidence(path)
        self.runs: list[Run] = [read_run(run) for run in runs_of(path, "default")]
        self.tuned: list[Run] = [read_run(run) for run in runs_of(path, "tuned")]
        self.others: list[Run] = [read_run(run) for run in runs_of(path, "again")]
        self.terms, self.incumbent, self.now_us = terms, incumbent, now_us

    def measured_on(self) -> dict[str, Any]:
        manifest = self.tuned[0].manifest
        return {"model": manifest.model, "hardware": manifest.hardware, "versions": manifest.versions}


def _refusals(case: _Case) -> list[Refusal]:
    return [Refusal(reason=reason, says=says) for reason, find in _CHECKS.items() for says in find(case)]


def _nothing_changed(case: _Case) -> Iterator[str]:
    if case.verified.tuned == case.verified.default:
        yield "the candidate is the default; nothing is to be promoted"


def _not_the_incumbent(case: _Case) -> Iterator[str]:
    if case.incumbent is not None and case.incumbent != case.verified.default:
        yield "the candidate was measured against another configuration than the one that was promoted before"


def _not_measured(case: _Case) -> Iterator[str]:
    """Each run has to be the engine's, of the configuration that it is said to be of."""
    expected = [(run, case.verified.default) for run in (*case.runs, *case.others)]
    for run, one in (*expected, *((run, case.verified.tuned) for run in case.tuned)):
        if run.manifest.host != "engine":
            yield f"{run.path.name} is a {run.manifest.host} run; only the engine's count"
        elif not _is_of(run.manifest, one):
            yield f"{run.path.name} is of another configuration than the verification tells"
    if case.evidence.noise_frac is None:
        yield "the default was not replayed again, so nobody knows the noise"


def _is_of(manifest: Manifest, one: Candidate) -> bool:
    fleet = None if one.fleet is None else one.fleet.as_dict()
    return (manifest.instance_config(), manifest.instance_policies()) == (one.instance, one.policies) and (
        (manifest.fleet is None) == (fleet is None)
    )


def _not_predicted(case: _Case) -> Iterator[str]:
    if case.verified.recommendation is None or case.verified.calibrated is None:
        yield "nothing was predicted of it; verify the study again"


def _cold_cache(case: _Case) -> Iterator[str]:
    for repeat, num in enumerate(case.evidence.num_warm_up):
        if num is None:
            yield f"repeat {repeat}: the hit rate still rose when half of the requests had come; verify a longer trace"


def _stale_calibration(case: _Case) -> Iterator[str]:
    known = case.verified.calibrated
    if known is None:
        return
    for run in (*case.runs, *case.tuned, *case.others):
        if (differing := _differing(known, run.manifest)) is not None:
            yield f"{run.path.name}: {differing}; calibrate again"
            return
    if known.measured_at_us is None:
        yield "nobody knows when its runs were made; calibrate again"
        return
    age_s = (case.now_us - known.measured_at_us) / 1e6
    if age_s > case.terms.max_calibration_age_s:
        days, most = age_s / 86_400, case.terms.max_calibration_age_s / 86_400
        yield f"its oldest run is {days:.1f} days old, at most {most:.1f} are accepted; calibrate again"


def _differing(known: Calibrated, manifest: Manifest) -> str | None:
    for what in ("model", "hardware"):
        was, now = getattr(known, what), getattr(manifest, what)
        if was != now:
            names = sorted(k for k in {*was, *now} if was.get(k) != now.get(k))
            return f"calibrated on another {what} ({', '.join(names)})"
    for name in ENGINE_VERSIONS:
        if known.versions.get(name) != manifest.versions.get(name):
            return f"calibrated on {name} {known.versions.get(name)}, measured on {manifest.versions.get(name)}"
    return None


def _changed_tokens(case: _Case) -> Iterator[str]:
    if case.evidence.num_changed_outputs:
        yield f"{case.evidence.num_changed_outputs} greedy requests had other tokens from it than from the default"


def _lost_requests(case: _Case) -> Iterator[str]:
    for repeat, (was, now) in enumerate(zip(case.evidence.default, case.evidence.tuned, strict=True)):
        lost = [s.num_failed + s.num_rejected for s in (was, now)]
        if lost[1] > lost[0]:
            yield f"repeat {repeat}: it failed or refused {lost[1]} requests, the default {lost[0]}"


def _gain_in_noise(case: _Case) -> Iterator[str]:
    low, floor = case.evidence.least_gain_frac, max(EQUAL_FRAC, case.evidence.noise_frac or 0.0)
    if low is None:
        yield "the default's goodput is 0, so no gain can be given"
    elif low <= floor:
        yield f"the gain is above {signed_percent(low)} with 95 % confidence, and the noise is {percent(floor)}"


def _gain_at_some_arrivals(case: _Case) -> Iterator[str]:
    gain = case.evidence.gain
    worse = [k for k, (a, b) in enumerate(zip(gain.default_per_s, gain.tuned_per_s, strict=True)) if b <= a]
    if worse and len(worse) < len(gain.default_per_s):
        yield f"it is no better at the arrivals of repeat {', '.join(map(str, worse))}"


def _promise_broken(case: _Case) -> Iterator[str]:
    for promise, kept in case.evidence.worst_kept_frac.items():
        if kept < case.terms.min_kept_frac:
            asked = percent(case.terms.min_kept_frac)
            yield f"{promise.upper()} is kept for {percent(kept)} of the requests in the worst repeat, {asked} is asked"


def _outside_prediction(case: _Case) -> Iterator[str]:
    if case.verified.recommendation is None:
        return
    measured = mean_metrics(case.evidence.tuned)
    for metric, interval in case.verified.recommendation.tuned.items():
        value = measured.get(metric)
        if value is None or not interval.holds(value):
            yield f"{_missed(metric, value, interval)}; recalibrate"


def _missed(metric: str, value: float | None, interval: Interval) -> str:
    low, high = (metric_text(metric, v) for v in (interval.low, interval.high))
    got = "nothing" if value is None else metric_text(metric, value)
    return f"{metric_label(metric)} is {got}, {low} to {high} was predicted"


_CHECKS: Mapping[Reason, Callable[[_Case], Iterator[str]]] = {
    Reason.NOTHING_CHANGED: _nothing_changed,
    Reason.NOT_THE_INCUMBENT: _not_the_incumbent,
    Reason.NOT_MEASURED: _not_measured,
    Reason.NOT_PREDICTED: _not_predicted,
    Reason.COLD_CACHE: _cold_cache,
    Reason.STALE_CALIBRATION: _stale_calibration,
    Reason.CHANGED_TOKENS: _changed_tokens,
    Reason.LOST_REQUESTS: _lost_requests,
    Reason.GAIN_IN_NOISE: _gain_in_noise,
    Reason.GAIN_AT_SOME_ARRIVALS: _gain_at_some_arrivals,
    Reason.PROMISE_BROKEN: _promise_broken,
    Reason.OUTSIDE_PREDICTION: _outside_prediction,
}


def _common_slo(run: Run) -> dict[str, int | None] | None:
    promised = {request.slo for request in run.workload.requests}
    return asdict(promised.pop()) if len(promised) == 1 else None


def _write(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
