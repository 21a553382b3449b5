"""A draft model on a stream of its own: the same drafts in whatever order streams run, and prompts read meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.drafts.living import Live, random_tokens
from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import WHERE, folder, install_operators, let_float32_through
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.drafting import Asked
from xllm_lab.engine.device import open_device
from xllm_lab.engine.drafts.draft_model import DraftModel, draft_model_proposer
from xllm_lab.engine.drafts.engine_drafts import Prefill
from xllm_lab.engine.drafts.model_proposer import ModelProposer
from xllm_lab.engine.drafts.verify import Row, draw_draft
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger as Blocks
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Workload

WAITS = ("synchronize_stream", "synchronize_device", "synchronize_event", "memcpy:h2d", "memcpy:d2h")
# Of a request that wanted drafts, behind so many tokens: which it got.
Drafts = dict[tuple[int, int], list[int]]


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


@functools.cache
def engine(device: str) -> Engine:
    """Its draft model is its first layer of two, which is right now and then."""
    return Engine(EngineOptions(model=str(folder()), device=device, dtype="float32", draft_model="layers:0"))


def crowd(count: int = 8) -> Workload:
    """All at once: prompts of up to three blocks, of which every other one begins like its neighbour; a few sample, and
    some end before they can be asked."""
    requests = []
    for i in range(count):
        tokens = [
            *random_tokens(128 * (i % 2), VOCAB_SIZE, seed=1),
            *random_tokens(5 + 47 * (i % 5), VOCAB_SIZE, seed=i),
        ]
        requests.append(
            Request(
                id=RequestId(i),
                arrival_us=0,
                prompt=Prompt(num_tokens=len(tokens), token_ids=tuple(tokens)),
                output_tokens=1 if i == 6 else 7,
                sampling=Sampling(temperature=0.5, seed=4) if i % 4 == 1 else Sampling(),
            )
        )
    return Workload(requests=tuple(requests))


def watch(patch: pytest.MonkeyPatch) -> Drafts:
    """What is drafted from now on."""
    made: Drafts = {}
    propose = ModelProposer.propose

    def watched(self: ModelProposer, asked: Sequence[Asked]) -> list[Sequence[int]]:
        drafts = propose(self, asked)
        made.update({(a.state.id, a.state.num_tokens): list(d) for a, d in zip(asked, drafts, strict=True)})
        return drafts

    patch.setattr(ModelProposer, "propose", watched)
    return made


def served(device: str, where: InstanceConfig = WHERE, shapes: str = "eager") -> list[list[int]]:
    records = Records()
    policies = Policies(
        make_policy("batch", "decode-first"),
        shapes=make_policy("shapes", shapes),
        draft=Fixed(method="draft_model", num_speculative_tokens=3),
    )
    engine(device).serve(crowd(), where, policies, records)
    return [r.output_token_ids.tolist() for r in sorted(records.requests, key=lambda r: r.id)]


@functools.cache
def one_after_another(where: InstanceConfig) -> tuple[list[list[int]], Drafts]:
    """On a CPU, which computes nothing beside the target."""
    with pytest.MonkeyPatch.context() as patch:
        made = watch(patch)
        return served("cpu", where), made


@pytest.mark.parametrize("changes", [{}, {"async_scheduling": "on"}, {"num_kv_blocks": 7}], ids=["", "ahead", "tight"])
@pytest.mark.parametrize("order", [("shuffled", 1), ("shuffled", 2), ("shuffled", 3), ("threads", 5)], ids=str)
def test_drafts_are_the_same_in_any_order(
    order: tuple[control.Order, int], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the tokens: prompts in chunks, shared, and recomputed."""
    where = replace(WHERE, **changes)
    tokens, drafts = one_after_another(where)
    drafted = watch(monkeypatch)
    name, seed = order
    with control.order(name, seed=seed, max_delay_us=200):
        assert served("npu", where) == tokens
    assert drafted == drafts


def test_drafts_are_the_same_beside_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, drafts = one_after_another(WHERE)
    drafted = watch(monkeypatch)
    with control.order("shuffled", seed=4):
        assert served("npu", shapes="xllm-buckets") == tokens
    assert drafted == drafts


def test_prompts_are_read_by_the_time_drafts_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that drafts has at most two rows of anybody: the last token, and the last draft if all were kept."""
    longest: dict[str, int] = {}
    run = DraftModel.run

    def watched(self: DraftModel, chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        device = self._runner._device.name
        longest[device] = max(longest.get(device, 0), *(len(chunk.token_ids) for chunk in chunks))
        return run(self, chunks)

    monkeypatch.setattr(DraftModel, "run", watched)
    assert served("npu") == served("cpu")
    assert longest["npu"] == 2
    assert longest["cpu"] > 128


class Story:
    """One request of two blocks and a bit, whose prompt the target computes in one step."""

    def __init__(self) -> None:
        host = engine("npu")
        self.runner: Runner = host.runner(WHERE)
        assert host.draft_model is not None
        self.proposer = draft_model_proposer(host.draft_model, WHERE, host.device, draw_draft)
        self.request = Live(0, random_tokens(260, VOCAB_SIZE, seed=2), Blocks(WHERE.num_kv_blocks, WHERE.block_size))
        self.request.admit()
        self.request.ask("draft_model", 4)
        self.streams = host.device.streams

    def prefill(self, *, follows: int, draws: bool = True) -> control.Counts:
        """What the step that computes the prompt asks of the device; the draft model reads it so many times."""
        request = self.request
        work = self.proposer.follow([Prefill(request.state, request.table, 260)]) if follows else None
        beside = () if work is None else (work,) * follows
        step = [SequenceChunk(request.tokens, 0, request.table, int(draws))]
        rows = [Row(Sampling(), request.id, 0)] if draws else []
        with control.counting() as counts:
            tokens = self.runner.draw(step, rows, beside=beside)
        request.draw(tokens[0] if draws else [7])
        return counts

    def propose(self) -> tuple[list[int], control.Counts]:
        with control.counting() as counts:
            (drafts,) = self.proposer.propose([self.request.ask("draft_model", 3)])
        return list(drafts), counts


def test_the_host_waits_no_more_often(ledger: Ledger) -> None:
    """Neither in the step that is followed nor for the drafts: one look at the tokens, one at each draft."""
    alone, beside = Story(), Story()
    steps = (alone.prefill(follows=0), beside.prefill(follows=1))
    (drafts, late), (same, ready) = alone.propose(), beside.propose()
    assert drafts == same
    for one in (*steps, late, ready):
        looks = 1 if one in steps else 3
        assert one.calls(*WAITS) == dict(zip(WAITS, (looks, 0, 0, 0, looks), strict=True))
    assert sum(steps[1].launches().values()) > sum(steps[0].launches().values())
    ledger("a prompt, followed by a draft model of one layer", steps[1])


@pytest.mark.parametrize("draws", [True, False])
def test_a_step_does_not_wait_for_the_draft_model(draws: bool) -> None:
    """Not if that takes much longer, whether there is a token to look at or not."""

    def is_left_behind(seed: int) -> bool:
        with control.order("shuffled", seed=seed):
            story = Story()
            story.prefill(follows=12, draws=draws)
            assert story.streams is not None
            with story.streams.beside():
                return not story.streams.current().query()

    assert any(map(is_left_behind, range(9)))


@pytest.mark.parametrize("seed", range(8))
def test_what_was_loaded_is_there_before_it_is_read(seed: int) -> None:
    """Weights are prepared on the target's stream, and nobody waits for that."""
    device = open_device("npu")
    assert device.streams is not None
    with control.order("shuffled", seed=seed):
        weights = device.zeros((8,), torch.float32).add_(1)
        with device.streams.beside():
            doubled = (weights * 2).tolist()
    assert doubled == [2] * 8
