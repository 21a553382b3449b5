"""What a scheduler tells a proposer of a request, and the text of random ones, which repeat themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from xllm_lab.drafting import Asked
from xllm_lab.ledger import Ledger
from xllm_lab.request_state import RequestState, new_record
from xllm_lab.workload import Prompt, Request, RequestId

LEDGER = Ledger(1, 16, enable_prefix_cache=False)


def ask(number: int, prompt: Sequence[int], output: Sequence[int], depth: int, method: str = "ngram") -> Asked:
    """A request that has told `output` and wants drafts."""
    request = Request(
        id=RequestId(number), arrival_us=0, prompt=Prompt(num_tokens=len(prompt)), output_tokens=len(output) + 1
    )
    record = new_record(request)
    record.token_times_us = array("q", range(1, len(output) + 1))
    record.output_token_ids = array("i", output)
    state = RequestState(request, np.array(prompt, dtype=np.int32), LEDGER, record)
    return Asked(state, method, depth, ())


def texts(min_size: int = 1, max_size: int = 30) -> st.SearchStrategy[list[int]]:
    """Few different tokens, so that runs repeat; and one run over and over, as small models write."""
    loop = st.builds(
        lambda run, times: (run * times)[:max_size],
        st.lists(st.integers(0, 3), min_size=min_size, max_size=max(min_size, 5)),
        st.integers(1, 10),
    )
    return st.one_of(st.lists(st.integers(0, 3), min_size=min_size, max_size=max_size), loop)
