"""Whatever the batching, logits are those of transformers on the whole sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny import VARIANTS, VOCAB, reference_logits, tiny_model
from xllm_lab.engine.device import open_device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.models import LoadedModel, load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.weights import read_safetensors

TOLERANCE = 1e-4
DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v3_yarn")


@functools.cache
def loaded(variant: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(str(tiny_model(variant).folder), device=open_device("cpu"), dtype=dtype)


def runner(variant: str, *, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32) -> Runner:
    device, model = open_device("cpu"), loaded(variant, dtype)
    pool = KvPool(model.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device)
    return Runner(model.model, pool, device)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_in_one_step(variant: str) -> None:
    """The last token's logits of a whole prompt."""
    tokens = prompt(60)
    logits_RV = runner(variant, num_blocks=8, block_size=8).run([SequenceChunk(tokens, 0, range(8), True)])
    torch.testing.assert_close(
        logits_RV, reference_logits(tiny_model(variant).reference, tokens)[-1:], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token(variant: str) -> None:
    """Decoding: every token's logits, one step each, over blocks in no order."""
    tokens, table = prompt(40, seed=1), (7, 2, 5, 0, 3)
    subject = runner(variant, num_blocks=8, block_size=8)
    logits_RV = torch.cat([subject.run([SequenceChunk([t], i, table, True)]).clone() for i, t in enumerate(tokens)])
    torch.testing.assert_close(
        logits_RV, reference_logits(tiny_model(variant).reference, tokens), rtol=0, atol=TOLERANCE
    )


class Sequence_:
    """A sequence on its way through the pool."""

    def __init__(self, tokens: list[int], table: Sequence[int], computed: int = 0) -> None:
        self.tokens, self.table, self.computed = tokens, table, computed

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed


@settings(max_examples=60)
@given(data=st.data())
def test_any_mixture_of_chunks_gives_the_same_logits(data: st.DataObject) -> None:
    """Random sequences, chunk lengths, batches, block sizes and block orders; some prefixes are shared blocks."""
    variant = data.draw(st.sampled_from(["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", *DEEPSEEK]))
    block_size = data.draw(st.sampled_from([1, 4, 16]))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    tables = _tables(lengths, block_size, data.draw(st.randoms(use_true_random=False)).shuffle)
    sequences = [
        Sequence_(prompt(length, seed=i), table) for i, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]
    subject = runner(variant, num_blocks=sum(map(len, tables)), block_size=block_size)
    reference = tiny_model(variant).reference
    while unfinished := [s for s in sequences if s.left]:
        batch = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        chunks = [_next_chunk(s, data.draw(st.integers(1, s.left)), data.draw(st.booleans())) for s in batch]
        logits_RV = subject.run(chunks)
        for sequence, chunk in zip(batch, chunks, strict=True):
            sequence.computed += len(chunk.token_ids)
        wanted = [s for s, chunk in zip(batch, chunks, strict=True) if chunk.num_logits]
        assert logits_RV.shape == (len(wanted), VOCAB)
        for logits_V, s in zip(logits_RV, wanted, strict=True):
            expected_V = reference_logits(reference, s.tokens)[s.computed - 1]
            torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=TOLERANCE)
        _maybe_fork(sequences, batch[0], block_size, data)


def _next_chunk(sequence: Sequence_, count: int, num_logits: bool) -> SequenceChunk:
    start = sequence.computed
    return SequenceChunk(sequence.tokens[start : start + count], start, sequence.table, num_logits)


def _maybe_fork(sequences: list[Sequence_], parent: Sequence_, block_size: int, data: st.DataObject) -> None:
    """An unstarted sequence takes over the full blocks of another one's prefix."""
    shared = parent.computed // block_size
    for child in sequences:
        if shared and child.computed == 0 and child.left > shared * block_size and data.draw(st.booleans()):
            child.computed = shared * block_size
            child.tokens = [*parent.tokens[: child.computed], *child.tokens[child.computed :]]
            child.table = [*parent.table[:shared], *child.table[shared:]]


def _tables(lengths: list[int], block_size: int, shuffle: object) -> list[list[int]]:
    counts = [-(-length // block_size) for length in lengths]
    blocks = list(range(sum(counts)))
    assert callable(shuffle)
    shuffle(blocks)
    return [blocks[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


def test_nobody_num_logits() -> None:
    """The first piece of a long prompt: computed, written, nothing returned."""
    logits_RV = runner("llama", num_blocks=2, block_size=4).run([SequenceChunk([5, 6], 0, [1], False)])
    assert logits_RV.shape == (0, VOCAB)


def test_a_step_touches_its_own_slots_only() -> None:
    """Blocks outside the tables, and slots after the new tokens, keep what they hold."""
    device, model = open_device("cpu"), loaded("llama")
    pool = KvPool(model.config, num_blocks=4, block_size=4, dtype=torch.float32, device=device)
    for layer in pool.layers:
        layer.k_BPKH.fill_(3.0)
        layer.v_BPKH.fill_(3.0)
    Runner(model.model, pool, device).run([SequenceChunk(prompt(5), 0, [2, 0], True)])
    for layer in pool.layers:
        for tensor in layer:
            written = (tensor != 3.0).flatten(2).any(-1)
            assert written.tolist() == [[True, False, False, False], [False] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize("variant", ["qwen3", "mixtral", "deepseek_v3"])
def test_bfloat16_stays_near_float32(variant: str) -> None:
    """Eight bits of mantissa through two layers: the direction of the logits survives."""
    tokens = prompt(50)
    chunk = SequenceChunk(tokens, 0, [3, 1, 0, 2], True)
    low = runner(variant, num_blocks=4, block_size=16, dtype=torch.bfloat16).run([chunk])
    high = runner(variant, num_blocks=4, block_size=16).run([chunk])
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(low, high).item() > 0.999


def test_a_short_block_table_is_our_own_mistake() -> None:
    """The scheduler owes the runner blocks for every token."""
    with pytest.raises(AssertionError, match="short of 5 tokens"):
        runner("llama", num_blocks=4, block_size=4).run([SequenceChunk(prompt(5), 0, [1], True)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("without", [("native",), ("native", "onednn", "grouped_mm")])
def test_every_implementation_gives_the_same_logits(variant: str, without: tuple[str, ...]) -> None:
    """A prompt in two chunks and a decode, on the operators that serve where no kernel does."""
    device, config = open_device("cpu"), loaded(variant).config
    weights = read_safetensors(tiny_model(variant).folder, config, torch.float32)
    model = DecoderModel(config, weights, device=device.torch_device, without=without)
    assert "native" not in {served.by for served in model.ops.served.values()}
    pool = KvPool(config, num_blocks=4, block_size=16, dtype=torch.float32, device=device)
    subject, tokens = Runner(model, pool, device), prompt(50)
    for start, end in ((0, 20), (20, 49), (49, 50)):
        logits_RV = subject.run([SequenceChunk(tokens[start:end], start, [3, 1, 0, 2], True)])
        expected_V = reference_logits(tiny_model(variant).reference, tokens)[end - 1]
        torch.testing.assert_close(logits_RV[0], expected_V, rtol=0, atol=TOLERANCE)


def test_steady_steps_grow_no_memory() -> None:
    """Room for the largest step is made once; logits and every layer's rows then lie where they lay."""
    subject = runner("llama", num_blocks=8, block_size=8)
    subject.workspace.reserve(tokens=30, logits=3)
    num_bytes, grown = subject.workspace.num_bytes, subject.workspace.num_allocations
    at = set()
    for position in range(20):
        chunk = SequenceChunk([5], position, [0, 1, 2], True)
        at.add(subject.run([chunk, chunk._replace(block_table=[3, 4, 5])]).data_ptr())
    subject.run([SequenceChunk(prompt(30), 0, [6, 7, 0, 1], True)])
    assert (subject.workspace.num_bytes, subject.workspace.num_allocations) == (num_bytes, grown)
    assert len(at) == 1
