"""Nothing is called better until the engine measured it: candidate against incumbent, in turn, on a held-out trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xllm_lab.arrivals import rotated
from xllm_lab.candidate import Candidate, candidate
from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import Engine
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.records import Records
from xllm_lab.runs import Run, new_folder, read_json, read_run, write_json
from xllm_lab.sim.calibrate import Calibration, write_calibration
from xllm_lab.step_time import StepTime
from xllm_lab.tuning.evidence import Evidence, evidence
from xllm_lab.tuning.fresh_store import FreshStore
from xllm_lab.tuning.gain import Gain, paired_gain
from xllm_lab.tuning.intervals import Foresight, Recommendation, recommendation
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.workload import Workload

MIN_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What the predictions rest on, as far as it can be outdated. Fields as in `Calibration`."""

    model: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    measured_at_us: int | None

    @staticmethod
    def of(calibration: Calibration) -> Calibrated:
        """Of a calibration."""
        return Calibrated(**{name: getattr(calibration, name) for name in Calibrated.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` writes beside the runs it made.

    Attributes:
        gain: of goodput, warm-up left out.
        recommendation: what was predicted of these very arrivals, and on what it rests; None if nobody asked.
        alternatives: the study's other good candidates, for who serves another workload than this one day.
        tiers: that the candidates were simulated with.
    """

    default: Candidate
    tuned: Candidate
    gain: Gain
    model: dict[str, Any]
    recommendation: Recommendation | None = None
    calibrated: Calibrated | None = None
    alternatives: tuple[Candidate, ...] = ()
    tiers: Tiers = field(default_factory=Tiers)

    @property
    def winner(self) -> Candidate:
        """What should serve: the tuned candidate if it is better, else the default."""
        return self.tuned if self.gain.is_better else self.default


def verify(
    engine: Engine | EngineFleet,
    workload: Workload,
    *,
    default: Candidate,
    tuned: Candidate,
    out: Path,
    repeats: int = MIN_REPEATS,
    step_time: StepTime | None = None,
    draft_time: DraftTime | None = None,
    copy_time: CopyTime | None = None,
    foresight: Foresight | None = None,
    alternatives: Sequence[Candidate] = (),
    make_records: Callable[[], Records] = Records,
) -> Verification:
    """Replay default, tuned, default, tuned, ... and write the runs and verification.json into a new folder.

    Each repeat has other arrivals (`arrivals.rotated`), the same for both. In the end the default serves those of the
    first and of the last repeat again: what it then differs by from itself is noise.

    Args:
        engine: a fleet, if the candidates are fleets'.
        step_time, draft_time, copy_time: what policies are told, each time the same; else the engine measures what they
            need before each run.
        foresight: predicts what is measured; it knows nothing of that but how many requests are warm-up.
        alternatives: see `Verification`.

    Raises:
        ConfigError: fewer than three repeats, or a store that is not empty or cannot be emptied before each.
        RunError: the folder exists or cannot be written; and whatever `Engine.replay` raises.
    """
    if repeats < MIN_REPEATS:
        raise ConfigError(f"repeats is {repeats}, at least {MIN_REPEATS} are accepted")
    store = None if engine.options.store is None else FreshStore(engine.options.store)
    workloads = [rotated(workload, seed) for seed in range(repeats)]
    turns = [(name, k) for k in range(repeats) for name in ("default", "tuned")]
    runs: dict[str, dict[int, Run]] = {"default": {}, "tuned": {}, "again": {}}
    with new_folder(out) as folder:
        for name, k in (*turns, ("again", 0), ("again", repeats - 1)):
            if store is not None:
                store.empty()
            runs[name][k] = _replayed(
                *(engine, workloads[k], tuned if name == "tuned" else default),
                out=folder / f"{name}-{k}",
                step_time=step_time,
                draft_time=draft_time,
                copy_time=copy_time,
                recorder=make_records(),
            )
        found = _evidence(runs, workloads)
        done = Verification(
            default=default,
            tuned=tuned,
            gain=found.gain,
            model=engine.model if isinstance(engine, EngineFleet) else engine.describe(),
            recommendation=None
            if foresight is None
            else foresight.recommend(default, tuned, workloads, found.counted_from, same_arrivals=True),
            calibrated=None if foresight is None else Calibrated.of(foresight.calibration),
            alternatives=tuple(alternatives),
            tiers=Tiers() if foresight is None else foresight.tiers,
        )
        if foresight is not None:
            write_calibration(foresight.calibration, folder / "calibration.json")
        write_json(folder / "verification.json", {**_as_dict(done), "evidence": found.as_dict()})
    return done


def _replayed(engine: Engine | EngineFleet, workload: Workload, one: Candidate, **known: Any) -> Run:
    if isinstance(engine, EngineFleet):
        if one.fleet is None:
            raise ConfigError("a configuration of one instance, and an engine fleet; accepted: a single engine")
        return engine.replay(workload, one.fleet, one.instance, one.policies, **known)
    if one.fleet is not None:
        raise ConfigError(f"a fleet of {one.fleet.num_instances}, and a single engine; accepted: an engine fleet")
    return engine.replay(workload, one.instance, one.policies, **known)


def read_verification(path: Path) -> Verification:
    """Open what `verify` wrote. RunError names what is missing or unreadable."""
    accepted = "a folder that `verify` wrote"
    value = read_json(path / "verification.json", accepted)
    try:
        gain = paired_gain(value["gain"]["default_per_s"], value["gain"]["tuned_per_s"])
        value["model"]["kv_bytes_per_token"] + 0  # what an export will look up
        foreseen, calibrated = value.get("recommendation"), value.get("calibrated")
        return Verification(
            default=candidate(value["default"]),
            tuned=candidate(value["tuned"]),
            gain=gain,
            model=value["model"],
            recommendation=None if foreseen is None else recommendation(foreseen),
            calibrated=None if calibrated is None else Calibrated(**calibrated),
            alternatives=tuple(candidate(one) for one in value.get("alternatives", ())),
            tiers=Tiers(**value.get("tiers", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path / 'verification.json'}: {error!r}; accepted: {accepted}") from None


def read_evidence(path: Path) -> Evidence:
    """What the runs of a verification say; whatever is written beside them. RunError if any is missing or unreadable.

    Raises:
        ConfigError: runs that are no pairs.
    """
    runs = {name: {_number(p): read_run(p) for p in runs_of(path, name)} for name in ("default", "tuned", "again")}
    if not runs["default"].keys() == runs["tuned"].keys() >= runs["again"].keys():
        told = {name: sorted(found) for name, found in runs.items()}
        raise RunError(f"{path}: repeats are {told}; accepted: the runs of a whole verification")
    return _evidence(runs, [run.workload for run in runs["default"].values()])


def _evidence(runs: dict[str, dict[int, Run]], workloads: Sequence[Workload]) -> Evidence:
    place = {k: place for place, k in enumerate(runs["default"])}
    default, tuned = ([run.records for run in runs[name].values()] for name in ("default", "tuned"))
    return evidence(default, tuned, workloads, {place[k]: run.records for k, run in runs["again"].items()})


def runs_of(path: Path, name: str) -> list[Path]:
    """Run folders of "default", "tuned" or "again" in a verification, in order of repeats."""
    return sorted(path.glob(f"{name}-*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def _as_dict(done: Verification) -> dict[str, Any]:
    return {
        "default": done.default.as_dict(),
        "tuned": done.tuned.as_dict(),
        "gain": {**asdict(done.gain), "is_better": done.gain.is_better},
        "model": done.model,
        "recommendation": None if done.recommendation is None else done.recommendation.as_dict(),
        "calibrated": None if done.calibrated is None else asdict(done.calibrated),
        "alternatives": [one.as_dict() for one in done.alternatives],
        "tiers": asdict(done.tiers),
    }
