"""Nothing is called better until the engine measured it: candidate against incumbent, in turn, on a held-out trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from xllm_lab.candidate import Candidate, candidate
from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.engine.cluster.fleet import EngineFleet
from xllm_lab.engine.engine import Engine
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.metrics import summarize
from xllm_lab.records import Records
from xllm_lab.runs import Run, new_folder, read_json, write_json
from xllm_lab.step_time import StepTime
from xllm_lab.tuning.fresh_store import FreshStore
from xllm_lab.workload import Workload

MIN_REPEATS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Goodput of the candidate against the default, from paired replays.

    Attributes:
        default_per_s, tuned_per_s: goodput of each replay, tokens per second, in order.
        gain_frac: mean difference / mean of the default; None if the default's is 0.
        low_frac, high_frac: 95 % confidence interval of the gain, Student's t on the paired differences.
    """

    default_per_s: tuple[float, ...]
    tuned_per_s: tuple[float, ...]
    gain_frac: float | None
    low_frac: float | None
    high_frac: float | None

    @property
    def is_better(self) -> bool:
        """The whole interval lies above 0."""
        return self.low_frac is not None and self.low_frac > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` writes beside the runs it made."""

    default: Candidate
    tuned: Candidate
    gain: Gain
    model: dict[str, Any]

    @property
    def winner(self) -> Candidate:
        """What should serve: the tuned candidate if it is better, else the default."""
        return self.tuned if self.gain.is_better else self.default


def paired_gain(default_per_s: Sequence[float], tuned_per_s: Sequence[float]) -> Gain:
    """Mean paired difference with its confidence interval, as fractions of the default's mean.

    Raises:
        ConfigError: fewer than two pairs, or sequences of different lengths.
    """
    count = len(default_per_s)
    if count < 2 or count != len(tuned_per_s):
        raise ConfigError(f"{count} and {len(tuned_per_s)} measurements; accepted: as many of each, at least 2")
    differences = [b - a for a, b in zip(default_per_s, tuned_per_s, strict=True)]
    mean_default = sum(default_per_s) / count
    mean = sum(differences) / count
    if mean_default == 0:
        return Gain(
            default_per_s=tuple(default_per_s),
            tuned_per_s=tuple(tuned_per_s),
            gain_frac=None,
            low_frac=None,
            high_frac=None,
        )
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Gain(
        default_per_s=tuple(default_per_s),
        tuned_per_s=tuple(tuned_per_s),
        gain_frac=mean / mean_default,
        low_frac=(mean - half) / mean_default,
        high_frac=(mean + half) / mean_default,
    )


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
    make_records: Callable[[], Records] = Records,
) -> Verification:
    """Replay default, tuned, default, tuned, ... and write the runs and verification.json into a new folder.

    Args:
        engine: a fleet, if the candidates are fleets'.
        step_time, draft_time, copy_time: what policies are told, each time the same; else the engine measures what they
            need before each run.

    Raises:
        ConfigError: fewer than three repeats, or a store that is not empty or cannot be emptied before each.
        RunError: the folder exists or cannot be written; and whatever `Engine.replay` raises.
    """
    if repeats < MIN_REPEATS:
        raise ConfigError(f"repeats is {repeats}, at least {MIN_REPEATS} are accepted")
    store = None if engine.options.store is None else FreshStore(engine.options.store)
    goodput: dict[str, list[float]] = {"default": [], "tuned": []}
    with new_folder(out) as folder:
        for repeat in range(repeats):
            for name, one in (("default", default), ("tuned", tuned)):
                if store is not None:
                    store.empty()
                run = _replayed(
                    *(engine, workload, one),
                    out=folder / f"{name}-{repeat}",
                    step_time=step_time,
                    draft_time=draft_time,
                    copy_time=copy_time,
                    recorder=make_records(),
                )
                goodput[name].append(summarize(run.records).goodput_per_s)
        done = Verification(
            default=default,
            tuned=tuned,
            gain=paired_gain(goodput["default"], goodput["tuned"]),
            model=engine.model if isinstance(engine, EngineFleet) else engine.describe(),
        )
        write_json(folder / "verification.json", _as_dict(done))
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
        return Verification(
            default=candidate(value["default"]),
            tuned=candidate(value["tuned"]),
            gain=gain,
            model=value["model"],
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"{path / 'verification.json'}: {error!r}; accepted: {accepted}") from None


def runs_of(path: Path, name: str) -> list[Path]:
    """Run folders of "default" or "tuned" in a verification, in order."""
    return sorted(path.glob(f"{name}-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))


def _as_dict(done: Verification) -> dict[str, Any]:
    return {
        "default": done.default.as_dict(),
        "tuned": done.tuned.as_dict(),
        "gain": {**asdict(done.gain), "is_better": done.gain.is_better},
        "model": done.model,
    }
