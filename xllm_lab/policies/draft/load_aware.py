"""Drafts while the machine has rows to spare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Choice, Knob, refuse_below
from xllm_lab.policies.draft import Depth, DraftPlan, DraftView, Method, Room, drafting_key, refuse_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAware:
    """Everybody drafts as much, less the more there are, and nobody above a load; what comes of it does not matter.

    A small step waits for weights to be read, and further rows ride for nothing; in a large one each costs its work.

    Attributes:
        max_verify_tokens: drafts fill the step up to so many tokens, prompts' included, in equal shares; what is left
            of that goes to those who came first.
        max_decoding_seqs: nobody drafts while more requests decode.
        drafts_while_waiting: drafts are made while requests wait, too: for KV or a place in the batch.
    """

    decides: ClassVar[str] = "draft"

    method: Method = "ngram"
    num_speculative_tokens: Depth = 4
    max_verify_tokens: Annotated[int, Knob(4, 1024, log=True)] = 64
    max_decoding_seqs: Annotated[int, Knob(1, 256, log=True)] = 32
    drafts_while_waiting: Annotated[bool, Choice(False, True)] = False

    def __post_init__(self) -> None:
        refuse_unknown(self.method)
        refuse_below(1, num_speculative_tokens=self.num_speculative_tokens)
        refuse_below(0, max_verify_tokens=self.max_verify_tokens, max_decoding_seqs=self.max_decoding_seqs)

    def decide(self, view: DraftView) -> DraftPlan:
        room = Room(view)
        if self.method not in view.methods:
            return room.plan("the host drafts otherwise")
        if view.num_waiting and not self.drafts_while_waiting:
            return room.plan("requests wait")
        if not view.decoding or len(view.decoding) > self.max_decoding_seqs:
            return room.plan("too many decode" if view.decoding else "nobody decodes")
        share, rest = divmod(max(0, self.max_verify_tokens - view.num_tokens), len(view.decoding))
        for rank, request in enumerate(sorted(view.decoding, key=drafting_key)):
            room.grant(request, self.method, min(self.num_speculative_tokens, share + (rank < rest)))
        return room.plan("rows to spare" if room.tokens_left < view.tokens_left else "no rows to spare")
