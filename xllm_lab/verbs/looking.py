"""What there is to see: of runs, and of policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError
from xllm_lab.policies.api import Choice, Knob
from xllm_lab.policies.catalog import policies
from xllm_lab.runs import Run
from xllm_lab.settings import changed
from xllm_lab.verbs.given import (
    PathLike,
    by_decision,
    calibration_of,
    configuration_of,
    run_of,
)

if TYPE_CHECKING:
    from xllm_lab.sim.calibrate import Calibration
    from xllm_lab.sim.compare import Row
    from xllm_lab.sim.parity import Parity
    from xllm_lab.tuning.study import Study


def compare(simulated: Run | PathLike, engine: Iterable[Run | PathLike]) -> list[Row]:
    """Each metric's error, beside the engine's own run-to-run spread."""
    from xllm_lab.sim.compare import compare as compare_runs

    return compare_runs(run_of(simulated), [run_of(run) for run in engine])


def parity(
    run: Run | PathLike, *, policy: str | None = None, settings: Mapping[str, Any] | None = None, **beside: str | None
) -> Parity:
    """Whether the simulator decides as the engine did; with other policies, where it would part ways.

    Raises:
        ConfigError: as `configure`, or for another instance: what was recorded happened on this one.
    """
    from xllm_lab.sim.parity import parity as check

    opened = run_of(run)
    own = configuration_of(opened)
    other = changed(own, by_decision(policy, beside), settings or {})
    if other.instance != own.instance:
        raise ConfigError(f"{opened.path}: was recorded on its own instance; accepted: knobs of policies")
    return check(opened, policies=other.policies)


def report(
    out: PathLike,
    *,
    engine: Iterable[Run | PathLike],
    simulated: Run | PathLike | None = None,
    calibration: Calibration | PathLike | None = None,
    study: Study | PathLike | None = None,
    verification: PathLike | None = None,
) -> Path:
    """One self-contained HTML page about any of these."""
    from xllm_lab.report import write_report
    from xllm_lab.tuning.study import Study, read_study

    return write_report(
        Path(out),
        engine=[run_of(run) for run in engine],
        simulated=None if simulated is None else run_of(simulated),
        calibration=None if calibration is None else calibration_of(calibration),
        study=study if study is None or isinstance(study, Study) else read_study(Path(study)),
        verification=None if verification is None else Path(verification),
    )


def timeline(run: Run | PathLike, *, out: PathLike | None = None) -> Path:
    """Write a run's timeline for https://ui.perfetto.dev, beside its folder unless `out` says where."""
    from xllm_lab.timeline_file import write_timeline

    opened = run_of(run)
    beside = opened.path.with_name(f"{opened.path.resolve().name}.pftrace.gz")
    return write_timeline(opened, beside if out is None else Path(out))


def catalogue() -> dict[str, dict[str, dict[str, Any]]]:
    """By what they decide: every policy with its first docstring line, and its knobs with default and range."""
    from xllm_lab.policies.catalog import decisions, knobs

    def told(cls: type[Any], name: str, note: Knob | Choice) -> str:
        default = getattr(cls(), name)
        if isinstance(note, Choice):
            return f"{default}; one of {', '.join(map(str, note.values))}"
        return f"{default}; {note.low:g} to {note.high:g}{', log scale' if note.log else ''}"

    return {
        decides: {
            name: {
                "what": (cls.__doc__ or "").strip().splitlines()[0],
                "knobs": {knob: told(cls, knob, note) for knob, note in knobs(cls).items()},
            }
            for name, cls in policies(decides).items()
        }
        for decides in decisions()
    }
