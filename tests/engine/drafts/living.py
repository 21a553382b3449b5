"""Live requests that ask for drafts, without a scheduler: tokens are whatever a test says was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xllm_lab.drafting import Asked
from xllm_lab.ledger import Ledger
from xllm_lab.request_state import RequestState, new_record
from xllm_lab.workload import Prompt, Request, RequestId, Sampling

GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0)


class Live:
    """A request whose blocks come from a ledger; tokens that it has computed are shared there."""

    def __init__(self, id: int, prompt: Sequence[int], ledger: Ledger, sampling: Sampling = GREEDY) -> None:
        request = Request(
            id=RequestId(id),
            arrival_us=0,
            prompt=Prompt(num_tokens=len(prompt), token_ids=tuple(prompt)),
            output_tokens=1000,
            sampling=sampling,
        )
        self.state = RequestState(request, np.array(prompt, np.int32), ledger, new_record(request))
        self._ledger = ledger

    @property
    def id(self) -> RequestId:
        return self.state.id

    @property
    def tokens(self) -> list[int]:
        """All that are known."""
        tokens: list[int] = self.state.token_ids(0, self.state.num_tokens).tolist()
        return tokens

    @property
    def table(self) -> Sequence[int]:
        return self._ledger.block_table(self.id)

    def admit(self) -> int:
        """It gets blocks; returns how many tokens are in them already."""
        return len(self._ledger.attach(self.id, self.state.reusable_keys())) * self._ledger.block_size

    def draw(self, tokens: Sequence[int]) -> None:
        """The target drew these."""
        self.state.record.output_token_ids.extend(tokens)
        self.state.record.token_times_us.extend([0] * len(tokens))
        self.state.recount()

    def publish(self) -> None:
        """All tokens but the last are in the target's KV: full blocks are for everybody."""
        self._ledger.grow(self.id, self.state.num_tokens)
        self._ledger.publish(self.id, 0, self.state.reusable_keys())

    def leave(self) -> None:
        self._ledger.release(self.id)

    def ask(self, method: str, depth: int) -> Asked:
        self._ledger.grow(self.id, self.state.num_tokens + depth)
        return Asked(self.state, method, depth, self.table)


def tell_logits(logits_V: Tensor, sampling: Sampling, id: RequestId, position: int) -> tuple[int, Tensor]:
    """A `Draw` that takes the largest logit and tells all of them as if they were probabilities."""
    return int(logits_V.argmax()), logits_V.clone()


def random_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    tokens: list[int] = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
