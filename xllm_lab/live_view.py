"""What a batch policy sees of a scheduler: its live objects, not copies of them."""

from __future__ import annotations

from collections.abc import Mapping

from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import StepTimeView, admission_key
from xllm_lab.policies.ordered import ByAdmission, ByArrival
from xllm_lab.request_state import RequestState
from xllm_lab.workload import RequestId


class LiveView:
    """A `BatchView` over live objects, the same one for every decision: what it shows moves on with the scheduler."""

    __slots__ = (
        "_live",
        "block_size",
        "decoding",
        "draining",
        "loading",
        "max_seqs_per_batch",
        "max_tokens_per_batch",
        "now_us",
        "num_blocks",
        "num_decode_blocks",
        "num_free_blocks",
        "prefilling",
        "step_time",
        "waiting",
    )

    def __init__(
        self, config: InstanceConfig, live: Mapping[RequestId, RequestState], step_time: StepTimeView | None
    ) -> None:
        self._live = live
        self.now_us = self.num_free_blocks = self.num_decode_blocks = 0
        self.block_size = config.block_size
        self.num_blocks = config.num_kv_blocks
        self.max_tokens_per_batch = config.max_tokens_per_batch
        self.max_seqs_per_batch = config.max_seqs_per_batch
        self.decoding: ByAdmission[RequestState] = ByAdmission()
        self.prefilling: ByAdmission[RequestState] = ByAdmission()
        self.draining: ByAdmission[RequestState] = ByAdmission()
        self.waiting: ByArrival[RequestState] = ByArrival()
        self.loading: ByArrival[RequestState] = ByArrival()  # nobody's to plan for
        self.step_time = step_time

    @property
    def running(self) -> ByAdmission[RequestState]:
        return ByAdmission(sorted((*self.decoding, *self.prefilling), key=admission_key))

    def find(self, request: RequestId) -> RequestState | None:
        state = self._live.get(request)
        return None if state is None or state.is_draining or state.queue is self.loading else state
