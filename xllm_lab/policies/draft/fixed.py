"""As many drafts for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xllm_lab.policies.api import refuse_below
from xllm_lab.policies.draft import Depth, DraftPlan, DraftView, Method, Room, drafting_key, refuse_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Everybody drafts as much, whatever comes of it, by order of arrival as far as the step has room.

    What xLLM and vLLM do unless they are asked for more.
    """

    decides: ClassVar[str] = "draft"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {}

    method: Method = "ngram"
    num_speculative_tokens: Depth = 3

    def __post_init__(self) -> None:
        refuse_unknown(self.method)
        refuse_below(1, num_speculative_tokens=self.num_speculative_tokens)

    def decide(self, view: DraftView) -> DraftPlan:
        room = Room(view)
        if self.method not in view.methods:
            return room.plan("the host drafts otherwise")
        for request in sorted(view.decoding, key=drafting_key):
            room.grant(request, self.method, self.num_speculative_tokens)
        return room.plan("everybody drafts")
