"""Speculation on the fake device: the CPU engine's tokens whoever drafts, and what a verification asks of it."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.drafts.tiny_mtp import mtp_checkpoint
from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import NUM_LAYERS, WHERE, Talk, engine, install_operators, let_float32_through, runner
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.engine.drafts.verify import Row
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.draft import METHODS, DraftPolicy
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.records import Records
from xllm_lab.request_state import MOST_DRAFTS
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Workload

# A decoding graph holds a row for each token and each draft, as far as there may be as many sequences.
ROOMY = replace(WHERE, max_seqs_per_batch=32)


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


@functools.cache
def drafting(device: str) -> Engine:
    """With a prediction module, and itself as a draft model."""
    model = str(mtp_checkpoint("qwen").folder)
    return Engine(EngineOptions(model=model, device=device, dtype="float32", draft_model="layers:0-1"))


def talkative() -> Workload:
    """Prompts that repeat themselves, some longer than a block."""
    rng, requests = np.random.default_rng(3), []
    for i in range(6):
        tokens = np.tile(rng.integers(3, VOCAB_SIZE, 9), 2 + 5 * (i % 4)).tolist()
        prompt = Prompt(num_tokens=len(tokens), token_ids=tuple(tokens))
        requests.append(Request(id=RequestId(i), arrival_us=0, prompt=prompt, output_tokens=12))
    return Workload(requests=tuple(requests))


def served(device: str, draft: DraftPolicy, shapes: ShapesPolicy = EAGER) -> Records:
    records = Records()
    drafting(device).serve(talkative(), ROOMY, Policies(DecodeFirst(), shapes=shapes, draft=draft), records)
    return records.sort()


def tokens_of(records: Records) -> list[list[int]]:
    return [r.output_token_ids.tolist() for r in records.requests]


@pytest.mark.parametrize("shapes", [EAGER, XllmBuckets(), PowersOfTwo(max_graph_tokens=16, graphs_prefill=True)])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_the_cpus_without_drafts(method: str, shapes: ShapesPolicy) -> None:
    """Eager, and with each row of drafts a sequence of a decoding graph."""
    with control.order("shuffled", seed=2):
        records = served("npu", Fixed(method=method, num_speculative_tokens=3), shapes)
    assert tokens_of(records) == tokens_of(served("cpu", OFF))
    replayed = [s for s in records.steps if s.graph_tokens is not None and any(s.num_drafted)]
    assert shapes == EAGER or replayed, "no drafts were verified in a graph"
    assert method == "mtp" or sum(sum(r.num_accepted) for r in records.requests) > 0  # its weights are random


def capturing(most_rows: int, dtype: str = "float32", *, check_ops: bool = False) -> Runner:
    """With the decoding graphs captured."""
    made = engine("npu", dtype, check_ops=check_ops)._runner(ROOMY, PowersOfTwo(max_graph_tokens=most_rows))
    assert made.graphs is not None
    made.run([SequenceChunk([0] * 3, 0, (0,), 1)])
    made.graphs.warm()
    return made


def apart(talk: Talk, row: int, num_drafts: int) -> list[SequenceChunk]:
    """One sequence's last token and its drafts, each row a sequence of its own over the same blocks."""
    whole = talk.chunk(row, 1 + num_drafts)
    start = whole.num_computed_tokens
    return [SequenceChunk([token], start + k, whole.block_table, 1) for k, token in enumerate(whole.token_ids)]


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_a_verification_asks_for_no_more_than_a_decoding_step(num_drafts: int, ledger: Ledger) -> None:
    """One copy of all inputs, one replay, an update of each layer's attention, one argmax, one look; no memory."""
    subject, talk = capturing(8), Talk(5, 126)
    subject.run(talk.prefill())
    size = 2 * (1 + num_drafts)

    def verification() -> tuple[list[SequenceChunk], list[Row]]:
        chunks = [*apart(talk, 0, num_drafts), *apart(talk, 1, num_drafts)]
        return chunks, [Row(Sampling(), RequestId(row), 0, [1] * num_drafts) for row in (0, 1)]

    subject.draw(*verification(), size)
    for _ in range(3):
        step = verification()
        with control.counting() as counts:
            subject.draw(*step, size)
        assert counts.calls() == {
            "memcpy_async:h2d": 1,
            "replay": 1,
            "task_update_begin": NUM_LAYERS,
            "task_update_end": NUM_LAYERS,
            "record_event": NUM_LAYERS,
            "launch:npu::npu_fused_infer_attention_score.out": NUM_LAYERS,
            "launch:aten::argmax.out": 1,
            "memcpy:d2h": 1,
            "synchronize_stream": 1,
        }
    ledger(f"verification of {num_drafts} drafts each of 2 sequences in a graph of {size}, {NUM_LAYERS} layers", counts)


def test_rows_of_one_sequence_see_those_before_them() -> None:
    """Apart in a graph, where each is a sequence with a length of its own, and in one chunk, eagerly; across blocks."""
    captured, eager = capturing(8), runner("npu")
    talks = [Talk(5, 126), Talk(5, 126)]
    captured.run(talks[0].prefill())
    eager.run(talks[1].prefill())
    for _ in range(3):
        rows = captured.run([*apart(talks[0], 0, 3), *apart(talks[0], 1, 3)], 8).clone()
        together = eager.run([talks[1].chunk(row, 4)._replace(num_logits=4) for row in (0, 1)])
        np.testing.assert_allclose(rows.cpu().numpy(), together.cpu().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_graph", [False, True])
def test_the_most_drafts_are_within_the_operators_limits(in_graph: bool) -> None:
    """In bfloat16, every call held against the documentation, as one chunk and with rows apart."""
    talk = Talk(120)
    if in_graph:
        subject = capturing(16, "bfloat16", check_ops=True)
    else:
        subject = engine("npu", "bfloat16", check_ops=True)._runner(ROOMY)
    subject.run(talk.prefill())
    for _ in range(2):
        row = Row(Sampling(), RequestId(0), 0, [1] * MOST_DRAFTS)
        if in_graph:
            assert subject.draw(apart(talk, 0, MOST_DRAFTS), [row], 1 + MOST_DRAFTS)
        else:
            whole = talk.chunk(0, 1 + MOST_DRAFTS)._replace(num_logits=1 + MOST_DRAFTS)
            assert subject.draw([whole], [row])
