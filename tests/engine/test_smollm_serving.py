"""The embedded model, served: whatever the scheduler does to its KV, the text is that of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.tiny import reference_logits
from tests.laws import obey_the_laws
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_TOKENS = 64
# Steps shorter than most prompts, and room for about three requests of the twenty.
WHERE = InstanceConfig(
    max_tokens_per_batch=96, max_seqs_per_batch=8, block_size=16, num_kv_blocks=44, max_model_len=1024
)


@pytest.fixture(scope="module")
def served(twenty_prompts: list[list[int]]) -> tuple[Workload, Records]:
    """Everybody at once, first come, first served."""
    workload = Workload(
        requests=tuple(
            Request(
                id=RequestId(i),
                arrival_us=0,
                prompt=Prompt(num_tokens=len(ids), token_ids=tuple(ids)),
                output_tokens=NUM_TOKENS,
            )
            for i, ids in enumerate(twenty_prompts)
        )
    )
    records = Records()
    engine = Engine(EngineOptions(device="cpu", dtype="float32"))
    engine.serve(workload, WHERE, Policies(make_policy("batch", "fcfs")), records)
    return workload, records.sort()


@pytest.mark.slow
def test_prompts_were_cut_shared_and_recomputed(served: tuple[Workload, Records]) -> None:
    """Or the test below would show little."""
    workload, records = served
    obey_the_laws(workload, WHERE, records, vocab_size=49152)
    assert any(sum(s.num_tokens) == WHERE.max_tokens_per_batch and len(s.ids) > s.num_logits for s in records.steps)
    assert summarize(records).prefix_hit_frac > 0
    assert summarize(records).num_preemptions > 0


@pytest.mark.slow
def test_served_text_is_that_of_transformers(
    served: tuple[Workload, Records], twenty_prompts: list[list[int]], smollm2_reference: Any
) -> None:
    """20 prompts x 64 tokens in float32.

    transformers reads each text once; that its largest logit after every prefix is our next token means, by induction,
    that it would have written the same text.
    """
    _, records = served
    for prompt, record in zip(twenty_prompts, records.requests, strict=True):
        ours = record.output_token_ids.tolist()
        assert len(ours) == NUM_TOKENS
        theirs = reference_logits(smollm2_reference, prompt + ours).argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("pages", ["on-demand", "xllm-pool", "next-page"])
def test_virtual_kv_gives_the_same_text(served: tuple[Workload, Records], pages: str) -> None:
    """One range of addresses a sequence, with steps planned ahead and replayed, prefixes shared and KV lost."""
    workload, plain = served
    where = replace(WHERE, kv_layout="virtual", async_scheduling="length_aware")
    chosen = Policies(
        make_policy("batch", "fcfs"), shapes=make_policy("shapes", "vllm-buckets"), pages=make_policy("pages", pages)
    )
    records = Records()
    Engine(EngineOptions(device="cpu", dtype="float32")).serve(workload, where, chosen, records)
    told = summarize(records)
    assert told.num_preemptions > 0
    assert told.prefix_hit_frac > 0
    for one, other in zip(records.sort().requests, plain.requests, strict=True):
        assert one.output_token_ids == other.output_token_ids, f"request {one.id}"
