"""Does the tuner find, with five engine runs, what an engine that tried everything finds; and who else does?

    python benchmarks/tuner_grid.py measure FOLDER      every point of the grid, twice, on each workload: hours
    python benchmarks/tuner_grid.py compare FOLDER      five seeds of each method, on what was measured: minutes
    python benchmarks/tuner_grid.py draw FOLDER SVG     regret over engine runs

`measure` may be killed and begun again. For each workload it serves the trace's first part twice with the default (all
at once, and at the rate that takes), which is all that simulator and tuner learn from; promises are three times the
paced run's median TTFT and 1.5 times its TPOT, and the rate is 1.4 times what the default takes. Every point then
serves the last part, which nobody else sees.

`compare` lets each method choose points, and looks up what the engine said; a method chooses by the first measurement,
and is judged by the mean of both. Methods: the tuner (`tuning.rising`), which begins with the default; random points;
TPE on the engine alone; the rule that AIConfigurator 0.12.0 emits for vLLM (`max_num_seqs = 512` below that batch,
`max_num_batched_tokens = max_num_seqs + ISL + 1500`), at the nearest point; and vLLM's `auto_tune.sh`, which goes
through budgets of tokens within budgets of sequences, in ascending order.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import optuna
from matplotlib.axes import Axes

from xllm_lab import provenance
from xllm_lab.arrivals import with_arrivals
from xllm_lab.candidate import Candidate
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.formats import own, read_trace
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.api import Choice, Knob
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.report.drawing import draw, legend_above
from xllm_lab.sim.calibrate import calibrate, read_calibration, write_calibration
from xllm_lab.transforms import clip_length, part, scale_length, scale_rate_to, with_slo
from xllm_lab.tuning.engine_trials import engine_spec, evaluate_on_engine
from xllm_lab.tuning.evaluations import Evaluations, checksum, job
from xllm_lab.tuning.rising import Budget, rise
from xllm_lab.tuning.sampling import derived_seed
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.tiers import Tiers
from xllm_lab.workload import Slo, Workload

TRACES = Path(__file__).resolve().parents[1] / "traces"
AXES: dict[str, tuple[Any, ...]] = {
    "max_seqs_per_batch": (4, 8, 16, 32),
    "max_tokens_per_batch": (64, 128, 256, 512, 1024),
    "policy": ("decode-first", "prefill-first", "vllm"),
}
RUSH, NUM_REPEATS, NUM_SEEDS, BUDGET = 1.4, 2, 5, 5
METHODS = ("tuner", "random", "TPE on the engine", "AIConfigurator's rule", "vLLM auto_tune order")
Point = dict[str, Any]


def workloads(num_requests: int) -> Iterator[tuple[str, Workload]]:
    """Chats; long prompts with short answers; and bursts of mixed lengths. Half is learnt from, half held out."""
    chat, bursty = (read_trace(TRACES / f"{name}.jsonl") for name in ("chat", "bursty"))
    yield "chat", part(chat, 0, num_requests)
    long = clip_length(scale_length(part(chat, num_requests, 2 * num_requests), 2.5), max_output_tokens=16)
    yield "long prompts", long
    yield "bursty", part(bursty, 0, num_requests)


class GridSpace(Space):
    """Nothing but the grid's axes, each a choice."""

    axes: dict[str, tuple[Any, ...]] = AXES

    def _knobs(self, cls: type[Any]) -> dict[str, Knob | Choice]:
        return {name: Choice(*self.axes[name]) for name in get_type_hints(cls) if name in self.axes}


def grid() -> list[Point]:
    return [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


def candidate_at(point: Point, model_len: int) -> Candidate:
    instance = InstanceConfig(
        block_size=16,
        num_kv_blocks=2048,
        max_model_len=model_len,
        **{name: value for name, value in point.items() if name != "policy"},
    )
    return Candidate(instance=instance, policies=Policies(make_policy("batch", point["policy"])))


def default_point() -> Point:
    """The middle of each budget, and xLLM's policy."""
    return {name: values[0 if name == "policy" else len(values) // 2] for name, values in AXES.items()}


def options(o: argparse.Namespace) -> EngineOptions:
    return EngineOptions(model=o.model, device="cpu", timer="cpu")


def prepare(folder: Path, name: str, recorded: Workload, engine: Engine, model_len: int) -> None:
    """What is learnt of a workload, and the workload at its rate with its promises."""
    if (folder / "calibration.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    half, one = len(recorded.requests) // 2, candidate_at(default_point(), model_len)
    learn = part(recorded, 0, half)
    with tempfile.TemporaryDirectory() as tmp:
        runs = Path(tmp)
        serve = (one.instance, one.policies)
        full = engine.replay(with_arrivals(learn, [0] * half), *serve, out=runs / "full")
        rate_per_s = half / summarize(full.records).makespan_s
        paced = engine.replay(scale_rate_to(learn, 0.7 * rate_per_s), *serve, out=runs / "paced")
        told = summarize(paced.records)
        assert told.ttft_us is not None, "it was served"
        assert told.tpot_us is not None, "it was served"
        slo = Slo(ttft_us=round(3 * told.ttft_us.p50), tpot_us=round(1.5 * told.tpot_us.p50))
        own.write(with_slo(scale_rate_to(recorded, RUSH * rate_per_s), slo), folder / "workload.jsonl")
        write_calibration(calibrate([full, paced]), folder / "calibration.json")


def measure(o: argparse.Namespace) -> None:
    """Rows of grid.jsonl: workload, point, repeat, report."""
    place = o.folder / "grid.jsonl"
    done = {json.dumps([r["workload"], r["point"], r["repeat"]], sort_keys=True) for r in rows(o.folder)}
    engine = Engine(options(o))
    model_len = min(2048, engine.model.config.max_position)
    for name, recorded in workloads(o.requests):
        if o.only not in (None, name):
            continue
        folder = o.folder / name.replace(" ", "-")
        prepare(folder, name, recorded, engine, model_len)
        with tempfile.TemporaryDirectory() as tmp:
            held_out, inputs = held_out_of(folder, Path(tmp))
            for repeat, point in product(range(NUM_REPEATS), grid()):
                key = {"workload": name, "point": point, "repeat": repeat}
                if json.dumps(list(key.values()), sort_keys=True) in done:
                    continue
                spec = {
                    **template(o, held_out),
                    "repeat": repeat,
                    "candidate": candidate_at(point, model_len).as_dict(),
                }
                report = evaluate_on_engine(job(spec, inputs))
                with place.open("a", encoding="utf-8") as file:
                    told = {**key, "report": report, "commit": provenance.commit(), "hardware": provenance.hardware()}
                    file.write(json.dumps(told, sort_keys=True) + "\n")
    (o.folder / "grid.json").write_text(json.dumps({"model": o.model, "model_len": model_len, "axes": AXES}) + "\n")


def held_out_of(folder: Path, tmp: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Names of what an engine run reads, and where it lies: as `rise` writes it."""
    whole = read_trace(folder / "workload.jsonl")
    own.write(part(whole, len(whole.requests) // 2, len(whole.requests)), tmp / "held-out.jsonl")
    write_calibration(read_calibration(folder / "calibration.json"), tmp / "calibration.json")
    served, calibrated = (checksum((tmp / n).read_bytes()) for n in ("held-out.jsonl", "calibration.json"))
    inputs = {served: str(tmp / "held-out.jsonl"), calibrated: str(tmp / "calibration.json")}
    return {"workload": served, "calibration": calibrated}, inputs


def template(o: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    return engine_spec(
        *(names["workload"], names["calibration"], Tiers(), options(o)), machine=dict(provenance.hardware())
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    place = folder / "grid.jsonl"
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()] if place.exists() else []


class Truth:
    """What the engine said of one workload's grid."""

    def __init__(self, found: Sequence[dict[str, Any]], name: str) -> None:
        self.by_point: dict[str, list[float]] = {}
        for row in sorted((r for r in found if r["workload"] == name), key=lambda r: r["repeat"]):
            summary = row["report"]["summary"]
            self.by_point.setdefault(_key(row["point"]), []).append(summary["goodput_per_s"] if summary else 0.0)
        self.best = max(map(_mean, self.by_point.values()))

    def regrets(self, tried: Sequence[Point]) -> list[float]:
        """After each of `BUDGET` engine runs: of the point that measured best so far, how far it is from the best."""
        regrets, chosen = [], tried[0]
        for point in tried[:BUDGET]:
            if self.by_point[_key(point)][0] > self.by_point[_key(chosen)][0]:
                chosen = point
            regrets.append(1 - _mean(self.by_point[_key(chosen)]) / self.best if self.best else 0.0)
        return regrets + regrets[-1:] * (BUDGET - len(regrets))


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_tuner(o: argparse.Namespace, folder: Path, name: str, seed: int, model_len: int) -> list[Point]:
    """Engine runs in the order in which the tuner made them; each finds its report in the store."""
    with tempfile.TemporaryDirectory() as tmp:
        names, _ = held_out_of(folder, Path(tmp))
        store = Evaluations(Path(tmp) / "evaluations")
        for row in rows(o.folder):
            if row["workload"] == name and row["repeat"] == 0:
                one = candidate_at(row["point"], model_len).as_dict()
                store.keep({**template(o, names), "candidate": one}, row["report"])
        default = candidate_at(default_point(), model_len)
        whole = read_trace(folder / "workload.jsonl")
        half = len(whole.requests) // 2
        study = rise(
            *(whole, read_calibration(folder / "calibration.json")),
            GridSpace(default, [n for n in AXES["policy"] if n != default_point()["policy"]]),
            out=Path(tmp) / "search",
            seed=seed,
            budget=Budget(
                num_trials=o.trials,
                slice_requests=half,
                num_engine=BUDGET,
                engine_requests=len(whole.requests) - half,
            ),
            engine=options(o),
            evaluations=store.folder,
            num_workers=o.workers,
        )
        return [_point_of(trial.candidate) for trial in study.trials]


def _point_of(one: Candidate) -> Point:
    told = one.as_dict()
    return {n: told["policies"]["batch"]["name"] if n == "policy" else told["instance"][n] for n in AXES}


def by_chance(seed: int) -> list[Point]:
    return random.Random(seed).sample(grid(), min(BUDGET, len(grid())))


def by_tpe(truth: Truth, seed: int) -> list[Point]:
    """Two at random, and then TPE."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=derived_seed("TPE", seed), n_startup_trials=2)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    tried = []
    for _ in range(BUDGET):
        trial = study.ask()
        point = {name: trial.suggest_categorical(name, values) for name, values in AXES.items()}
        study.tell(trial, truth.by_point[_key(point)][0])
        tried.append(point)
    return tried


def by_rule(workload: Workload) -> list[Point]:
    """One point, whatever is measured."""
    mean_prompt = sum(r.prompt.num_tokens for r in workload.requests) / len(workload.requests)
    wanted = {"max_seqs_per_batch": 512.0, "max_tokens_per_batch": 512 + mean_prompt + 1500}

    def nearest(name: str) -> Any:
        return min(AXES[name], key=lambda value: abs(math.log(value / wanted[name])))

    return [{**default_point(), **{name: nearest(name) for name in wanted}}]


def by_auto_tune() -> list[Point]:
    axes = product(AXES["max_seqs_per_batch"], AXES["max_tokens_per_batch"])
    return [{**default_point(), "max_seqs_per_batch": s, "max_tokens_per_batch": t} for s, t in axes]


def compare(o: argparse.Namespace) -> None:
    """Rows of regret.jsonl: workload, method, seed, regret after each engine run."""
    model_len = json.loads((o.folder / "grid.json").read_text(encoding="utf-8"))["model_len"]
    with (o.folder / "regret.jsonl").open("w", encoding="utf-8") as file:
        for name in dict.fromkeys(r["workload"] for r in rows(o.folder)):
            folder, truth = o.folder / name.replace(" ", "-"), Truth(rows(o.folder), name)
            for seed in range(o.seeds):
                ways: dict[str, Callable[[], list[Point]]] = {
                    "tuner": lambda f=folder, n=name, s=seed: by_tuner(o, f, n, s, model_len),
                    "random": lambda s=seed: by_chance(s),
                    "TPE on the engine": lambda t=truth, s=seed: by_tpe(t, s),
                    "AIConfigurator's rule": lambda f=folder: by_rule(read_trace(f / "workload.jsonl")),
                    "vLLM auto_tune order": by_auto_tune,
                }
                for method in METHODS:
                    told = {"workload": name, "method": method, "seed": seed}
                    told["regret_frac"] = truth.regrets(ways[method]())
                    file.write(json.dumps(told) + "\n")
                    print(json.dumps(told), flush=True)


def picture(found: Sequence[dict[str, Any]]) -> str:
    """One SVG: a panel a workload, a line a method, the mean over seeds."""
    names = list(dict.fromkeys(r["workload"] for r in found))

    def paint(axes: list[Axes]) -> None:
        for axis, name in zip(axes, names, strict=True):
            for method in METHODS:
                curves = [r["regret_frac"] for r in found if (r["workload"], r["method"]) == (name, method)]
                mean = [100 * _mean(values) for values in zip(*curves, strict=True)]
                axis.plot(range(1, BUDGET + 1), mean, marker="o", markersize=3, label=method)
            axis.set_title(name, loc="left")
            axis.set_xlabel("engine runs")
        axes[0].set_ylabel("below the grid's best, %")
        legend_above(axes[0])

    return draw("tuner-regret", 760, 280, paint, ncols=len(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("measure", "compare", "draw"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("svg", type=Path, nargs="?")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=120, help="of each workload; half of them held out")
    parser.add_argument("--trials", type=int, default=100, help="of the tuner, in the simulator")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", metavar="WORKLOAD", help="measure no other")
    parser.add_argument("--axes", type=json.loads, default={}, help="other values of some axes, as JSON")
    o = parser.parse_args()
    AXES.update({name: tuple(values) for name, values in o.axes.items()})
    if o.verb == "draw":
        found = [json.loads(line) for line in (o.folder / "regret.jsonl").read_text(encoding="utf-8").splitlines()]
        o.svg.write_text(picture(found), encoding="utf-8")
    else:
        o.folder.mkdir(parents=True, exist_ok=True)
        {"measure": measure, "compare": compare}[o.verb](o)


if __name__ == "__main__":
    main()
