"""Processes that share the experts of a model draw the tokens of one; a lost one, or an odd wish, ends in one line.

What is computed is `test_expert_parallel.py`'s; here the processes are real, on this machine's loopback, through gloo.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.test_mixture_serving import GRAPHS, assert_transformers_tokens, config, talk
from tests.engine.tiny import VOCAB, tiny_model
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME
from tests.tiny_models import write_tiny_model
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.records import Records

# model -> ranks, what is spread how. Heads and experts have to divide: 6 heads, 2 of KV; 6, 4 and 8 experts.
LAYOUTS = [
    ("qwen3_moe_every_second", 2, "all-gather", 0),
    ("qwen3_moe_every_second", 2, "all-to-all", 2),
    ("mixtral", 2, "all-to-all", 0),
    ("deepseek_v3", 2, "all-gather", 2),
    ("deepseek_v2", 2, "all-to-all", 1),
]
CROWDED = config(num_kv_blocks=40, max_tokens_per_batch=24)  # preemptions, prefix hits and chunks


def options(variant: str, ranks: int, dispatch: str = "all-gather", redundant: int = 0) -> EngineOptions:
    return EngineOptions(
        model=str(tiny_model(variant).folder),
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
    host.serve(work, where, Policies(DecodeFirst(), shapes=shapes), records, step_time=STEP_TIME)
    obey_the_laws(work, where, records.sort(), vocab_size=VOCAB)
    assert_transformers_tokens(variant, work, records)
    return records


@pytest.mark.parametrize(("variant", "ranks", "dispatch", "redundant"), LAYOUTS)
def test_two_ranks_draw_the_tokens_of_one(variant: str, ranks: int, dispatch: str, redundant: int) -> None:
    """In turns and planned ahead, eagerly and in graphs, as transformers would."""
    with Engine(options(variant, ranks, dispatch, redundant)) as host:
        for mode in ASYNC_SCHEDULING:
            shapes = Eager() if mode == "on" else GRAPHS
            where = replace(CROWDED, async_scheduling=mode)
            summary = summarize(draws_the_tokens_of_one(host, variant, where, shapes))
            assert summary.num_preemptions > 0
            assert summary.prefix_hit_frac > 0


@pytest.fixture(scope="module")
def four_heads() -> str:
    """Heads and experts that four ranks can share."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="xllm_lab_four_")
    shape = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    return str(write_tiny_model(Path(folder), **shape))
