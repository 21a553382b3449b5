"""Simulated runs that are held to the laws as they end: a second recorder listens to whatever a test simulates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.laws import (
    every_request_ends_as_it_should,
    every_request_has_one_record,
    fleet_obeys_the_laws,
    obey_the_laws,
)
from xllm_lab.copies import CopyRecord
from xllm_lab.expert_records import ExpertLoadRecord, ExpertsRecord
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Recorder, Records, RequestRecord
from xllm_lab.sim.fleet import Fleet
from xllm_lab.step import Step
from xllm_lab.step_shape import Shapes
from xllm_lab.workload import Workload

# Steps times requests: the laws look at every request in every step, which in larger runs takes longer than the run.
MOST_LOOKS = 20_000


class Listening:
    """A recorder that keeps what it passes on. Requests are copied: a fleet may write to them again."""

    def __init__(self, recorder: Recorder) -> None:
        self.heard = Records()
        self._recorder = recorder

    def span(self, span: Step) -> None:
        self.heard.span(span)
        self._recorder.span(span)

    def request(self, record: RequestRecord) -> None:
        self.heard.request(replace(record))
        self._recorder.request(record)

    def copy(self, record: CopyRecord) -> None:
        self.heard.copy(record)  # the very one: its end is filled in
        self._recorder.copy(record)

    def experts(self, record: ExpertsRecord) -> None:
        self.heard.experts(record)
        self._recorder.experts(record)

    def expert_load(self, record: ExpertLoadRecord) -> None:
        self.heard.expert_load(record)
        self._recorder.expert_load(record)

    @property
    def is_long(self) -> bool:
        return sum(len(span.ends_us) for span in self.heard.spans) * len(self.heard.requests) > MOST_LOOKS


def watched_alone(original: Callable[..., Shapes | None]) -> Callable[..., Shapes | None]:
    """`serve_alone`, and the laws when it is over."""

    def serve_alone(
        work: Workload, config: InstanceConfig, policies: Policies, timing: Any, *, recorder: Recorder, **others: Any
    ) -> Shapes | None:
        listening = Listening(recorder)
        shapes = original(work, config, policies, timing, recorder=listening, **others)
        if listening.is_long:
            every_request_has_one_record(work, listening.heard)
            every_request_ends_as_it_should(work, config, listening.heard)
        else:
            obey_the_laws(work, config, listening.heard.sort(), vocab_size=others["vocab_size"])
        return shapes

    return serve_alone


def watched_fleets(patch: pytest.MonkeyPatch, cls: type[Fleet]) -> None:
    """The same for fleets."""
    begin, run = cls.__init__, cls.run
    listening: dict[int, tuple[Listening, Workload, FleetConfig, InstanceConfig, int]] = {}

    def watched_begin(
        self: Fleet, work: Workload, fleet: FleetConfig, config: InstanceConfig, *args: Any, **others: Any
    ) -> None:
        heard = Listening(others.pop("recorder"))
        listening[id(self)] = (heard, work, fleet, config, others["vocab_size"])
        begin(self, work, fleet, config, *args, recorder=heard, **others)

    def watched_run(self: Fleet) -> None:
        heard, work, fleet, config, vocab_size = listening.pop(id(self))
        run(self)
        if heard.is_long:
            every_request_has_one_record(work, heard.heard)
        else:
            fleet_obeys_the_laws(work, fleet, config, heard.heard.sort(), vocab_size=vocab_size)

    patch.setattr(cls, "__init__", watched_begin)
    patch.setattr(cls, "run", watched_run)
