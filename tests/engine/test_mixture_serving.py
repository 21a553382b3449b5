"""Mixtures of experts served: whatever becomes of KV, batches and graphs, tokens are those of transformers."""

# Shapes: L layers, E experts

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_tiers import COPY_TIME
from tests.engine.tiny import VOCAB, reference_logits, tiny_model
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.expert_loads import ExpertLoads
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

SERVED = ("mixtral", "qwen3_moe_every_second", "deepseek_v2", "deepseek_v3")
GRAPHS = PowersOfTwo(graphs_prefill=True)


@dataclass(frozen=True)
class Scene:
    """Limits, policies besides the batch's, and what records must show for the scene to be worth playing."""

    limits: dict[str, Any]
    policies: dict[str, Any]
    shows: Callable[[Records], bool]


def _preempts(records: Records) -> bool:
    return summarize(records).num_preemptions > 0


def _hits(records: Records) -> bool:
    return summarize(records).prefix_hit_frac > 0


def _chunks(records: Records) -> bool:
    return sum(len(s.ids) for s in records.steps) > sum(s.num_logits for s in records.steps)


def _drafts(records: Records) -> bool:
    return any(s.num_drafted for s in records.steps)


def _copies(records: Records) -> bool:
    return bool(records.copies)


def _maps(records: Records) -> bool:
    return any(s.page_maps for s in records.steps)


def _pads(records: Records) -> bool:
    return any((s.graph_tokens or 0) > sum(s.num_tokens) for s in records.steps)


SCENES = {
    "prefix hits": Scene({}, {}, _hits),
    "preemptions": Scene({"num_kv_blocks": 40}, {}, _preempts),
    "chunks": Scene({"max_tokens_per_batch": 9}, {}, _chunks),
    "graphs": Scene({}, {"shapes": GRAPHS}, _pads),
    "graphs, ahead, preempted": Scene(
        {"num_kv_blocks": 40, "async_scheduling": "length_aware"}, {"shapes": GRAPHS}, _preempts
    ),
    "drafts": Scene(
        {},
        {"draft": Fixed(method="ngram", num_speculative_tokens=3)},
        _drafts,
    ),
    "tiers": Scene({"num_kv_blocks": 40}, {"cache": Lru()}, _copies),
    "virtual": Scene(
        {"kv_layout": "virtual", "block_size": 128, "num_kv_blocks": 12},
        {},
        _maps,
    ),
}


@functools.cache
def engine(variant: str) -> Engine:
    return Engine(EngineOptions(model=str(tiny_model(variant).folder), device="cpu", dtype="float32"))


def config(**limits: Any) -> InstanceConfig:
    roomy = {"max_tokens_per_batch": 256, "max_seqs_per_batch": 8, "block_size": 4, "num_kv_blocks": 200}
    return InstanceConfig(**{**roomy, "max_model_len": 128, **limits})


def talk(num_requests: int = 6, output: int = 24) -> Workload:
    """Prompts that begin alike, three at a time, so that the later ones find what the earlier left."""
    drawn = torch.randint(3, VOCAB, (num_requests, 60), generator=torch.Generator().manual_seed(5)).tolist()
    requests = []
    for i, own in enumerate(drawn):
        tokens = (*drawn[i % 2][:24], *own[: 9 + 5 * i])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=30_000 * (i // 3), prompt=prompt, output_tokens=output))
    return Workload(requests=tuple(requests))


def served(variant: str, work: Workload, where: InstanceConfig, **policies: Any) -> Records:
    records = Records()
    chosen = Policies(DecodeFirst(), **policies)
    engine(variant).serve(work, where, chosen, records, step_time=STEP_TIME, copy_time=COPY_TIME)
    obey_the_laws(work, where, records.sort(), vocab_size=VOCAB)
    return records


@functools.cache
def best_after(variant: str, tokens: tuple[int, ...]) -> list[int]:
    """transformers' most likely token after each."""
    found: list[int] = reference_logits(tiny_model(variant).reference, list(tokens)).argmax(-1).tolist()
    return found


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("variant", SERVED)
def test_tokens_are_those_of_transformers(variant: str, scene: str) -> None:
    played, work = SCENES[scene], talk()
    records = served(variant, work, config(**played.limits), **played.policies)
    assert played.shows(records)
    assert_transformers_tokens(variant, work, records)


def assert_transformers_tokens(variant: str, work: Workload, records: Records) -> None:
    for request, record in zip(work.requests, records.requests, strict=True):
        prompt, output = request.prompt.token_ids or (), record.output_token_ids.tolist()
        assert output
        expected = best_after(variant, (*prompt, *output))[len(prompt) - 1 : -1]
        assert output == expected


@pytest.mark.parametrize("shapes", [None, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("variant", SERVED)
def test_counters_conserve_rows(variant: str, shapes: PowersOfTwo | None) -> None:
    """Each step, each layer with experts: tokens times experts of a token, padding not counted; other layers have none.

    Graphs count what the eager steps do: padding changes nothing.
    """
    host = engine(variant)
    mixture = host.model.config.mixture
    assert mixture is not None
    loads, steps = ExpertLoads(mixture), list[int]()

    def observe(num_tokens: int, rows_LE: Tensor) -> None:
        loads(num_tokens, rows_LE)
        expected = torch.zeros(len(rows_LE), dtype=torch.int64)
        expected[list(loads.layers)] = num_tokens * mixture.routing.top_k
        assert torch.equal(rows_LE.sum(1), expected)
        assert [sum(row) for row in loads.last] == expected[list(loads.layers)].tolist()
        steps.append(num_tokens)

    host.expert_observer = observe
    try:
        records = served(variant, talk(), config(), **({} if shapes is None else {"shapes": shapes}))
    finally:
        host.expert_observer = None
    assert steps == [sum(s.num_tokens) for s in records.steps]
    assert (loads.num_steps, loads.num_tokens) == (len(steps), sum(steps))
    assert [sum(row) for row in loads.total] == [loads.num_tokens * mixture.routing.top_k] * len(loads.layers)


def test_nobody_counts_unasked() -> None:
    host = engine("mixtral")
    runner = host.runner(config())
    assert runner.expert_observer is None
    assert not runner.workspace.counts_experts
    runner.expert_observer = lambda *_: None
    with pytest.raises(AssertionError, match="rows that nobody counted"):
        runner.run([SequenceChunk([5], 0, [0], True)])


def test_kv_of_latent_attention_is_one_row_a_token() -> None:
    """kv_lora_rank + qk_rope_head_dim numbers a layer, in the pool and in what runs say."""
    host = engine("deepseek_v3")
    assert host.describe()["kv_bytes_per_token"] == 2 * (24 + 8) * 4
    pool = host.runner(config()).kv_pool
    assert sum(x.nbytes for layer in pool.layers for x in layer) == 200 * 4 * 2 * (24 + 8) * 4


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v3"])
def test_two_ranks_draw_the_tokens_of_transformers(variant: str) -> None:
    """Each has half of every expert's channels and half of the heads; prefix hits, preemptions and graphs among it."""
    options = EngineOptions(model=str(tiny_model(variant).folder), device="cpu", dtype="float32", tensor_parallel=2)
    records, work = Records(), talk()
    with Engine(options) as two:
        two.serve(work, config(num_kv_blocks=40), Policies(DecodeFirst(), shapes=GRAPHS), records, step_time=STEP_TIME)
    assert _preempts(records)
    assert _hits(records)
    assert_transformers_tokens(variant, work, records.sort())
