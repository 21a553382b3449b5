"""What the simulator needs of the device: operators' times, runs of a trace, step times, and how far to trust them."""

from __future__ import annotations

from collections.abc import Iterator

from xllm_lab import transforms, verbs
from xllm_lab.acceptance.machine import MachineUnderTest
from xllm_lab.engine.machine_profile import Grid, write_machine_profile
from xllm_lab.engine.operator_times import profile_fails
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.wording import metric_label
from xllm_lab.workload import Workload

LEARNT = ("full", "graphs", "paced")
HELD_OUT = "held-out"
_GRAPHS = PowersOfTwo()
_TOLD = ("ttft_us.p50", "tpot_us.p50", "e2e_us.p50", "output_throughput_per_s")


def profile(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """The bundle, in `profile/`."""
    grid = Grid(
        most_tokens=machine.longest // 4,
        most_seqs=16,
        most_kv_tokens=machine.longest // 4,
        repeats=machine.options.repeats,
    )
    if (reason := profile_fails(machine.engine.model.model)) is not None:
        yield True, f"none is written: {reason}"
        return
    times = write_machine_profile(machine.engine, machine.folder / "profile", grid)
    yield True, f"{len(times)} operators, up to {grid.most_tokens} tokens"


def replays(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Runs, in folders of their names; every request is served."""
    learn, held_out = machine.windows
    yield _replay(machine, "full", machine.at_once(learn))
    yield _replay(machine, "graphs", machine.at_once(learn), _GRAPHS)
    rate_per_s = len(learn.requests) / summarize(machine.run("full").records).makespan_s
    yield _replay(machine, "paced", transforms.scale_rate_to(learn, rate_per_s))
    yield _replay(machine, HELD_OUT, transforms.scale_rate_to(held_out, rate_per_s), _GRAPHS)


def parity_of_runs(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Of each run."""
    for name in (*LEARNT, HELD_OUT):
        found = verbs.parity(machine.run(name))
        told = f"{found.num_steps} steps alike" if found.is_identical else f"step {found.step} differs"
        yield found.is_identical, f"{name}: {told}"


def calibration(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """`calibration.json`."""
    fitted = verbs.calibrate([machine.run(name) for name in LEARNT], out=machine.folder / "calibration.json")
    r = fitted.residual
    yield True, f"{r.num_steps} steps; held-out error of a step {r.mape_frac:.1%}, of their sum {r.bias_frac:+.1%}"


def simulation(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """The held-out run, in `simulated/`: its error is told, and nobody's fault."""
    run = machine.run(HELD_OUT)
    simulated = verbs.simulate(run, machine.folder / "calibration.json", out=machine.folder / "simulated")
    rows = [row for row in verbs.compare(simulated, [run]) if row.metric in _TOLD]
    told = ", ".join(f"{metric_label(row.metric)} {row.error_frac:+.1%}" for row in rows if row.error_frac is not None)
    yield bool(rows), f"errors: {told or 'none could be told'}"


def _replay(machine: MachineUnderTest, name: str, workload: Workload, shapes: ShapesPolicy = EAGER) -> tuple[bool, str]:
    policies = Policies(DecodeFirst(), shapes=shapes)
    run = machine.engine.replay(workload, machine.config(), policies, out=machine.folder / name)
    machine.runs[name] = run
    summary = summarize(run.records)
    told = (
        f"{name}: {summary.num_served} of {len(workload.requests)} served, {summary.output_throughput_per_s:.1f} tok/s"
    )
    return summary.num_served == len(workload.requests), told
