"""Experts on several ranks compute what they do on one, whatever the way to them; here the ranks are threads."""

# Shapes: T tokens, k experts of a token, E experts, L layers, S slots of all ranks, P of one

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.test_sharding import (
    CONFIG,
    MIXTURE,
    WHERE,
    assert_same,
    divided_mixtures,
    logits,
    runner,
    steps,
    weights,
)
from tests.engine.threaded_ranks import ThreadedGroup, on_ranks
from xllm_lab.engine.device import open_device
from xllm_lab.engine.expert_parallel import DISPATCHES, ExpertParallel, LayerSlots
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.mixture import MixtureLayer
from xllm_lab.engine.model import DecoderModel, shard_of
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.sharding import ExpertShare, Shard, refuse_if_indivisible
from xllm_lab.engine.workspace import Workspace
from xllm_lab.errors import ConfigError
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets


@dataclass(frozen=True)
class Spread:
    """A model whose experts lie on ranks."""

    config: ModelConfig
    ranks: int
    dispatch: str
    num_redundant: int

    def runner(self, group: ThreadedGroup, *, is_data_parallel: bool = False, captures: bool = False) -> Runner:
        parallel = ExpertParallel(
            group=group, dispatch=self.dispatch, num_redundant=self.num_redundant, has_own_tokens=is_data_parallel
        )
        shares = None if is_data_parallel else group
        device, shard = open_device("cpu"), shard_of(shares, parallel)
        assert shard is not None
        part = shard.cut(weights(self.config), self.config)
        model = DecoderModel(
            shard.config(self.config), part, device=device.torch_device, group=shares, experts=parallel
        )
        blocks, dtype = WHERE.num_kv_blocks + 1, model.dtype
        pool = KvPool(model.config, num_blocks=blocks, block_size=WHERE.block_size, dtype=dtype, device=device)
        made = Runner(model, pool, device)
        made.workspace.counts_experts = True
        if captures:
            made.graphs = Graphs(model, pool, device, made.workspace, config=WHERE, policy=VllmBuckets())
        return made


@st.composite
def spreads(draw: st.DrawFn) -> Spread:
    """Some with one expert a rank, some with as many copies as there can be."""
    config, ranks = draw(divided_mixtures().filter(lambda case: case[0].mixture is not None))
    mixture = config.mixture
    assert mixture is not None
    share = draw(st.integers(1, 3))
    routing = mixture.routing._replace(num_experts=share * ranks, top_k=draw(st.integers(1, min(4, share * ranks))))
    # Widths that do not divide: each expert is whole.
    whole = replace(mixture, routing=routing, intermediate_size=draw(st.sampled_from([5, 16])))
    redundant = draw(st.integers(0, share * ranks - share))
    return Spread(replace(config, mixture=whole), ranks, draw(st.sampled_from(DISPATCHES)), redundant)


@settings(max_examples=60)
@given(spreads())
def test_ranks_that_share_the_experts_compute_what_one_does(case: Spread) -> None:
    """And all have the same logits, to the last bit."""
    parts = on_ranks(case.ranks, lambda group: logits(case.runner(group), case.config.vocab_size))
    assert_same(parts[0], logits(runner(case.config), case.config.vocab_size))
    for rank in parts[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(rank, parts[0], strict=True))


@settings(max_examples=20)
@given(spreads())
def test_in_graphs_they_compute_what_they_do_eagerly(case: Spread) -> None:
    """Replayed twice, with other tokens in between; padding is nobody's."""
    sizes = (8, 16, 1, 4)

    def both(group: ThreadedGroup) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        subject = case.runner(group, captures=True)
        captured = [logits(subject, case.config.vocab_size, sizes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*captured, strict=True))
        eager = case.runner(group)
        expected = logits(eager, case.config.vocab_size)
        return captured[0], expected, [x.workspace.slot_rows_LS for x in (subject, eager)]

    for captured, expected, counts in on_ranks(case.ranks, both):
        assert_same(captured, expected)
        assert torch.equal(*counts)


def own_steps(rank: int, vocab_size: int) -> list[list[SequenceChunk] | None]:
    """Each rank's own: none at all, a prompt alone, a decode beside what others prefill, at different times."""
    chunks = steps(vocab_size)
    plans: list[list[list[SequenceChunk] | None]] = [
        [*chunks, None, None],
        [None, chunks[0], None, chunks[1], chunks[2], chunks[3]],
        [None] * 6,
        [chunks[0], chunks[1], None, None, chunks[2], chunks[3]],
    ]
    return plans[rank % 4]


def own_logits(subject: Runner, plan: Sequence[list[SequenceChunk] | None]) -> list[Tensor]:
    found = []
    for chunks in plan:
        if chunks is None:
            assert subject.run_beside()
        else:
            found.append(subject.run(chunks).clone())
    return found


@settings(max_examples=60)
@given(spreads())
def test_ranks_with_tokens_of_their_own_compute_what_each_would_alone(case: Spread) -> None:
    """Whoever has none takes part for the others; when nobody has any, all learn it."""
    vocab_size = case.config.vocab_size

    def serve(group: ThreadedGroup) -> list[Tensor]:
        subject = case.runner(group, is_data_parallel=True)
        found = own_logits(subject, own_steps(group.rank, vocab_size))
        assert not subject.run_beside()
        return found

    alone = logits(runner(case.config), vocab_size)
    for rank, found in enumerate(on_ranks(case.ranks, serve)):
        assert_same(found, alone if found else [])
        assert bool(found) == (rank != 2)


@settings(max_examples=40)
@given(spreads(), st.booleans())
def test_counters_conserve_rows(case: Spread, is_data_parallel: bool) -> None:
    """Of a step: over all ranks, slots compute tokens times experts of a token, and each what was sent to it.

    Copies of an expert differ by at most one row for each rank that sends.
    """
    config, mixture, R = case.config, case.config.mixture, case.ranks
    assert mixture is not None

    def counted(group: ThreadedGroup) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        subject, found = case.runner(group, is_data_parallel=is_data_parallel), []
        plan = own_steps(group.rank, config.vocab_size) if is_data_parallel else steps(config.vocab_size)
        for chunks in plan:
            if chunks is None:
                subject.run_beside()
            else:
                subject.run(chunks)
            w = subject.workspace
            num_tokens = 0 if chunks is None else sum(len(c.token_ids) for c in chunks)
            found.append((num_tokens, w.expert_rows_LE.clone(), w.slot_rows_LS.clone(), w.own_rows_LP.clone()))
        return found

    slots = ExpertShare(0, R, case.num_redundant).slots(mixture.routing.num_experts)
    for ranks in zip(*on_ranks(R, counted), strict=True):
        every = ranks if is_data_parallel else ranks[:1]  # else all ranks count the same tokens
        tokens = sum(num_tokens for num_tokens, *_ in every)
        experts_LE, slots_LS = (torch.stack([counts[i] for counts in every]).sum(0) for i in (1, 2))
        computed_LS = torch.cat([own_LP for *_, own_LP in ranks], 1)
        expected_L = torch.tensor(
            [tokens * mixture.routing.top_k * (i in mixture.layers) for i in range(len(slots_LS))]
        )
        assert torch.equal(computed_LS.sum(1), expected_L)
        assert torch.equal(computed_LS, slots_LS)
        for expert in range(mixture.routing.num_experts):
            copies_Lc = slots_LS[:, [s for s, e in enumerate(slots) if e == expert]]
            assert torch.equal(copies_Lc.sum(1), experts_LE[:, expert])
            senders = R if is_data_parallel and case.dispatch == "all-to-all" else 1
            assert int((copies_Lc.amax(1) - copies_Lc.amin(1)).max()) <= senders


@given(spreads(), st.integers(1, 40), st.integers(1, 9))
def test_a_rank_plans_the_memory_that_it_takes(case: Spread, tokens: int, rows: int) -> None:
    parallel = ExpertParallel(group=_Alone(), num_redundant=0)
    for shard in (shard_of(None, parallel), shard_of(_Alone(), parallel)):
        assert shard is not None
        workspace = Workspace(shard.config(case.config), torch.float32, torch.device("cpu"), shard)
        planned = workspace.bytes_for(tokens=tokens, logits=rows)
        workspace.reserve(tokens=tokens, logits=rows)
        assert workspace.num_bytes == planned


@given(spreads())
def test_every_expert_is_whole_somewhere(case: Spread) -> None:
    """And redundant slots are all that is twice."""
    whole, mixture = weights(case.config), case.config.mixture
    assert mixture is not None
    held = []
    for rank in range(case.ranks):
        share = ExpertShare(rank, case.ranks, case.num_redundant)
        part = Shard(experts=share).cut(dict(whole), case.config)
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name]), name
        own = {int(name.split(".experts.")[1].split(".")[0]) for name in part if ".experts." in name}
        assert own == set(share.own(mixture.routing.num_experts))
        held += [*own]
    assert sorted({*held}) == list(range(mixture.routing.num_experts))
    assert len(held) == mixture.routing.num_experts + case.ranks * case.num_redundant


class _Alone(ThreadedGroup):
    """A group that never speaks."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1


@given(st.data())
def test_copies_take_turns(data: st.DataObject) -> None:
    """Wherever experts lie: each row goes to a slot of its expert, and copies get as many or one more."""
    ranks, share = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    E, redundant = share * ranks, data.draw(st.integers(0, share * ranks - share))
    table = LayerSlots(E, ExpertShare(0, ranks, redundant), torch.device("cpu"), data.draw(st.integers(0, 3)))
    num_own = share + redundant
    moved = [data.draw(st.permutations(range(E)))[:num_own] for _ in range(ranks)]
    missing = set(range(E)) - {e for own in moved for e in own}
    if not missing:
        table.put([e for own in moved for e in own])
    expert_Tk = torch.tensor(
        data.draw(st.lists(st.permutations(range(E)).map(lambda p: p[: max(1, E // 2)]), min_size=1, max_size=20)),
        dtype=torch.int32,
    )
    expert_Tk[len(expert_Tk) // 2] = E  # it pads
    slot_Tk = table.assign(expert_Tk, torch.empty_like(expert_Tk))
    rows = [0] * (len(table.slots) + 1)
    for expert, slot in zip(expert_Tk.flatten().tolist(), slot_Tk.flatten().tolist(), strict=True):
        rows[slot] += 1
        assert expert == (table.slots[slot] if slot < len(table.slots) else E)
    for e in range(E):
        copies = [rows[s] for s, expert in enumerate(table.slots) if expert == e]
        assert max(copies) - min(copies) <= 1


@pytest.mark.parametrize(
    ("ranks", "redundant", "message"),
    [
        (3, 0, "4 experts do not divide among 3 devices, a multiple is accepted"),
        (2, 3, "num_redundant_experts is 3, 0 to 2 is accepted"),
        (2, -1, "num_redundant_experts is -1, 0 to 2 is accepted"),
    ],
)
def test_slots_that_cannot_be_are_refused(ranks: int, redundant: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertShare(0, ranks, redundant).slots(4)


def test_whole_experts_need_not_divide() -> None:
    config = replace(CONFIG, mixture=MIXTURE)
    refuse_if_indivisible(config, 2, "mine", has_whole_experts=True)
    with pytest.raises(ConfigError, match="a divisor of the 9 channels of an expert of mine is accepted"):
        refuse_if_indivisible(config, 2, "mine")


def test_a_layer_says_where_its_experts_are() -> None:
    case = Spread(replace(CONFIG, mixture=replace(MIXTURE, intermediate_size=8)), 2, "all-gather", 1)

    def own(group: ThreadedGroup) -> tuple[int, ...]:
        layer = case.runner(group)._model.layers[0].mlp
        assert isinstance(layer, MixtureLayer)
        assert layer.slots is not None
        assert layer.slots.slots == (0, 1, 2, 2, 3, 0)
        return layer.slots.own

    assert on_ranks(2, own) == [(0, 1, 2), (2, 3, 0)]


@settings(max_examples=20)
@given(spreads(), st.booleans(), st.randoms(use_true_random=False))
def test_experts_may_lie_elsewhere(case: Spread, captures: bool, random: Random) -> None:
    """Weights put into other slots between two steps, and the slots told: the same logits, and graphs follow."""
    mixture, sizes = case.config.mixture, (8, 16, 1, 4) if captures else (None,) * 4
    assert mixture is not None
    E, share = mixture.routing.num_experts, ExpertShare(0, case.ranks, case.num_redundant)
    turned, num_own = random.sample(range(E), E), share.num_own(E)
    slots = [turned[e] for e in share.slots(E)]

    def serve(group: ThreadedGroup) -> list[Tensor]:
        subject = case.runner(group, captures=captures)
        logits(subject, case.config.vocab_size, sizes)
        whole = runner(case.config)._model.layers
        for layer, all_of_it in zip(subject._model.layers, whole, strict=True):
            if isinstance(layer.mlp, MixtureLayer) and isinstance(all_of_it.mlp, MixtureLayer):
                assert layer.mlp.slots is not None
                pairs = (layer.mlp.gate_up, all_of_it.mlp.gate_up), (layer.mlp.down, all_of_it.mlp.down)
                for slot, expert in enumerate(slots[group.rank * num_own : (group.rank + 1) * num_own]):
                    for to, source in pairs:
                        to.put(slot, to.prepared(source.weight(expert)))
                layer.mlp.slots.put(slots)
        return logits(subject, case.config.vocab_size, sizes)

    for found in on_ranks(case.ranks, serve):
        assert_same(found, logits(runner(case.config), case.config.vocab_size))


def test_graphs_are_refused_where_others_decide_shapes() -> None:
    case = Spread(replace(CONFIG, mixture=replace(MIXTURE, intermediate_size=8)), 2, "all-gather", 0)

    def capture(group: ThreadedGroup) -> None:
        with pytest.raises(ConfigError, match="each has its own tokens; accepted: shapes 'eager'"):
            case.runner(group, is_data_parallel=True, captures=True)

    on_ranks(2, capture)
