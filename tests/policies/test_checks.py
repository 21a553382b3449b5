"""What a batch plan must obey where it decodes everything; and that this is only a short way to say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xllm_lab.contract import NUM_VIEWS
from xllm_lab.drawn_views import DrawnRequest, DrawnView, drawn_view
from xllm_lab.policies.api import BatchPlan, RequestId, blocks_to_take, by_admission, is_decoding
from xllm_lab.policies.checks import batch_violations


def running(request_id: int, *, prompt: int, known: int, computed: int) -> DrawnRequest:
    num_blocks = -(-computed // 4)
    return DrawnRequest(
        id=RequestId(request_id),
        arrival_us=0,
        priority=2,
        ttft_slo_us=None,
        tpot_slo_us=None,
        num_prompt_tokens=prompt,
        num_tokens=known,
        num_computed_tokens=computed,
        num_blocks=num_blocks,
        is_running=True,
        num_private_blocks=num_blocks,
        first_token_us=None,
        num_preemptions=0,
    )


def scene(**changes: Any) -> DrawnView:
    """0 and 1 decode, the last block of 0 is full; the prompt of 2 is being computed."""
    usual: dict[str, Any] = {
        "number": 0,
        "now_us": 0,
        "block_size": 4,
        "num_blocks": 8,
        "num_free_blocks": 3,
        "max_tokens_per_batch": 16,
        "max_seqs_per_batch": 4,
        "running": [
            running(0, prompt=6, known=9, computed=8),
            running(1, prompt=4, known=6, computed=5),
            running(2, prompt=9, known=9, computed=1),
        ],
    }
    return DrawnView(**{**usual, **changes})


def plan(tokens: dict[int, int] | None = None, *preempt: int, decode_all: bool = True, holds_for: int = 0) -> BatchPlan:
    return BatchPlan(
        tokens={RequestId(i): n for i, n in (tokens or {}).items()},
        decode_all=decode_all,
        preempt=tuple(map(RequestId, preempt)),
        holds_for=holds_for,
        reason="as told",
    )


@pytest.mark.parametrize(
    "legal", [plan(), plan({2: 8}), plan({}, 2), plan(holds_for=7), plan({2: 2}, holds_for=2)], ids=str
)
def test_decoding_everything_is_legal_beside_prompts_and_preempted_prompts(legal: BatchPlan) -> None:
    """And alone for as long as the policy likes, beside a prompt's chunks up to the one before its last."""
    assert batch_violations(scene(), legal) == []


@pytest.mark.parametrize(
    ("illegal", "sentence"),
    [
        (plan({0: 1}), "schedules request 0 twice, it is decoding"),
        (plan({2: 1, 1: 1}), "schedules request 1 twice, it is decoding"),
        (plan({}, 1), "both preempts and schedules request 1"),
        (plan({2: 1}, 2), "both preempts and schedules request 2"),
        (plan({2: 2}, holds_for=3), "holds for 3 more steps, only a plan that just decodes everything may"),
        (plan({}, 2, holds_for=3), "holds for 3 more steps, only a plan that just decodes everything may"),
        (plan({0: 1}, decode_all=False, holds_for=1), "holds for 1 more steps, only a plan that just decodes every"),
        (plan(decode_all=False, holds_for=1), "holds for 1 more steps, only a plan that just decodes everything may"),
    ],
)
def test_decoding_everything_leaves_nothing_else_to_say_of_who_decodes(illegal: BatchPlan, sentence: str) -> None:
    """Nobody is scheduled twice, or scheduled and preempted; and only repetition can be foreseen."""
    (broken,) = batch_violations(scene(), illegal)
    assert broken.startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_tokens_per_batch": 1}, "takes 2 tokens, 1 are left"),
        ({"max_seqs_per_batch": 1}, "takes 2 sequences, 1 are left"),
        ({"num_free_blocks": 0}, "takes 1 KV blocks, 0 are left"),
    ],
)
def test_decoding_everything_is_paid_for(changes: dict[str, int], sentence: str) -> None:
    """With a token and a sequence each, and a block of whoever's last one is full."""
    assert batch_violations(scene(**changes), plan()) == [sentence]


def test_what_a_preemption_frees_may_be_decoded_into() -> None:
    """The prompt that is being computed gives its block to the decoding request that needs one."""
    assert batch_violations(scene(num_free_blocks=0), plan({}, 2)) == []


def test_a_view_divides_who_runs_into_who_decodes_and_who_does_not() -> None:
    """Of any view: nobody is in both or in neither, and the blocks that decoding takes add up."""
    for number in range(NUM_VIEWS):
        view = drawn_view(number)
        parts = [*view.decoding, *view.prefilling]
        assert sorted(r.id for r in parts) == sorted(r.id for r in view.running)
        assert [is_decoding(r) for r in parts] == [True] * len(view.decoding) + [False] * len(view.prefilling)
        assert view.num_decode_blocks == sum(blocks_to_take(view, r, 1) for r in view.decoding)


def test_decoding_everything_means_what_it_spells_out() -> None:
    """Of any view: `decode_all` is legal exactly if one token for each decoding request is, and costs the same."""
    verdicts: set[bool] = set()
    for number in range(NUM_VIEWS):
        view = drawn_view(number)
        prompts = {r.id: 1 for r in view.prefilling}
        short = BatchPlan(tokens=prompts, decode_all=True, reason="")
        spelled_out = replace(
            short, tokens={**{r.id: 1 for r in by_admission(view.decoding)}, **prompts}, decode_all=False
        )
        assert batch_violations(view, short) == batch_violations(view, spelled_out)
        verdicts.add(not batch_violations(view, short))
    assert verdicts == {True, False}
