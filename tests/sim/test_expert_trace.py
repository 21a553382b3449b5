"""Loads of experts given to a machine: by a file, by a run; priced by a roofline, balanced by a policy, and tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws import experts_are_never_lost, obey_the_laws
from xllm_lab import cli, verbs
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.hardware import hardware
from xllm_lab.rebalancing import layout_from
from xllm_lab.runs import Run, read_run
from xllm_lab.sim.expert_trace import with_expert_trace
from xllm_lab.sim.experts.loads import ZipfLoads
from xllm_lab.sim.machine import Deployment, Machine, model_of, roofline_machine
from xllm_lab.workload import Prompt, Request, RequestId, Workload

MODEL = "qwen3-30b-a3b"
EIGHT = Deployment(tensor_parallel=8, expert_parallel=8)
KNOBS = {"experts.interval_us": 300_000, "max_model_len": 8192}


def work(num: int = 30) -> Workload:
    """Long prompts: of few tokens a step, experts that nobody asks for are not read, and skew is no loss."""
    each = [
        Request(id=RequestId(k), arrival_us=k * 60_000, prompt=Prompt(num_tokens=4_000), output_tokens=20 + 5 * (k % 3))
        for k in range(num)
    ]
    return Workload(requests=tuple(each))


def machine() -> Machine:
    return roofline_machine(hardware("ascend-910b3"), model_of(MODEL), EIGHT)


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skewed and drifting, of two layers that stand for all."""
    drawn = ZipfLoads(
        num_layers=2,
        num_experts=128,
        experts_per_token=8,
        tokens_per_step=64,
        steps_per_tick=50,
        tick_us=200_000,
        exponent=1.2,
        drift_ticks=50.0,
    ).drawn(20, seed=3)
    path = tmp_path_factory.mktemp("loads") / "loads.npz"
    drawn.save(path)
    return path


def simulated(loads: Path, out: Path, name: str, **others: Any) -> Run:
    how: dict[str, Any] = {"experts": name, "settings": KNOBS if name != "static" else {"max_model_len": 8192}}
    workload = work()
    run = verbs.simulate(workload, machine(), out=out, expert_trace=str(loads), **{**how, **others})
    obey_the_laws(workload, run.manifest.instance_config(), run.records, vocab_size=run.manifest.model["vocab_size"])
    assert run.manifest.expert_layout is not None
    redundant = run.manifest.expert_layout["num_redundant_experts"]
    experts_are_never_lost(run.records, layout_from(run.manifest.expert_layout), redundant)
    return run


def test_balancing_pays_where_loads_are_skewed(loads: Path, tmp_path: Path) -> None:
    """A roofline prices the most loaded device: skew costs, and balance gives some of it back."""
    static, balanced = (simulated(loads, tmp_path / n, n) for n in ("static", "xllm-balanced"))
    workload = work()
    even = verbs.simulate(workload, machine(), out=tmp_path / "even", settings={"max_model_len": 8192})
    spent = [sum(step.step_us for step in run.records.steps) for run in (even, balanced, static)]
    assert spent == sorted(spent)
    assert len(set(spent)) == 3
    assert balanced.manifest.expert_layout is not None
    assert balanced.manifest.expert_layout["counts"]["changes"] == sum(
        d.active_step is not None for d in balanced.decisions
    )
    assert balanced.decisions
    assert balanced.expert_loads
    assert read_run(balanced.path).decisions == balanced.decisions


def test_a_run_is_a_trace_for_another(loads: Path, tmp_path: Path) -> None:
    """What one counted, with experts moved meanwhile, is what the next balances."""
    first = simulated(loads, tmp_path / "first", "xllm-balanced")
    again = simulated(first.path, tmp_path / "again", "xllm-balanced")
    assert [d.layers for d in again.decisions][:1] == [d.layers for d in first.decisions][:1]
    assert sum(s.num_logits for s in again.records.steps) == sum(s.num_logits for s in first.records.steps)


def test_the_command_takes_a_trace(loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it takes a store: with rates behind a question mark."""
    trace = tmp_path / "trace.jsonl"
    own.write(work(4), trace)
    words = ["simulate", str(trace), "--hardware", "ascend-910b3", "--model-config", MODEL, "--tensor-parallel", "8"]
    words += ["--expert-parallel", "8", "--expert-trace", f"{loads}?bytes_per_s=1e10&activation_us=50"]
    words += [
        "--experts",
        "refined",
        "--set",
        "interval_us=200000",
        "--set",
        "num_starts=1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert cli.run(words) == 0
    capsys.readouterr()
    run = read_run(tmp_path / "r")
    assert run.manifest.timing["link_bytes_per_s"] == 1e10
    assert run.manifest.policies["experts"]["name"] == "refined"
    assert run.decisions


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("?rate=3", "'rate=3' is not accepted; accepted: bytes_per_s, row_us, activation_us"),
        ("?row_us=much", "'row_us=much' is not accepted"),
        ("?row_us=-1", "'row_us=-1' is not accepted"),
    ],
)
def test_odd_words_are_refused(loads: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_expert_trace(machine(), f"{loads}{spec}")


def test_who_has_no_divided_experts_is_refused(loads: Path, tmp_path: Path) -> None:
    alone = roofline_machine(hardware("ascend-910b3"), model_of(MODEL), Deployment(tensor_parallel=8))
    with pytest.raises(ConfigError, match="the machine has none that are divided"):
        with_expert_trace(alone, str(loads))
    with pytest.raises(ConfigError, match="experts is 'xllm-balanced', and what there is to balance is not known"):
        verbs.simulate(work(2), machine(), out=tmp_path / "r", experts="xllm-balanced")
