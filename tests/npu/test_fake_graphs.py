"""Capture, replay and task updates of `torch.npu.NPUGraph` on the fake: what a decode graph rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_npu

from tests.fake_cann import control, operators
from tests.fake_cann.pytest_plugin import Ledger


def attend(query: Any, *_: Any, actual_seq_lengths_kv: list[int], **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in whose result shows the lengths it was launched with: what these tests are about."""
    lengths = torch.tensor(actual_seq_lengths_kv, dtype=query.dtype)
    return query * lengths.view(-1, 1, 1), torch.zeros(0, dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _attention() -> None:
    operators.install({"npu_fused_infer_attention_score": attend})


def test_a_replay_reads_its_buffers_as_they_are_then() -> None:
    given = torch.zeros(8, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = given * 2 + 1
    for value in (0.0, 3.0, -5.0):
        given.fill_(value)
        graph.replay()
        assert out.tolist() == [value * 2 + 1] * 8


def test_capture_runs_nothing_and_its_results_are_poison_until_the_replay() -> None:
    given = torch.ones(8, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        given.add_(1)
        out = given * 2
    assert given.tolist() == [1.0] * 8
    assert out.isnan().all()
    graph.replay()
    assert given.tolist() == [2.0] * 8
    assert out.tolist() == [4.0] * 8


def test_a_replay_is_one_call_and_nothing_else(ledger: Ledger) -> None:
    given = torch.ones(64, 64, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        hidden = given
        for _ in range(4):
            hidden = torch.softmax(hidden @ given, -1)
    with control.counting() as counts:
        graph.replay()
    assert counts.calls() == {"replay": 1}
    ledger("replay of a graph of 8 kernels", counts)


def test_graphs_of_one_pool_share_memory() -> None:
    pool = torch.npu.graph_pool_handle()
    given = torch.ones(1 << 20, device="npu")
    graphs = []
    held = []
    for _ in range(3):
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph, pool=pool):
            temporary = given * 2
            held.append(temporary.sum())
            del temporary
        graphs.append(graph)
        if len(graphs) == 1:
            torch.npu.synchronize()
            after_first = torch.npu.memory_reserved()
    assert torch.npu.memory_reserved() == after_first
    for graph, total in zip(graphs, held, strict=True):
        graph.replay()
        assert total.item() == 2 << 20


def two_lanes(*, join: bool, fork: bool = True) -> tuple[torch.npu.NPUGraph, torch.Tensor, torch.Tensor]:
    """A graph with a side stream: (given + 1) on the side, doubled on the main one."""
    given = torch.zeros(100, device="npu")
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        values = given + 0
        if fork:
            side.wait_stream(main)
        with torch.npu.stream(side):
            values.add_(1)
        if join:
            main.wait_stream(side)
        out = values * 2
        if not join:
            out.add_(0)
            main.wait_stream(side)
    return graph, given, out


@pytest.mark.parametrize("order", control.ORDERS)
def test_a_side_stream_in_a_graph_is_ordered_by_its_events(order: control.Order) -> None:
    graph, given, out = two_lanes(join=True)
    for seed in range(8):
        with control.order(order, seed=seed, max_delay_us=500):
            given.fill_(seed)
            graph.replay()
            assert out[0].item() == 2 * (seed + 1)


def test_a_join_after_the_use_goes_wrong_in_a_replay() -> None:
    """The control: the wait is there, one line too late."""
    graph, given, out = two_lanes(join=False)
    found = set()
    for seed in range(20):
        with control.order("shuffled", seed=seed):
            given.fill_(0)
            torch.npu.synchronize()
            for _ in range(3):
                graph.replay()
                found.add(out[0].item())
    assert found == {0.0, 2.0}


def test_a_captured_stream_must_be_joined() -> None:
    side = torch.npu.Stream()
    values = torch.zeros(10, device="npu")
    capture = torch.npu.graph(torch.npu.NPUGraph())
    capture.__enter__()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        values.add_(1)
    with pytest.raises(RuntimeError, match="107025"):
        capture.__exit__(None, None, None)


FORBIDDEN: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "item": ("107030", lambda values: values[0].item()),
    "bool": ("107030", lambda values: bool(values[0] > 0)),
    "tolist": ("107030", lambda values: values.tolist()),
    "cpu": ("107030", lambda values: values.cpu()),
    "to the device": ("107030", lambda values: values.copy_(torch.ones(8))),
    "synchronise stream": ("107030", lambda values: torch.npu.current_stream().synchronize()),
    "synchronise device": ("107030", lambda values: torch.npu.synchronize()),
    "pageable copy": ("107041", lambda values: values.copy_(torch.ones(8), non_blocking=True)),
    "nonzero": ("107030", torch.nonzero),
    "boolean mask": ("107030", lambda values: values[values > 0]),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_waits_for_the_device_cannot_be_captured(name: str) -> None:
    error, act = FORBIDDEN[name]
    values = torch.ones(8, device="npu")
    raised = ""
    try:
        with torch.npu.graph(torch.npu.NPUGraph()):
            values = values * 2
            try:
                act(values)
            except RuntimeError as failure:
                raised = str(failure)
                raise
    except RuntimeError:
        pass
    assert error in raised
    assert (torch.ones(8, device="npu") * 2).tolist() == [2.0] * 8  # and the device goes on


def test_a_pinned_copy_can_be_captured() -> None:
    host = torch.zeros(8).pin_memory()
    given = torch.zeros(8, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        given.copy_(host, non_blocking=True)
        out = given + 1
    host.fill_(6)
    graph.replay()
    assert out.tolist() == [7.0] * 8


# Task groups ----------------------------------------------------------------------------------------------------------
@dataclass
class DecodeGraph:
    """One attention in a task group, which waits for its update and then runs with the new lengths."""

    graph: torch.npu.NPUGraph
    query: torch.Tensor
    out: torch.Tensor
    handle: Any
    updated: torch.npu.ExternalEvent
    side: torch.npu.Stream
    launch: Callable[[list[int]], None]

    def update(self, lengths: list[int]) -> None:
        with torch.npu.stream(self.side):
            torch.npu.graph_task_update_begin(self.side, self.handle)
            self.launch(lengths)
            torch.npu.graph_task_update_end(self.side)
            self.updated.record(self.side)

    def step(self, lengths: list[int], *, update_first: bool = False) -> None:
        if update_first:
            self.update(lengths)
        self.graph.replay()
        if not update_first:
            self.update(lengths)


def decode_graph(*, wait: bool = True) -> DecodeGraph:
    query = torch.ones(2, 4, 16, device="npu", dtype=torch.float16)
    cache = torch.zeros(8, 128, 32, device="npu", dtype=torch.float16)
    table = torch.zeros(2, 4, device="npu", dtype=torch.int32)
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu")
    attention = [torch.empty_like(query), torch.empty(0, device="npu")]
    workspace = torch.empty(1024, dtype=torch.uint8, device="npu")
    inner = torch.empty_like(query)
    updated = torch.npu.ExternalEvent()
    updated.record()  # torch_npu 2.13 makes the event at its first record; a wait before that is dropped
    updated.reset()
    side = torch.npu.Stream()

    def launch(lengths: list[int]) -> None:
        torch_npu.npu_fused_infer_attention_score.out(
            inner, cache, cache, actual_seq_lengths=[1, 2], actual_seq_lengths_kv=lengths, block_table=table,
            num_heads=4, num_key_value_heads=2, input_layout="TND", scale=0.25, block_size=128, sparse_mode=3,
            atten_mask=mask, workspace=workspace, out=attention,
        )  # fmt: skip

    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        inner.copy_(query)
        if wait:
            updated.wait(stream)
            updated.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        launch([7, 7])
        handle = torch.npu.graph_task_group_end(stream)
        out = attention[0] + 0
    return DecodeGraph(graph, query, out, handle, updated, side, launch)


@pytest.mark.parametrize("order", control.ORDERS)
@pytest.mark.parametrize("update_first", [True, False])
def test_each_replay_runs_with_the_lengths_of_its_update(order: control.Order, update_first: bool) -> None:
    decode = decode_graph()
    for seed in range(6):
        with control.order(order, seed=seed, max_delay_us=500):
            for lengths in ([3, 4], [100, 129], [seed, 1]):
                decode.step(lengths, update_first=update_first)
                assert decode.out[:, 0, 0].tolist() == lengths


def test_a_replay_that_does_not_wait_for_its_update_runs_with_old_lengths() -> None:
    """The control: without the external event some replay overtakes its update."""
    decode = decode_graph(wait=False)
    wrong = 0
    for seed in range(10):
        with control.order("shuffled", seed=seed):
            for lengths in ([3 + seed, 4], [100 + seed, 129]):
                decode.step(lengths)
                wrong += decode.out[:, 0, 0].tolist() != lengths
    assert 0 < wrong < 20


def test_a_replay_without_update_keeps_the_captured_lengths() -> None:
    decode = decode_graph(wait=False)
    decode.graph.replay()
    assert decode.out[:, 0, 0].tolist() == [7, 7]


def test_a_decode_step_costs_one_replay_and_one_update(ledger: Ledger) -> None:
    decode = decode_graph()
    decode.step([1, 2])
    with control.counting() as counts:
        decode.step([3, 4])
    assert counts.calls() == {
        "launch:npu::npu_fused_infer_attention_score.out": 1,
        "record_event": 1,
        "replay": 1,
        "task_update_begin": 1,
        "task_update_end": 1,
    }
    ledger("decode step: replay, update, event", counts)


def test_a_replay_whose_event_nobody_records_is_a_timeout_and_not_a_hang() -> None:
    decode = decode_graph()
    control.set_timeout_ms(300)
    decode.graph.replay()
    with pytest.raises(RuntimeError, match="507046"):
        torch.npu.synchronize()
    decode.update([1, 2])
    torch.npu.synchronize()
    assert decode.out[:, 0, 0].tolist() == [1, 2]


def test_torch_npu_drops_a_wait_for_an_external_event_that_was_never_recorded() -> None:
    """A property of the 2.13.0 wheel, which decode graphs must work around (see `decode_graph`)."""
    event = torch.npu.ExternalEvent()
    graph = torch.npu.NPUGraph()
    with control.counting() as counts, torch.npu.graph(graph):
        event.wait(torch.npu.current_stream())
    assert counts["wait_event"].calls == 0


def test_an_update_must_launch_what_the_group_holds() -> None:
    decode = decode_graph()
    torch.npu.graph_task_update_begin(decode.side, decode.handle)
    with torch.npu.stream(decode.side):
        decode.query.add_(1)
    with pytest.raises(RuntimeError, match="107040"):
        torch.npu.graph_task_update_end(decode.side)


def test_an_empty_update_is_an_error() -> None:
    decode = decode_graph()
    torch.npu.graph_task_update_begin(decode.side, decode.handle)
    with pytest.raises(RuntimeError, match="107040"):
        torch.npu.graph_task_update_end(decode.side)
