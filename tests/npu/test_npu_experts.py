"""Mixtures of experts on the fake device, by the operators of torch_npu: the CPU engine's tokens, in graphs too."""

# Shapes: L layers, E experts

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import NUM_LAYERS, WHERE, Talk, engine, folder, install_operators, let_float32_through, served
from tests.npu.test_npu_serving import ORDERS, crowd
from xllm_lab.engine.ops.npu.operators import check_calls
from xllm_lab.errors import ConfigError
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets

QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
MODELS: dict[str, dict[str, Any]] = {"qwen3_moe": QWEN, "mixtral": MIXTRAL, "deepseek_v3": DEEPSEEK}
OF_EXPERTS = (
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_moe_token_unpermute",
)


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


@pytest.mark.parametrize("model", MODELS)
def test_eager_steps_compute_what_the_cpu_computes(model: str) -> None:
    """Token for token. What the fused operators do not cover, PyTorch serves, and the table says so."""
    at = folder(**MODELS[model])
    assert served(engine("npu", model=at), crowd())[0] == served(engine("cpu", model=at), crowd())[0]
    ops = engine("npu", model=at).describe()["ops"]
    by = {op: ops[op]["by"] for op in ("route", "permute", "grouped_matmul", "unpermute")}
    fused = dict.fromkeys(by, "torch_npu")
    assert by == (fused | {"route": "torch"} if model == "deepseek_v3" else fused)
    if model == "deepseek_v3":
        assert ops["route"]["instead_of"] == {"torch_npu": "the fused gate is a softmax over all experts"}


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
@pytest.mark.parametrize("model", MODELS)
def test_graphs_compute_what_eager_steps_compute(model: str, order: tuple[control.Order, int]) -> None:
    """Which expert a row goes to changes between replays, and how many rows each gets."""
    at, (name, seed) = folder(**MODELS[model]), order
    expected, _ = served(engine("cpu", model=at), crowd())
    with control.order(name, seed=seed, max_delay_us=200):
        tokens, graphs = served(engine("npu", model=at), crowd(), shapes="xllm-buckets")
    assert tokens == expected
    assert graphs is not None
    assert graphs["replays"] > graphs["captures"] > 0


def test_attention_that_pytorch_serves_is_not_captured() -> None:
    """Compressed vectors wider than the fused attention takes; refused before anything runs."""
    host = engine("npu", model=folder(**{**DEEPSEEK, "kv_lora_rank": 512}))
    assert "head dim of 528" in host.describe()["ops"]["paged_attention"]["instead_of"]["torch_npu"]
    with pytest.raises(ConfigError, match="graphs with paged_attention by 'torch', which npu cannot capture"):
        host._runner(WHERE, XllmBuckets())


@pytest.mark.parametrize("captures", [False, True])
def test_counters_leave_out_what_pads(captures: bool) -> None:
    """Tokens that pad are routed here like any other; they are not counted."""
    host, sums = engine("npu", model=folder(**QWEN)), list[Tensor]()
    subject = host._runner(WHERE, XllmBuckets()) if captures else host._runner(WHERE)
    subject.workspace.counts_experts = True
    subject.expert_observer = lambda num_tokens, rows_LE: sums.append(rows_LE.sum(1).cpu() - 2 * num_tokens)
    talk = Talk(5, 150, 127)
    subject.run(talk.prefill())
    for _ in range(3):
        subject.run(talk.decode(), 4 if captures else None)
    assert torch.stack(sums).tolist() == [[0] * NUM_LAYERS] * 4


@pytest.mark.parametrize("captures", [False, True])
def test_operators_of_a_decoding_step(captures: bool, ledger: Ledger) -> None:
    """Eagerly each layer gates, sorts, multiplies twice and sums, once each; in a graph nothing of that is launched."""
    host, talk = engine("npu", model=folder(**QWEN)), Talk(5, 150, 127)
    subject = host._runner(WHERE, XllmBuckets()) if captures else host._runner(WHERE)
    subject.run(talk.prefill())
    subject.run(talk.decode(), 4 if captures else None)
    step = talk.decode()
    with control.counting() as counts:
        subject.run(step, 4 if captures else None)
    calls = counts.calls()
    found = {op: calls.get(f"launch:npu::{op}", 0) for op in OF_EXPERTS}
    once = dict.fromkeys(OF_EXPERTS, NUM_LAYERS) | {"npu_grouped_matmul": 2 * NUM_LAYERS}
    assert found == (dict.fromkeys(OF_EXPERTS, 0) if captures else once)
    assert calls.get("memcpy:d2h", 0) == 0, "the host does not look at what is routed where"
    ledger(f"decoding step with experts, {'captured' if captures else 'eager'}, {NUM_LAYERS} layers", counts)


def test_bfloat16_within_the_operators_limits() -> None:
    """Every call is held against the documentation."""
    try:
        npu = engine("npu", "bfloat16", model=folder(**QWEN), check_ops=True)
        subject, talk = npu._runner(WHERE), Talk(5, 150, 127)
        for step in range(3):
            assert subject.run(talk.decode() if step else talk.prefill()).isfinite().all()
    finally:
        check_calls(on=False)
