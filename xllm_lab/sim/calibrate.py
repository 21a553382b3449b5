"""Learn step times from engine runs or other measured steps, and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xllm_lab.copy_time import CopyTime, CopyWeights, fit_copy_time
from xllm_lab.draft_time import DraftTime, Weights, fit_draft_time
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.page_time import PageTime, fit_page_time
from xllm_lab.runs import Run, new_file, read_json, write_json
from xllm_lab.sim.acceptance import LearntAcceptance, MethodProcess, Process, Rates
from xllm_lab.sim.acceptance_fit import fit_acceptance, verifications
from xllm_lab.sim.cost.host import HostOverhead, fit_host
from xllm_lab.sim.spread import NUM_FOLDS, UNKNOWN, RunSpread, Spread, held_out, spread_of
from xllm_lab.step_samples import StepSample, copied, drafted, mapped, samples
from xllm_lab.step_time import TERMS, StepTime, fit

# So that a fit without one of the folds still has the two steps a term that `fit` wants.
MIN_STEPS = -(-2 * len(TERMS) * NUM_FOLDS // (NUM_FOLDS - 1))
# 1 had no spread, 2 did not tell the host from the device, 3 no graphs from eager steps, 4 nothing of drafts, 5
# nothing of pages and copies: these are refused.
FORMAT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Error of predicted step times on steps the fit did not see (contiguous folds).

    Attributes:
        mape_frac: mean of |predicted - measured| / measured.
        p90_frac: its 90th percentile.
        bias_frac: (sum of predicted - sum of measured) / sum of measured.
    """

    mape_frac: float
    p90_frac: float
    bias_frac: float
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fitted machine: what `calibrate` writes and the simulator reads.

    Attributes:
        step_time: the weights, of the device where the host was told apart.
        host: what the host adds to a step.
        highest: largest value of each term's factor in the calibrated steps; beyond it the model extrapolates.
        residual: held-out error of step times.
        spread: how that error adds up, and grows away from the calibrated steps.
        model: the served model, as in the runs' manifests.
        hardware: where it was measured.
        runs: names of the runs, or of other sources of steps.
        acceptance: what became of drafts; None if there were none.
        draft_time: what making them took, in no step's time.
        page_time: what mapping pages took, neither; None if KV was paged.
        copy_time: what copies between tiers took, beside the steps.
        versions: of what the runs were made with; empty if they do not say.
        measured_at_us: when the oldest of the runs was written, Unix time; None if nobody knows.
    """

    step_time: StepTime
    highest: tuple[float, ...]
    residual: Residual
    model: dict[str, Any]
    hardware: dict[str, Any]
    runs: tuple[str, ...]
    host: HostOverhead = field(default_factory=HostOverhead)
    spread: Spread = UNKNOWN
    acceptance: LearntAcceptance | None = None
    draft_time: DraftTime = field(default_factory=DraftTime)
    page_time: PageTime | None = None
    copy_time: CopyTime = field(default_factory=CopyTime)
    versions: dict[str, str] = field(default_factory=dict)
    measured_at_us: int | None = None

    def step_time_with_host(self) -> StepTime:
        """Of whole steps, of a host that the device waits for: what policies are told.

        They do not know in which graph a step will run, and are told the time of the slower kind.
        """
        told = dict(zip(TERMS, self.step_time.weights, strict=True))
        told["eager_us"] = told["replay_us"] = max(told["eager_us"], told["replay_us"]) + self.host.step_us
        told["sequence_us"] += self.host.sequence_us
        return StepTime(tuple(told.values()))

    def run_spread(self) -> RunSpread:
        """Of a run whose steps are added to it."""
        return RunSpread(self.step_time, self.highest, self.spread)


def calibrate(runs: Sequence[Run]) -> Calibration:
    """Fit step times, and what there is of drafts and copies, to engine runs of one model on one machine.

    Raises:
        ConfigError: a run is not an engine's, models differ, or there are too few steps.
    """
    if not runs:
        raise ConfigError("no runs to calibrate on; accepted: at least one engine run")
    for run in runs:
        if run.manifest.host != "engine":
            raise ConfigError(f"{run.path}: is a {run.manifest.host} run; accepted: engine runs")
        if run.manifest.model != runs[0].manifest.model:
            raise ConfigError(f"{run.path}: model differs from that of {runs[0].path}; accepted: runs of one model")
    fitted = calibrate_on(
        [sample for run in runs for sample in samples(run.records.steps)],
        model=runs[0].manifest.model,
        hardware=runs[0].manifest.hardware,
        sources=tuple(run.path.name for run in runs),
    )
    verified = (
        one
        for k, run in enumerate(runs)
        if any(s.draft_ids for s in run.records.steps)
        for one in verifications(k, run.records.steps, {r.id: r.kind for r in run.workload.requests})
    )
    return replace(
        fitted,
        acceptance=fit_acceptance(verified),
        draft_time=fit_draft_time(one for run in runs for one in drafted(run.records.steps)),
        page_time=fit_page_time(one for run in runs for one in mapped(run.records.steps)),
        copy_time=fit_copy_time(one for run in runs for one in copied(run.records.copies)),
        versions=runs[0].manifest.versions,
        measured_at_us=min(run.written_at_us for run in runs),
    )


def calibrate_on(
    steps: Sequence[StepSample], *, model: dict[str, Any], hardware: dict[str, Any], sources: tuple[str, ...]
) -> Calibration:
    """Fit step times to measured steps, in the order in which they ran: neighbours are not independent.

    Args:
        model: as in a run's manifest; a simulated run reads `vocab_size` from it.
        hardware: where the steps were measured.
        sources: names of the files or runs they came from.

    Raises:
        ConfigError: there are too few steps.
    """
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"{', '.join(sources)}: {len(steps)} steps, at least {MIN_STEPS} are accepted")
    rows = np.asarray([s.features() for s in steps], dtype=np.float64)
    times = np.asarray([s.step_us for s in steps], dtype=np.float64)
    predicted = held_out(rows, times)
    return Calibration(
        step_time=fit(rows.tolist(), times.tolist()),
        highest=tuple(float(h) for h in rows.max(axis=0)),
        residual=_residual(times, predicted),
        spread=spread_of(rows, times, predicted),
        host=_host(steps),
        model=model,
        hardware=hardware,
        runs=sources,
    )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration file. RunError if it cannot be written."""
    weights = dict(zip(TERMS, calibration.step_time.weights, strict=True))
    draft_time = {method: found._asdict() for method, found in calibration.draft_time.weights.items()}
    copy_time = {kind: found._asdict() for kind, found in calibration.copy_time.weights.items()}
    times = {"step_time": weights, "draft_time": draft_time, "copy_time": copy_time}
    told = {**asdict(calibration), **times, "format": FORMAT}
    with new_file(path) as file:
        write_json(file, told)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file. RunError names what is wrong with it."""
    accepted = "a calibration, as `calibrate` writes it"
    value = read_json(path, accepted)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format is {value['format']}, {FORMAT} is accepted")
        value["model"]["vocab_size"] + 0  # what the simulator will look up
        return Calibration(
            step_time=StepTime(tuple(float(value["step_time"][term]) for term in TERMS)),
            highest=tuple(float(value["highest"][k]) for k in range(len(TERMS))),
            residual=Residual(**{name: value["residual"][name] + 0 for name in Residual.__slots__}),
            spread=_spread(value["spread"]),
            host=HostOverhead(**{name: value["host"][name] + 0 for name in HostOverhead.__slots__}),
            model=value["model"],
            hardware=value["hardware"],
            runs=tuple(value["runs"]),
            page_time=None if value["page_time"] is None else _page_time(value["page_time"]),
            acceptance=None if value["acceptance"] is None else _acceptance(value["acceptance"]),
            draft_time=DraftTime(
                {m: Weights(**{name: w[name] + 0 for name in Weights._fields}) for m, w in value["draft_time"].items()}
            ),
            copy_time=CopyTime(
                {
                    kind: CopyWeights(**{name: w[name] + 0 for name in CopyWeights._fields})
                    for kind, w in value["copy_time"].items()
                }
            ),
            # Earlier ones do not say.
            versions=value.get("versions", {}),
            measured_at_us=value.get("measured_at_us"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: {error!r}; accepted: {accepted}") from None


def _host(steps: Sequence[StepSample]) -> HostOverhead:
    measured = [(len(s.chunks), s.host_us) for s in steps if s.host_us is not None]
    if measured and len(measured) < len(steps):
        raise ConfigError(
            f"{len(measured)} of {len(steps)} steps tell the host's time from the device's; accepted: all, or none"
        )
    return fit_host([n for n, _ in measured], [us for _, us in measured])


def _page_time(value: dict[str, Any]) -> PageTime:
    return PageTime(**{name: value[name] + 0 for name in PageTime.__slots__})


def _acceptance(value: dict[str, Any]) -> LearntAcceptance:
    def rates(of: dict[str, Any]) -> Rates:
        return Rates(tuple(float(x) for x in of["mean"]), tuple(float(x) for x in of["spread"]))

    def process(of: dict[str, Any]) -> Process:
        return Process(rates(of["drafted"]), rates(of["kept"]), of["num_requests"] + 0)

    return LearntAcceptance(
        {
            method: MethodProcess(process(of["overall"]), {kind: process(p) for kind, p in of["by_kind"].items()})
            for method, of in value["by_method"].items()
        },
        value["seed"] + 0,
    )


def _spread(value: dict[str, Any]) -> Spread:
    rows = value["weights_std"]
    if [len(row) for row in rows] != [len(TERMS)] * len(TERMS):
        raise ValueError(f"weights_std has rows of {[len(row) for row in rows]}, {len(TERMS)} of {len(TERMS)} accepted")
    numbers = {name: float(value[name]) for name in Spread.__slots__ if name != "weights_std"}
    return Spread(**numbers, weights_std=tuple(tuple(float(u) for u in row) for row in rows))


def _residual(times: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> Residual:
    error = np.abs(predicted - times) / times
    return Residual(
        mape_frac=float(error.mean()),
        p90_frac=float(np.percentile(error, 90)),
        bias_frac=float((predicted.sum() - times.sum()) / times.sum()),
        num_steps=len(times),
    )
