"""Does the simulator foretell what drafts bring on texts it has not seen, at three loads?

    python benchmarks/speculation_accuracy.py --packages wheels --out runs/speculation > benchmarks/NAME_CPU_DATE.md

Real prompts of five kinds (`speculation_prompts.py`). The engine serves every other one with drafts, and those runs
calibrate: step times, drafting time, and acceptance by kind. It serves the others at 30, 60 and 90 % of what it can do
without drafts, with and without them, in turns, for the machine drifts; the simulator serves those once each. An error
is within its bound at 10 %. Runs that `--out` has already are not made again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from speculation_prompts import KINDS, downloaded, prompts

import xllm_lab as lab
from xllm_lab import provenance
from xllm_lab.arrivals import poisson, with_arrivals
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.metrics import summarize
from xllm_lab.runs import Run, read_run
from xllm_lab.workload import Prompt, Request, RequestId, Workload

LOADS = (0.3, 0.6, 0.9)
MOST_ERROR_FRAC = 0.1
SETTINGS = {"block_size": 32, "num_kv_blocks": 1024, "max_tokens_per_batch": 512, "max_model_len": 2048}


class Side(NamedTuple):
    """With drafts, or without: mean TPOT in microseconds of each run, and tokens a verification."""

    tpots_us: list[float]
    lengths: list[float]


def texts(engine: Engine, archives: object, first: int, count: int, output_tokens: int) -> Workload:
    """Of each kind `count` prompts, every other one from the `first` on, in turns, in the model's chat template."""
    tokenizer = engine.model.load_tokenizer()
    requests = []
    found = {kind: prompts(archives, kind, 2 * count)[first::2] for kind in KINDS}  # type: ignore[arg-type]
    for index in range(count):
        for kind, asked in found.items():
            chat = [{"role": "user", "content": asked[index]}]
            rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
            requests.append(
                Request(
                    id=RequestId(len(requests)),
                    arrival_us=0,
                    prompt=Prompt(num_tokens=len(ids), token_ids=ids),
                    output_tokens=output_tokens,
                    kind=kind,
                )
            )
    return Workload(requests=tuple(requests), source=f"{count} prompts of each kind, every other one from {first} on")


def replayed(engine: Engine, workload: Workload, *, out: Path, **how: Any) -> Run:
    return read_run(out) if out.is_dir() else lab.replay(workload, engine=engine, out=out, progress=False, **how)


def side(runs: Sequence[Run]) -> Side:
    summaries = [summarize(run.records) for run in runs]
    tpots = [s.tpot_us.mean for s in summaries if s.tpot_us is not None]
    return Side(tpots, [s.acceptance_length or 1.0 for s in summaries])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="where prompts are downloaded to")
    parser.add_argument("--prompts", type=int, default=5, help="of each kind, to learn from and to foretell")
    parser.add_argument("--tokens", type=int, default=48, help="that each prompt is answered with")
    parser.add_argument("--method", default="ngram")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    engine = Engine(EngineOptions(threads=1, clock="virtual", timer="cpu", dtype="float32"))
    archives = downloaded(o.packages)
    learn, held_out = (texts(engine, archives, k, o.prompts, o.tokens) for k in (0, 1))
    replay = partial(replayed, engine)
    drafting = {"draft.method": o.method, "draft.num_speculative_tokens": o.depth}
    off, on = {"settings": SETTINGS}, {"settings": {**SETTINGS, **drafting}, "draft": "fixed"}
    num = len(learn.requests)
    full = replay(with_arrivals(learn, [0] * num), out=o.out / "full", **off)
    capacity_per_s = num / summarize(full.records).makespan_s
    learnt: list[Run] = []
    measured: dict[float, dict[str, list[Run]]] = {load: {"off": [], "on": []} for load in LOADS}
    for repeat in range(o.repeats):
        for load, runs in measured.items():
            arriving = poisson(num, load * capacity_per_s, repeat)
            learnt.append(replay(with_arrivals(learn, arriving), out=o.out / f"learn-{load}-{repeat}", **on))
            work = with_arrivals(held_out, poisson(num, load * capacity_per_s, 100))
            for name, how in (("off", off), ("on", on)):
                runs[name].append(replay(work, out=o.out / f"{name}-{load}-{repeat}", **how))
    fitted = lab.calibrate([full, *learnt])
    print(heading(o, engine, capacity_per_s))
    print(f"Step time, held-out folds: error {fitted.residual.mape_frac:.1%}, sum {fitted.residual.bias_frac:+.1%}.\n")
    print("| load | | engine | spread | simulator | error | within |\n|---|---|---|---|---|---|---|")
    out = Path(tempfile.mkdtemp())
    for load, runs in measured.items():
        simulated = {name: side([lab.simulate(runs[name][0], fitted, out=out / f"{name}-{load}")]) for name in runs}
        sides = {name: side(each) for name, each in runs.items()}
        for name, label in (("off", "TPOT without drafts, ms"), ("on", "TPOT with drafts, ms")):
            print(row(load, label, [us / 1e3 for us in sides[name].tpots_us], simulated[name].tpots_us[0] / 1e3))
        gains = [a / b for a, b in zip(sides["off"].tpots_us, sides["on"].tpots_us, strict=True)]
        print(row(load, "speed-up", gains, simulated["off"].tpots_us[0] / simulated["on"].tpots_us[0]))
        print(row(load, "tokens a verification", sides["on"].lengths, simulated["on"].lengths[0]))
        assert all(lab.parity(run).is_identical for each in runs.values() for run in each)
    print("\nParity identical on every engine run.")


def row(load: float, label: str, measured: Sequence[float], simulated: float) -> str:
    mean = statistics.fmean(measured)
    error, spread = simulated / mean - 1, (max(measured) - min(measured)) / mean
    within = "yes" if abs(error) <= MOST_ERROR_FRAC else "**no**"
    return f"| {load:.0%} | {label} | {mean:.2f} | {spread:.1%} | {simulated:.2f} | {error:+.1%} | {within} |"


def heading(o: argparse.Namespace, engine: Engine, capacity_per_s: float) -> str:
    model = engine.describe()
    return (
        f"# What drafts bring, foretold on held-out texts\n\n"
        f"Command: `python benchmarks/speculation_accuracy.py --prompts {o.prompts} --tokens {o.tokens} --method "
        f"{o.method} --depth {o.depth} --repeats {o.repeats}`  \n"
        f"Commit {provenance.commit()}; torch {provenance.versions()['torch']}; {model['device']}; "
        f"{model['name']} {model['dtype']}; processor time, virtual clock.  \n"
        f"{o.prompts} prompts of each of {len(KINDS)} kinds to learn from, as many others to foretell; capacity "
        f"without drafts {capacity_per_s:.3f} requests/s; Poisson arrivals, seeds 0 and on to learn, 100 to foretell.\n"
    )


if __name__ == "__main__":
    main()
