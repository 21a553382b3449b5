"""A measured step, wherever it was measured: an engine run's record, or a row of a profiler's per-step trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xllm_lab.copies import CopyRecord
from xllm_lab.copy_time import Copied
from xllm_lab.draft_time import Drafted, draft_loads
from xllm_lab.errors import ConfigError
from xllm_lab.page_time import Mapped
from xllm_lab.records import StepRecord, page_runs
from xllm_lab.step_time import Chunk, features


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """What one step computed, and how long the device took for it.

    Attributes:
        chunks: per sequence, in packing order: tokens computed in the step, tokens in KV before it.
        num_logits: rows the model's head was asked for; traces that do not tell have one per sequence.
        step_us: measured time, integer or not: a profiler's clock is finer than a record's. The device's, if the
            host's is told apart.
        graph_tokens: size of the captured graph that ran it; None: it ran eagerly, or nobody knows.
        host_us: what the host took to plan it and prepare its inputs; None if that is part of `step_us`.
    """

    chunks: tuple[Chunk, ...]
    num_logits: int
    step_us: float
    host_us: float | None = None
    graph_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.step_us < float("inf"):
            raise ConfigError(f"a step lasts {self.step_us} us, a finite time above 0 is accepted")
        if not self.chunks:
            raise ConfigError(f"a step of {self.step_us} us has no chunks, at least one is accepted")
        for chunk in self.chunks:
            if chunk.num_tokens < 1 or chunk.num_computed_tokens < 0:
                raise ConfigError(f"{chunk} in a step; at least 1 token, and at least 0 before it are accepted")
        if self.host_us is not None and not 0 <= self.host_us < float("inf"):
            raise ConfigError(f"host_us of a step is {self.host_us}, a finite time of at least 0 is accepted")
        if self.num_logits < 0:
            raise ConfigError(f"num_logits of a step is {self.num_logits}, at least 0 is accepted")

    def features(self) -> list[float]:
        """The factors of `step_time.TERMS`."""
        return features(self.chunks, self.num_logits, self.graph_tokens)


def samples(steps: Iterable[StepRecord]) -> Iterator[StepSample]:
    """The recorded steps of a run as samples, without the time of drafting and of mapping, which is the host's."""
    for s in steps:
        chunks = tuple(map(Chunk, s.num_tokens, s.num_computed_tokens))
        aside_us = (s.draft_us or 0) + (s.map_us or 0)
        host_us = None if s.host_us is None else max(0, s.host_us - aside_us)
        step_us = max(1, s.step_us - aside_us if s.device_us is None else s.device_us)
        yield StepSample(
            chunks=chunks, num_logits=s.num_logits, step_us=step_us, host_us=host_us, graph_tokens=s.graph_tokens
        )


def mapped(steps: Iterable[StepRecord]) -> Iterator[Mapped]:
    """What the steps of a run mapped and unmapped, where that was timed."""
    for s in steps:
        if s.page_maps and s.map_us is not None:
            yield Mapped(page_runs(s.page_maps), (), s.map_us)
        if (s.page_maps_ahead or s.page_unmaps) and s.beside_us is not None:
            yield Mapped(page_runs(s.page_maps_ahead), page_runs(s.page_unmaps), s.beside_us)


def drafted(steps: Iterable[StepRecord]) -> Iterator[Drafted]:
    """What the steps of a run drafted, where that was timed."""
    for s in steps:
        if s.draft_ids and s.draft_us is not None:
            yield Drafted(draft_loads(zip(s.draft_methods, s.num_asked, strict=True)), s.draft_us)


def copied(copies: Iterable[CopyRecord]) -> Iterator[Copied]:
    """What the copies of a run took, from when they were asked for or the one of their kind before was done."""
    free_us: dict[tuple[int, str], int] = {}
    for c in sorted(copies, key=lambda c: (c.instance, c.copy)):
        if c.end_us is not None and c.num_moved_tokens is not None:
            began_us = max(c.asked_us, free_us.get((c.instance, c.kind), 0))
            free_us[c.instance, c.kind] = c.end_us
            yield Copied(c.kind, c.num_moved_tokens, c.end_us - began_us)
