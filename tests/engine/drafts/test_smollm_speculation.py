"""The embedded model with drafts: on 40 texts, greedy tokens are those of plain decoding, token for token."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from tests.laws import obey_the_laws
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.draft.acceptance_driven import AcceptanceDriven
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 40, 30, 16
WHERE = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=20, block_size=16, num_kv_blocks=200, max_model_len=1024
)


class Mode(NamedTuple):
    """How drafts are made, and what else is on."""

    draft: DraftPolicy
    shapes: ShapesPolicy
    changes: dict[str, Any]


MODES = {
    "ngram": Mode(Fixed(method="ngram", num_speculative_tokens=4), EAGER, {"max_tokens_per_batch": 96}),
    "suffix": Mode(
        Fixed(method="suffix", num_speculative_tokens=6), XllmBuckets(), {"async_scheduling": "length_aware"}
    ),
    "draft_model": Mode(
        Fixed(method="draft_model", num_speculative_tokens=2),
        EAGER,
        {"async_scheduling": "on", "num_kv_blocks": 60},
    ),
    "adaptive": Mode(AcceptanceDriven(), XllmBuckets(), {"enable_prefix_cache": False}),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineOptions(device="cpu", dtype="float32", draft_model="layers:0-2,4-6,8-11,13-24,28-29"))


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> Workload:
    """Beginnings of Python's own documentation, the last words of which are said twice."""
    topics = importlib.import_module("pydoc_data.topics").topics
    requests = []
    for i, name in enumerate(sorted(topics)[:NUM_PROMPTS]):
        tokens = tokenizer.encode(topics[name][:2000])[:PROMPT_TOKENS]
        tokens = (*tokens, *tokens[-12:-6])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=0, prompt=prompt, output_tokens=NUM_TOKENS))
    assert len(requests) == NUM_PROMPTS
    return Workload(requests=tuple(requests))


@pytest.fixture(scope="module")
def plain(engine: Engine, texts: Workload) -> Records:
    records = Records()
    engine.serve(texts, WHERE, Policies(DecodeFirst()), records)
    return records.sort()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_the_text_is_that_of_plain_decoding(engine: Engine, texts: Workload, plain: Records, name: str) -> None:
    """In float32; and drafts are kept, or it would show little."""
    draft, shapes, changes = MODES[name]
    records, config = Records(), replace(WHERE, **changes)
    engine.serve(texts, config, Policies(DecodeFirst(), shapes=shapes, draft=draft), records)
    obey_the_laws(texts, config, records.sort(), vocab_size=49152)
    for ours, theirs in zip(records.requests, plain.requests, strict=True):
        assert ours.output_token_ids == theirs.output_token_ids, f"request {ours.id}"
    length = summarize(records).acceptance_length
    assert length is not None
    assert length > 1.05
