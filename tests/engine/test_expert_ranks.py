"""Processes that share the experts of a model draw the tokens of one; a lost one, or an odd wish, ends in one line.

What is computed is `test_expert_parallel.py`'s; here the processes are real, on this machine's loopback, through gloo.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_engine_serving import config as engine_config
from tests.engine.test_engine_serving import crowd, outputs, served
from tests.engine.test_mixture_serving import GRAPHS, assert_transformers_tokens, config, talk
from tests.engine.tiny import VOCAB
from tests.engine.tiny import tiny_model as tiny_moe
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME
from tests.tiny_loop import INSTANCE, said, window
from tests.tiny_models import tiny_model, write_tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.launcher import Launcher
from xllm_lab.errors import ConfigError
from xllm_lab.formats import own
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.records import Records
from xllm_lab.step import Step

_FOLDER = tempfile.TemporaryDirectory(prefix="xllm_lab_four_")
SLOW = pytest.mark.slow
LAYOUTS = [  # model, dispatch, redundant slots
    ("mixtral", "all-to-all", 1),
    ("deepseek_v3", "all-gather", 2),
    pytest.param("qwen3_moe_every_second", "all-gather", 0, marks=SLOW),
    pytest.param("qwen3_moe_every_second", "all-to-all", 2, marks=SLOW),
    pytest.param("deepseek_v2", "all-to-all", 0, marks=SLOW),
]
CROWDED = config(num_kv_blocks=40, max_tokens_per_batch=24)  # preemptions, prefix hits and chunks


def options(model: str, ranks: int, dispatch: str = "all-gather", redundant: int = 0) -> EngineOptions:
    return EngineOptions(
        model=model,
        device="cpu",
        dtype="float32",
        tensor_parallel=ranks,
        expert_parallel=True,
        expert_dispatch=dispatch,
        num_redundant_experts=redundant,
        rank_timeout_s=60,
    )


def draws_the_tokens_of_one(host: Engine, variant: str, where: InstanceConfig, shapes: ShapesPolicy) -> Records:
    records, work = Records(), talk()
    work = replace(work, requests=tuple(r.at(0) for r in work.requests))  # however slow the machine is
    host.serve(work, where, Policies(DecodeFirst(), shapes=shapes), records, step_time=STEP_TIME)
    obey_the_laws(work, where, records.sort(), vocab_size=VOCAB)
    assert_transformers_tokens(variant, work, records)
    return records


@pytest.mark.parametrize(("variant", "dispatch", "redundant"), LAYOUTS)
def test_two_ranks_draw_the_tokens_of_one(variant: str, dispatch: str, redundant: int) -> None:
    """In turns and planned ahead, eagerly and in graphs, as transformers would."""
    with Engine(options(str(tiny_moe(variant).folder), 2, dispatch, redundant)) as host:
        for mode in ASYNC_SCHEDULING:
            shapes = Eager() if mode == "on" else GRAPHS
            where = replace(CROWDED, async_scheduling=mode)
            summary = summarize(draws_the_tokens_of_one(host, variant, where, shapes))
            assert summary.num_preemptions > 0
            assert summary.prefix_hit_frac > 0


@functools.cache
def four_heads() -> str:
    """Heads and experts that four ranks can share."""
    shape = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    return str(write_tiny_model(Path(_FOLDER.name), **shape))


@pytest.mark.parametrize("dispatch", ["all-to-all", pytest.param("all-gather", marks=SLOW)])
def test_four_ranks_draw_the_tokens_of_one(dispatch: str) -> None:
    """Of which each has a head and two experts; and rank 0 sees what every slot of every rank had to do."""
    where, work, sums = engine_config(block_size=4, num_kv_blocks=40), crowd(output=12), list[list[int]]()
    alone = Engine(EngineOptions(model=four_heads(), device="cpu", dtype="float32"))
    with Engine(options(four_heads(), 4, dispatch, 1)) as host:
        host.expert_observer = lambda num_tokens, rows_LE: sums.append((rows_LE.sum(1) - 3 * num_tokens).tolist())
        found = served(work, where, DecodeFirst(), host=host)
        assert host.describe()["expert_parallel"] == 4
    assert outputs(found) == outputs(served(work, where, DecodeFirst(), host=alone))
    assert sums == [[0, 0]] * len(found.steps)


@pytest.mark.parametrize("dispatch", ["all-to-all", pytest.param("all-gather", marks=SLOW)])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "rank 1 ended with signal SIGKILL"),
        pytest.param(signal.SIGSTOP, "a rank of 2 did not answer within 4 s", marks=SLOW),
    ],
)
def test_a_lost_rank_ends_the_run_in_one_line(
    how: signal.Signals, message: str, dispatch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed or stopped while a step waits for it; nothing of it is left, nor of the run."""
    lost: list[subprocess.Popen[bytes]] = []
    original = Launcher.launch

    def launch(self: Launcher, step: Step) -> None:
        if step.index == 5:
            ranks = self._lead._ranks
            assert ranks is not None
            lost.extend(started.process for started in ranks._started)
            os.kill(lost[0].pid, how)
        original(self, step)

    monkeypatch.setattr(Launcher, "launch", launch)
    own.write(window(0, gap_us=0), tmp_path / "trace.jsonl")
    knobs = [word for knob in INSTANCE for word in ("--set", knob)]
    words = ("--model", four_heads(), "--device", "cpu", "--tensor-parallel", 2, "--expert-parallel")
    ways = ("--expert-dispatch", dispatch, "--rank-timeout-s", 4 if how is signal.SIGSTOP else 60)
    found = said("replay", tmp_path / "trace.jsonl", *knobs, *words, *ways, "--out", tmp_path / "run", "--quiet")
    assert (found.status, found.out, found.err) == (2, "", f"xllm-lab: {message}\n")
    assert [process.returncode for process in lost] == [-signal.SIGKILL]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 1}, "expert_parallel with one rank; accepted: tensor_parallel or instances of at least 2"),
        ({"expert_dispatch": "by-post"}, "expert_dispatch is 'by-post', accepted: all-gather, all-to-all"),
        ({"num_redundant_experts": 9}, "num_redundant_experts is 9, 0 to 4 is accepted"),
        ({"model": str(tiny_model())}, "expert_parallel, and .* has no experts; accepted: a mixture of experts"),
        (
            {"expert_parallel": False, "num_redundant_experts": 1},
            "num_redundant_experts is 1 without expert_parallel; accepted: 0, or with it",
        ),
        (
            {"expert_parallel": False, "expert_dispatch": "all-to-all"},
            "expert_dispatch is 'all-to-all' without expert_parallel; accepted: with it",
        ),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(replace(options(four_heads(), 2), **changes))


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 experts do not divide among 4 devices, a multiple is accepted"):
        Engine(options(str(tiny_moe("qwen3_moe").folder), 4))
