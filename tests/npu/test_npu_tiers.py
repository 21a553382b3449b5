"""KV tiers on the fake NPU: copies on streams of their own, the same tokens in whatever order streams run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.drafts.living import random_tokens
from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import NUM_LAYERS, WHERE, engine, install_operators, let_float32_through
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.copies import Copy
from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.copies import EngineCopies
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Workload

TIGHT = 6


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


def sessions() -> Workload:
    """Four conversations of one, two and then three blocks, in turns."""
    requests = []
    for i in range(12):
        tokens = tuple(random_tokens(380, VOCAB_SIZE, seed=i % 4)[: 130 + 120 * (i // 4)])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=20_000 * i, prompt=prompt, output_tokens=4))
    return Workload(requests=tuple(requests))


def served(device: str, shapes: str = "eager", *, tiers: bool = True, **changes: Any) -> tuple[list[list[int]], int]:
    """Output tokens, and tokens whose KV was restored."""
    records = Records()
    policies = Policies(make_policy("batch", "decode-first"), shapes=make_policy("shapes", shapes))
    where = replace(WHERE, **changes)
    engine(device).serve(sessions(), where, replace(policies, cache=Lru()) if tiers else policies, records)
    tokens = [r.output_token_ids.tolist() for r in sorted(records.requests, key=lambda r: r.id)]
    return tokens, sum(c.num_tokens for c in records.copies if c.kind == "restore")


@functools.cache
def plain() -> list[list[int]]:
    return served("cpu", tiers=False)[0]


@pytest.mark.parametrize("changes", [{}, {"async_scheduling": "on"}, {"async_scheduling": "length_aware"}], ids=str)
@pytest.mark.parametrize("order", [("shuffled", 1), ("shuffled", 2), ("threads", 5)], ids=str)
def test_the_tokens_are_the_same_in_any_order(order: tuple[control.Order, int], changes: dict[str, Any]) -> None:
    name, seed = order
    with control.order(name, seed=seed, max_delay_us=200):
        tokens, restored = served("npu", num_kv_blocks=TIGHT, **changes)
    assert tokens == plain()
    assert restored > 0


def test_the_tokens_are_the_same_beside_graphs() -> None:
    with control.order("shuffled", seed=4):
        tokens, restored = served("npu", "xllm-buckets", num_kv_blocks=TIGHT)
    assert tokens == plain()
    assert restored > 0


@pytest.mark.parametrize("kind", ["offload", "restore"])
def test_what_a_copy_asks_of_the_device(kind: Any, ledger: Ledger) -> None:
    """One asynchronous copy of the keys and one of the values of each layer, for each run of blocks; one event, for
    which the copy's own thread waits. No memory, and nobody waits for the device."""
    host = engine("npu")
    runner = host.runner(WHERE)
    copies = EngineCopies(8)
    way = "d2h" if kind == "offload" else "h2d"
    clock = make_clock("virtual", "wall")
    with copies.open(clock, runner.kv, host.device):
        assert all(x.is_pinned() for layer in copies.pool.layers for x in layer)
        copies.launch(Copy(0, kind, None, (0,), (0,), (), 0))  # the first of a thread may set it up
        copies.rest(None, clock.wait_until)
        with control.counting() as counts:
            copies.launch(Copy(1, kind, None, (3, 4, 5, 9), (0, 1, 2, 3), (), 0))
            copies.rest(None, clock.wait_until)
    assert counts.calls() == {f"memcpy_async:{way}": 2 * 2 * NUM_LAYERS, "record_event": 1, "synchronize_event": 1}
    ledger(f"{kind} of four blocks in two runs, {NUM_LAYERS} layers", counts)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_come_back_as_they_went(seed: int) -> None:
    """A copy is told of when its bytes are there, whatever other streams do."""
    host = engine("npu")
    runner = host.runner(WHERE)
    copies, clock = EngineCopies(8), make_clock("virtual", "wall")
    with control.order("shuffled", seed=seed), copies.open(clock, runner.kv, host.device):
        for layer, kv in enumerate(runner.kv):
            for x in kv:
                x[2].fill_(1.5 + layer)
        host.device.synchronize()
        copies.launch(Copy(0, "offload", None, (2,), (5,), (), 0))
        copies.rest(None, clock.wait_until)
        for layer, kv in enumerate(copies.pool.layers):
            assert all(torch.equal(x[5], torch.full_like(x[5], 1.5 + layer)) for x in kv)
        copies.launch(Copy(1, "restore", None, (7,), (5,), (), 0))
        copies.rest(None, clock.wait_until)
        assert all(torch.equal(x[7].cpu(), x[2].cpu()) for kv in runner.kv for x in kv)
