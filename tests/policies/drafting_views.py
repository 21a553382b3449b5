"""Planned steps written down by hand, for tests of draft policies."""

from __future__ import annotations

from typing import Any

from xllm_lab.drawn_draft_views import DrawnDecoding, DrawnDraftView, DrawnTimes
from xllm_lab.policies.api import RequestId
from xllm_lab.policies.draft import Tally


def request(request_id: int, *, tally: Tally | None = None, **changes: Any) -> DrawnDecoding:
    """A request of 101 known tokens, with counts of prompt lookup."""
    usual: dict[str, Any] = {
        "id": RequestId(request_id),
        "arrival_us": request_id,
        "priority": 2,
        "tpot_slo_us": None,
        "num_prompt_tokens": 50,
        "num_tokens": 101,
        "most_drafts": 15,
        "tallies": {} if tally is None else {"ngram": tally},
    }
    return DrawnDecoding(**{**usual, **changes})


def times(**changes: Any) -> DrawnTimes:
    """A step of one millisecond, a row of a tenth of that, and drafts for nothing."""
    usual = {"step_us": 1000.0, "token_us": 100.0, "kv_read_us": 0.0, "cheap_rows": 0, "call_us": 0.0, "depth_us": 0.0}
    return DrawnTimes(**{**usual, **changes})


def step(*requests: DrawnDecoding, tally: Tally | None = None, **changes: Any) -> DrawnDraftView:
    """They decode, alone, by prompt lookup if at all, with room for everything."""
    usual: dict[str, Any] = {
        "number": 0,
        "now_us": 0,
        "decoding": list(requests),
        "num_tokens": len(requests),
        "num_waiting": 0,
        "tokens_left": 1000,
        "blocks_left": 100,
        "block_size": 16,
        "methods": ["ngram"],
        "times": times(),
        "tallies": {} if tally is None else {"ngram": tally},
    }
    return DrawnDraftView(**{**usual, **changes})


def kept(drafted: int, *accepted: int) -> Tally:
    """At each position as many drafts, and so many kept."""
    return Tally((drafted,) * len(accepted), accepted)
