"""Acceptance of a machine: this one passes, a broken operator does not, and the folder is what the simulator wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_loop import SETTINGS, said
from tests.tiny_models import tiny_model, write_tiny_model
from xllm_lab import verbs
from xllm_lab.acceptance import PLAN
from xllm_lab.acceptance.machine import MachineUnderTest, Options
from xllm_lab.acceptance.replays import profile
from xllm_lab.acceptance.serving import drafts, logits, operators
from xllm_lab.engine.device import open_device
from xllm_lab.engine.drafts import verify
from xllm_lab.engine.engine import Engine
from xllm_lab.engine.ops import native
from xllm_lab.engine.ops.check import Sizes, check_operators
from xllm_lab.engine.ops.table import choose
from xllm_lab.sim.calibrate import read_calibration

SIZES = Sizes(num_heads=6, num_kv_heads=2, head_dim=32, hidden_size=64, block_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("acceptance") / "found"
    line = ("accept", "--device", "cpu", "--model", tiny_model(), "--requests", 4, "--repeats", 1, "--quiet")
    told = said(*line, "--out", out)
    assert told.status == 0, told.err
    assert told.out.splitlines()[-1] == str(out)
    return out


def test_every_part_found_something(folder: Path) -> None:
    """And all of it is as it must be, preemptions and graphs among it."""
    found = json.loads((folder / "acceptance.json").read_text())
    assert found["passed"]
    assert [part.name for part in PLAN] == list(dict.fromkeys(f["part"] for f in found["findings"]))
    told = {f["part"]: f["told"] for f in found["findings"]}
    assert "0 preemptions" not in next(f["told"] for f in found["findings"] if f["part"] == "memory")
    assert "is refused" in told["memory"]
    assert found["options"]["device"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__


def test_a_model_that_no_bundle_describes_has_none(tmp_path: Path) -> None:
    """Which is no failure of the machine."""
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 0}
    model = write_tiny_model(tmp_path / "model", model_type="deepseek_v2", first_k_dense_replace=0, **latent, **routed)
    machine = MachineUnderTest(Options(model=str(model), device="cpu"), tmp_path / "found")
    assert list(profile(machine)) == [
        (True, "none is written: the model's attention is latent; accepted for a profile: grouped-query attention")
    ]


def test_its_folder_is_what_the_simulator_wants(folder: Path, tmp_path: Path) -> None:
    """Runs to calibrate on, a calibration, and a profile, each accepted."""
    again = verbs.calibrate([folder / "full", folder / "graphs", folder / "paced"])
    assert again.step_time.weights[:2] == read_calibration(folder / "calibration.json").step_time.weights[:2]
    line = ("simulate", folder / "full" / "workload.jsonl", *SETTINGS)
    for machine in ("--calibration", folder / "calibration.json"), ("--profile", folder / "profile"):
        assert said(*line, *machine, "--quiet", "--out", tmp_path / machine[0]).status == 0


def test_the_plan_is_told_and_nothing_done() -> None:
    told = said("accept", "--dry-run")
    assert told.status == 0
    assert [line.split()[1] for line in told.out.splitlines()] == [part.name for part in PLAN]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "npu", "--out", "x"), "npu"),
        (("--device", "cpu"), "no --out"),
        (("--device", "cpu", "--requests", 0, "--out", "x"), "num_requests is 0, at least 1 is accepted"),
        (("--device", "cpu", "--model", "nobody", "--out", "x"), "model 'nobody' is unknown"),
    ],
)
def test_what_cannot_be_begun_is_refused_in_one_line(
    words: tuple[object, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said("accept", *words)
    assert (told.status, told.out) == (2, "")
    assert says in told.err
    assert len(told.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "op", ["rms_norm", "add_rms_norm", "head_norm", "rope", "swiglu", "reshape_and_cache", "paged_attention"]
)
def test_an_operator_that_does_nothing_is_found(op: str) -> None:
    """Whichever it is; the cache's, by the attention that reads what is not there."""
    ops = choose(torch.device("cpu"), torch.float32, head_dim=32, hidden_size=64, without=("native", "onednn"))
    changed: dict[str, Any] = {op: _IDLE.get(op, lambda *args: args[-1])}  # its output, as it was
    subject = replace(ops, **changed)
    found = {check.op: check for check in check_operators(subject, SIZES, torch.float32, torch.device("cpu"))}
    assert [name for name, check in found.items() if not check.passed] == [
        "paged_attention" if op == "reshape_and_cache" else op
    ]


_IDLE: dict[str, Callable[..., Any]] = {
    "head_norm": lambda x_TNH, *args: x_TNH,
    "rope": lambda x_TNH, *args: x_TNH,
    "add_rms_norm": lambda x_TD, *args: (x_TD, args[-1]),
}


def test_a_verification_that_keeps_what_it_should_not_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is taken for what the model would have said."""
    machine = MachineUnderTest(Options(model=str(tiny_model()), device="cpu", num_requests=4), tmp_path)
    assert all(passed for passed, _ in drafts(machine))
    monkeypatch.setattr(verify, "_kept", lambda drafted, drawn: [*drafted, drawn(len(drafted))])
    found = list(drafts(machine))
    assert len(found) == 4
    assert not any(passed for passed, _ in found)


def test_a_broken_operator_shows_in_the_logits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a CPU that does not share it: a rotation that forgets to turn."""
    machine = MachineUnderTest(Options(model=str(tiny_model()), device="cpu"), tmp_path)
    if machine.engine.model.model.ops.served["rope"].by != "native":
        pytest.skip("no compiled kernels here")
    assert all(passed for passed, _ in logits(machine))
    monkeypatch.setattr(native.NativeOps, "rope", lambda self, x_TNH, cos_TH, sin_TH: x_TNH)
    broken = MachineUnderTest(Options(model=str(tiny_model()), device="cpu"), tmp_path)
    assert [told.split()[0] for passed, told in operators(broken) if not passed] == ["rope"]
    assert not all(passed for passed, _ in logits(broken))


def test_a_device_that_fails_while_serving_is_told_of_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is a finding, so is what cannot be done without the run, and the folder is written."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("device error 507046")

    monkeypatch.setattr(Engine, "replay", fails)
    out = tmp_path / "found"
    line = ("accept", "--model", tiny_model(), "--device", "cpu", "--requests", 4, "--repeats", 1, "--out", out)
    assert said(*line).status == 1
    found = json.loads((out / "acceptance.json").read_text())["findings"]
    failed = {f["part"]: f["told"] for f in found if not f["passed"]}
    assert "507046" in failed["replay"]
    assert "run full was not made" in failed["parity"]
    assert "run full was not made" in failed["calibration"]
    assert "run held-out was not made" in failed["simulation"]


def test_the_device_of_auto_is_timed_like_the_same_device_by_name(tmp_path: Path) -> None:
    """On a CPU, processor time."""
    timers = {
        device: MachineUnderTest(Options(model=str(tiny_model()), device=device), tmp_path).engine.options.timer
        for device in ("auto", open_device("auto").name)
    }
    assert len(set(timers.values())) == 1
