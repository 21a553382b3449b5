"""The whole loop in one command: replay, calibrate, tune, verify, compare, check parity, export, report.

trace  = window A | window B          A is learnt from and tuned on, B is held out
A, all at once   -> engine            capacity, and the steps of a full batch
A, at capacity   -> engine            the steps of a queue that comes and goes
both             -> calibration
A, in a rush     -> tuner             in the simulator
B, in a rush     -> engine            default, tuned, default, tuned, ...
B, default       -> simulator         against the engine's own runs of B: the error, beside their spread
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xllm_lab import transforms, verbs
from xllm_lab.arrivals import with_arrivals
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError, RunError
from xllm_lab.formats import read_trace
from xllm_lab.metrics import summarize
from xllm_lab.progress import tell
from xllm_lab.runs import Run, new_file, read_run, write_json
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.compare import Row
from xllm_lab.step_time import Chunk
from xllm_lab.text import comparison_table, gain_line, left_out_line, table
from xllm_lab.tuning.gain import Gain
from xllm_lab.tuning.verify import MIN_REPEATS, runs_of
from xllm_lab.wording import compact
from xllm_lab.workload import Slo, Workload

DEFAULT_TRACE = Path(__file__).resolve().parents[1] / "traces" / "chat.jsonl"
DEFAULT_NUM_REQUESTS = 24
SETTINGS = {"block_size": 32, "num_kv_blocks": 512}
# A rush asks for twice the capacity: what is let in at once decides which promises can be kept.
RUSH = 2.0
# A token may take three quarters longer than in a batch of eight, so that neither the default nor a machine that drifts
# by a fifth decides alone; a first token may take as long as eighty of them.
SLO_BATCH = 8
SLO_SLACK = 1.75
TTFT_IN_TPOT = 80
ERROR_METRICS = ("ttft_us", "tpot_us", "e2e_us", "output_throughput_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo found."""

    num_steps_identical: int
    num_runs: int
    rows: tuple[Row, ...]
    gain: Gain
    config: Path
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parity_steps": self.num_steps_identical,
            "compare": [asdict(row) for row in self.rows],
            "gain": {**asdict(self.gain), "is_better": self.gain.is_better},
            "config": str(self.config),
            "report": str(self.report),
        }

    def as_text(self) -> str:
        """The last table, and where the report is."""
        default, tuned = (sum(v) / len(v) for v in (self.gain.default_per_s, self.gain.tuned_per_s))
        goodput = table(["goodput on the engine", "tok/s"], [["default", compact(default)], ["tuned", compact(tuned)]])
        return "\n\n".join(
            (
                f"parity: identical on {self.num_steps_identical} steps of {self.num_runs} engine runs",
                "window B, nobody tuned or calibrated on it\n" + comparison_table(self.rows),
                f"{goodput}\n{gain_line(self.gain)}",
                f"xLLM configuration: {self.config}\nreport: {self.report}",
            )
        )


def demo(
    *,
    trace: Path | None = None,
    num_requests: int | None = None,
    trials: int = 60,
    repeats: int = 4,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    progress: bool = True,
) -> Demo:
    """Run the loop on the embedded model, one thread, processor time.

    Raises:
        RunError: `out` exists, or the simulator decided differently from the engine.
        ConfigError: a number below its least, or a trace shorter than two windows.
    """
    if out.exists():
        raise RunError(f"{out}: exists already; accepted: a new folder")
    if num_requests is None:
        num_requests = DEFAULT_NUM_REQUESTS
    # Each would be refused in its turn, minutes from now.
    least = {"requests": (num_requests, 1), "trials": (trials, 1), "repeats": (repeats, MIN_REPEATS), "seed": (seed, 0)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ConfigError(f"{name} is {value}, at least {lowest} is accepted")
    learn, held_out = _windows(trace or DEFAULT_TRACE, num_requests)
    engine = Engine(EngineOptions(threads=1, clock="virtual", timer="cpu"))

    def replay(workload: Workload, name: str, what: str) -> Run:
        tell(what)
        return verbs.replay(workload, out=out / name, settings=SETTINGS, engine=engine, progress=progress)

    full = replay(with_arrivals(learn, [0] * len(learn.requests)), "full", "1/6  capacity: window A, all at once")
    rate_per_s = len(learn.requests) / summarize(full.records).makespan_s
    tell(f"     {rate_per_s:.2f} requests/s")
    paced = replay(
        transforms.scale_rate_to(learn, rate_per_s), "paced", f"2/6  window A at {rate_per_s:.2f} requests/s"
    )
    fitted = verbs.calibrate([full, paced], out=out / "calibration.json")
    ttft_us, tpot_us = _promises(fitted, paced)
    slo = Slo(ttft_us=ttft_us, tpot_us=tpot_us)
    rush_per_s = RUSH * rate_per_s
    tell(f"3/6  tune on window A at {rush_per_s:.2f} requests/s, in the simulator")
    tell(f"     promised: TTFT {compact(ttft_us / 1e6)} s, TPOT {compact(tpot_us / 1e3)} ms")
    study = verbs.tune(
        [_at(learn, rush_per_s, slo)],
        fitted,
        out=out / "study",
        settings=SETTINGS,
        trials=trials,
        seed=seed,
        progress=progress,
    )
    tell(f"4/6  verify on window B at {rush_per_s:.2f} requests/s, on the engine: default and tuned in turn")
    verified = verbs.verify(
        study, _at(held_out, rush_per_s, slo), out=out / "verified", repeats=repeats, engine=engine, progress=progress
    )
    tell("5/6  simulate window B, compare, check parity")
    served = [read_run(path) for path in runs_of(out / "verified", "default")]
    # The first repeat was replayed once more: the same arrivals twice, and what the engine differs by from itself.
    measured = [served[0], *(read_run(path) for path in runs_of(out / "verified", "again")[:1])]
    tuned = [read_run(path) for path in runs_of(out / "verified", "tuned")]
    simulated = verbs.simulate(measured[0], fitted, out=out / "simulated")
    rows = [r for r in verbs.compare(simulated, measured) if r.metric.startswith(ERROR_METRICS)]
    runs = (full, paced, *served, *measured[1:], *tuned)
    num_steps = sum(_identical_steps(run) for run in runs)
    tell("6/6  export and report")
    config, exported = out / "xllm.json", verbs.export(verified, to="xllm")
    with new_file(config) as file:
        write_json(file, exported.config)
    if exported.left_out:
        tell(f"     {left_out_line('xllm', exported.left_out)}")
    page = verbs.report(
        out / "report.html",
        engine=measured,
        simulated=simulated,
        calibration=fitted,
        study=study,
        verification=out / "verified",
    )
    done = Demo(
        num_steps_identical=num_steps,
        num_runs=len(runs),
        rows=tuple(rows),
        gain=verified.gain,
        config=config,
        report=page,
    )
    with new_file(out / "demo.json") as file:
        write_json(file, done.as_dict())
    return done


def _windows(trace: Path, num_requests: int) -> tuple[Workload, Workload]:
    whole = read_trace(trace)
    if len(whole.requests) < 2 * num_requests:
        raise ConfigError(f"{trace}: {len(whole.requests)} requests; two windows of {num_requests} are needed")
    return transforms.part(whole, 0, num_requests), transforms.part(whole, num_requests, 2 * num_requests)


def _at(workload: Workload, rate_per_s: float, slo: Slo) -> Workload:
    return transforms.with_slo(transforms.scale_rate_to(workload, rate_per_s), slo)


def _promises(fitted: Calibration, run: Run) -> tuple[int, int]:
    """(TTFT, TPOT), microseconds."""
    requests = run.workload.requests
    context = sum(r.prompt.num_tokens + r.output_tokens // 2 for r in requests) // len(requests)
    step_us = fitted.step_time_with_host().step_us([Chunk(1, context)] * SLO_BATCH, SLO_BATCH)
    tpot_us = int(round(SLO_SLACK * step_us, -3))
    return TTFT_IN_TPOT * tpot_us, tpot_us


def _identical_steps(run: Run) -> int:
    found = verbs.parity(run)
    if not found.is_identical:
        raise RunError(f"{run.path}: the simulator decides differently at step {found.step}; accepted: identical")
    return found.num_steps
