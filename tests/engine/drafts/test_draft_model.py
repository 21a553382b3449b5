"""A draft model drafts what it would say by itself, whatever became of the drafts before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.drafts.living import SAMPLED, Live, random_tokens, tell_logits
from tests.tiny_models import MAX_POSITION, VOCAB_SIZE, tiny_model, write_tiny_model
from xllm_lab.drafting import Asked
from xllm_lab.engine.device import Device, DeviceMemory, open_device
from xllm_lab.engine.drafts.draft_model import DraftModel, draft_model_proposer, open_draft_model
from xllm_lab.engine.drafts.engine_drafts import Prefill
from xllm_lab.engine.drafts.model_proposer import ModelProposer
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.models import LoadedModel, load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger

CONFIG = InstanceConfig(
    block_size=4, num_kv_blocks=160, max_model_len=MAX_POSITION, max_tokens_per_batch=16, max_seqs_per_batch=4
)


@functools.cache
def target() -> LoadedModel:
    return load_model(str(tiny_model()), device=open_device("cpu"))


@functools.cache
def half() -> LoadedModel:
    """The target's first layer of two."""
    return open_draft_model("layers:0", target(), device=open_device("cpu"))


def proposer(loaded: LoadedModel, config: InstanceConfig = CONFIG) -> ModelProposer:
    return draft_model_proposer(loaded, config, open_device("cpu"), tell_logits)


def ledger() -> Ledger:
    return Ledger(CONFIG.num_kv_blocks, CONFIG.block_size)


def greedy(loaded: LoadedModel, context: Sequence[int], count: int) -> list[int]:
    """What a model says by itself: its prompt at once, then token by token, over a pool that is new."""
    device, tokens = open_device("cpu"), list(context)
    pool = KvPool(loaded.model.config, num_blocks=1, block_size=1024, dtype=loaded.model.dtype, device=device)
    runner, computed = Runner(loaded.model, pool, device), 0
    while len(tokens) < len(context) + count:
        logits_RV = runner.run([SequenceChunk(tokens[computed:], computed, [0], True)])
        computed = len(tokens)
        tokens.append(int(logits_RV[0].argmax()))
    return tokens[len(context) :]


def rows_of_runs(subject: ModelProposer) -> list[int]:
    """How many rows each run has, from now on."""
    rows: list[int] = []
    run = subject._drafter.run

    def watched(chunks: Sequence[SequenceChunk]) -> Tensor:
        rows.append(sum(len(chunk.token_ids) for chunk in chunks))
        return run(chunks)

    subject._drafter.run = watched  # type: ignore[method-assign]
    return rows


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_drafts_are_what_the_model_says_by_itself(data: st.DataObject) -> None:
    """Several requests, some with a common prefix; now and then one is not asked, loses its KV, or draws other tokens
    than those drafted, and depths differ."""
    blocks, subject = ledger(), proposer(half())
    common = random_tokens(data.draw(st.integers(0, 20)), VOCAB_SIZE, seed=1)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    live = [Live(i, common + random_tokens(n, VOCAB_SIZE, seed=10 + i), blocks) for i, n in enumerate(lengths)]
    for request in live:
        request.admit()
        request.draw([7])
    for turn in range(data.draw(st.integers(1, 4))):
        asking = data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
        depths = [data.draw(st.integers(1, 4)) for _ in asking]
        drafts = subject.propose([r.ask("draft_model", d) for r, d in zip(asking, depths, strict=True)])
        for request, depth, made in zip(asking, depths, drafts, strict=True):
            assert made == greedy(half(), request.tokens, depth)
        made_by = {r.id: made for r, made in zip(asking, drafts, strict=True)}
        for request in live:
            accepted = made_by.get(request.id, [])[: data.draw(st.integers(0, 4))]
            request.draw([*accepted, *random_tokens(data.draw(st.integers(1, 3)), VOCAB_SIZE, seed=100 + turn)])
            request.publish()
        if data.draw(st.booleans()):
            preempted = data.draw(st.sampled_from(live))
            subject.forget(preempted.id)
            preempted.leave()
            preempted.admit()


@dataclass
class Beside:
    """A proposer that follows the target, whose work beside it is done as late as it may be."""

    subject: ModelProposer
    left: list[Callable[[], None]] = field(default_factory=list)

    def follow(self, *prefills: Prefill) -> None:
        work = self.subject.follow(prefills)
        if work is not None:
            self.left.append(work)

    def propose(self, asked: Sequence[Asked]) -> list[Sequence[int]]:
        for work in self.left:
            work()
        self.left.clear()
        return self.subject.propose(asked)


def beside(config: InstanceConfig = CONFIG, loaded: LoadedModel | None = None) -> Beside:
    subject = proposer(loaded or half(), config)
    drafter = subject._drafter
    assert isinstance(drafter, DraftModel)
    drafter.fill = drafter._fill  # as if it had a stream of its own
    return Beside(subject)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompts_read_beside_the_target_change_no_draft(data: st.DataObject) -> None:
    """In chunks of any size, of prompts that begin alike; some requests end or lose their KV in the middle, and others
    get their blocks, or find them in the prefix cache."""
    blocks, subject = Ledger(24, CONFIG.block_size), beside()
    common = random_tokens(8, VOCAB_SIZE, seed=1)
    live: list[Live] = []
    for turn in range(data.draw(st.integers(2, 6))):
        own = random_tokens(data.draw(st.integers(1, 20)), VOCAB_SIZE, seed=10 + turn % 3)
        request = Live(turn, common[: 4 * data.draw(st.integers(0, 2))] + own, blocks)
        computed, length = request.admit(), request.state.num_prompt_tokens
        while computed < length and data.draw(st.integers(0, 9)):
            computed = min(length, computed + data.draw(st.integers(1, 9)))
            blocks.grow(request.id, computed)
            subject.follow(Prefill(request.state, tuple(request.table), computed))
        if computed == length and data.draw(st.booleans()):
            request.draw([turn])
            (drafts,) = subject.propose([request.ask("draft_model", 2)])
            assert drafts == greedy(half(), request.tokens, 2)
            request.publish()
            live.append(request)
        else:
            subject.subject.forget(request.id)
            request.leave()
        if len(live) > 1:
            gone = live.pop(data.draw(st.integers(0, 1)))
            subject.subject.forget(gone.id)
            gone.leave()
    for request in live:
        assert list(subject.propose([request.ask("draft_model", 1)])[0]) == greedy(half(), request.tokens, 1)


def test_a_prompt_that_was_followed_is_not_computed_again() -> None:
    """The first run has a row for each request. What the prefix cache supplied and the draft model never saw is read
    with the first chunks, as far as a run has room for it."""
    blocks, subject = ledger(), beside()
    rows = rows_of_runs(subject.subject)
    stranger, hit, miss = (Live(i, random_tokens(40, VOCAB_SIZE, seed=4 + i // 2), blocks) for i in range(3))
    stranger.admit()
    stranger.draw([7])
    stranger.publish()
    assert (hit.admit(), miss.admit()) == (36, 0)
    for request in (hit, miss):
        blocks.grow(request.id, 40)
    prefills = [Prefill(request.state, tuple(request.table), 40) for request in (hit, miss)]
    for _ in range(6):
        subject.follow(*prefills)
    works = [work.args[0] for work in subject.left]  # type: ignore[attr-defined]
    assert [[len(chunk.token_ids) for chunk in chunks] for chunks in works] == [[16], [16], [8, 8], [16], [16]]
    for request in (hit, miss):
        request.draw([7])
    drafts = subject.propose([request.ask("draft_model", 2) for request in (hit, miss)])
    assert drafts == [greedy(half(), request.tokens, 2) for request in (hit, miss)]
    assert rows == [2, 2]


def test_a_shared_block_that_another_prompt_began_to_overwrite_is_read_anew() -> None:
    """As behind drafts: it was evicted, begun by a request that ended, and then computed by the target once more."""
    blocks, subject = ledger(), beside()
    prompt = random_tokens(9, VOCAB_SIZE, seed=30)
    first, other, again = (Live(i, p, blocks) for i, p in enumerate((prompt, prompt[::-1], prompt)))
    for request, table, num_tokens in ((first, [0, 1, 2], 9), (other, [1, 3, 4], 2), (again, [0, 1, 5], 9)):
        subject.follow(Prefill(request.state, table, num_tokens))
    again.draw([9])
    assert subject.propose([Asked(again.state, "draft_model", 3, [0, 1, 5])]) == [greedy(half(), again.tokens, 3)]


def test_who_cannot_ask_is_not_followed(tmp_path: Path) -> None:
    """Too few tokens to draw, a prompt that is longer than the draft model's context; nor is anybody on a CPU."""
    short = load_model(str(write_tiny_model(tmp_path / "short", max_position_embeddings=32)), device=open_device("cpu"))
    subject = beside(loaded=short).subject
    for length, output, is_followed in ((31, 3, True), (31, 2, False), (33, 3, False)):
        state = Live(1, random_tokens(length, VOCAB_SIZE, seed=2), ledger()).state
        state.request = replace(state.request, output_tokens=output)
        prefill = Prefill(state, range(9), length)
        assert (subject.follow([prefill]) is not None) == is_followed
        assert proposer(short).follow([prefill]) is None
        subject.forget(state.id)


def test_a_draft_model_that_is_the_target_is_always_right() -> None:
    """All layers kept: drafts are what the target decodes, and two rows a turn keep its KV in step."""
    everything, blocks = open_draft_model("layers:0-1", target(), device=open_device("cpu")), ledger()
    subject, request = proposer(everything), Live(0, random_tokens(30, VOCAB_SIZE, seed=3), blocks)
    request.admit()
    answer = greedy(target(), request.tokens, 41)
    request.draw(answer[:1])
    for start in range(1, 41, 5):
        (drafts,) = subject.propose([request.ask("draft_model", 4)])
        assert drafts == answer[start : start + 4]
        request.draw(answer[start : start + 5])


def test_what_the_prefix_cache_supplied_is_not_computed_again() -> None:
    """The second of two requests with a common prompt computes its own tokens only; without sharing, all."""
    for shares, expected in ((True, [33, 1, 9, 1]), (False, [33, 1, 33, 1])):
        blocks = Ledger(CONFIG.num_kv_blocks, CONFIG.block_size, enable_prefix_cache=shares)
        subject = proposer(half(), InstanceConfig(block_size=4, num_kv_blocks=160))
        rows = rows_of_runs(subject)
        common = random_tokens(24, VOCAB_SIZE, seed=5)
        for id in range(2):
            request = Live(id, common + random_tokens(8, VOCAB_SIZE, seed=6 + id), blocks)
            request.admit()
            request.draw([id])
            subject.propose([request.ask("draft_model", 2)])
            request.publish()
        assert rows == expected


def test_a_block_that_was_lent_away_meanwhile_is_computed_anew() -> None:
    """Blocks behind the known tokens go back after a step; another's drafts may have been written there."""
    blocks, subject = ledger(), proposer(half())
    mine, other = (Live(i, random_tokens(7, VOCAB_SIZE, seed=20 + i), blocks) for i in range(2))
    mine.draw([5])
    other.draw([6])
    (drafts,) = subject.propose([Asked(mine.state, "draft_model", 4, [0, 1, 2])])
    subject.propose([Asked(other.state, "draft_model", 4, [4, 5, 2])])
    mine.draw(drafts)  # by luck: nobody verified them
    assert subject.propose([Asked(mine.state, "draft_model", 3, [0, 1, 2, 3])]) == [greedy(half(), mine.tokens, 3)]


def test_a_shared_block_that_another_began_to_overwrite_is_computed_anew() -> None:
    """It was evicted, begun by a request that ended, and then computed by the target once more."""
    blocks, subject = ledger(), proposer(half())
    prompt = random_tokens(9, VOCAB_SIZE, seed=30)
    first, other, again = (Live(i, p, blocks) for i, p in enumerate((prompt, prompt[:2], prompt)))
    for request, table in ((first, [0, 1, 2, 3]), (other, [1, 4]), (again, [0, 1, 5, 6])):
        request.draw([9])
        (drafts,) = subject.propose([Asked(request.state, "draft_model", 3, table)])
        assert drafts == greedy(half(), request.tokens, 3)


def test_probabilities_are_kept_until_the_next_drafts() -> None:
    """One row a draft, of those who sample; nothing of the greedy, of strangers, and of the turn before."""
    blocks, subject = ledger(), proposer(half())
    sampled = Live(0, random_tokens(9, VOCAB_SIZE, seed=8), blocks, SAMPLED)
    plain = Live(1, random_tokens(9, VOCAB_SIZE, seed=9), blocks)
    for request in (sampled, plain):
        request.admit()
        request.draw([3])
    drafts, _ = subject.propose([sampled.ask("draft_model", 3), plain.ask("draft_model", 2)])
    told = subject.probabilities(sampled.id)
    assert told is not None
    assert told.shape == (3, VOCAB_SIZE)
    assert told.argmax(-1).tolist() == drafts
    assert subject.probabilities(plain.id) is None
    subject.propose([plain.ask("draft_model", 2)])
    assert subject.probabilities(sampled.id) is None


def test_nothing_is_remembered_of_who_is_forgotten() -> None:
    """Fifty requests come and go."""
    blocks, subject = ledger(), proposer(half())
    for id in range(50):
        request = Live(id, random_tokens(6, VOCAB_SIZE, seed=id), blocks, SAMPLED)
        request.admit()
        request.draw([1])
        subject.propose([request.ask("draft_model", 1)])
        assert subject.num_requests == 1
        subject.forget(request.id)
        request.leave()
        assert subject.num_requests == 0
        assert subject.probabilities(request.id) is None


def test_drafts_end_where_the_models_context_does(tmp_path: Path) -> None:
    """A draft model with a shorter context drafts up to its end, and then no more."""
    short = load_model(str(write_tiny_model(tmp_path / "short", max_position_embeddings=32)), device=open_device("cpu"))
    subject, blocks = proposer(short), ledger()
    counts = []
    for length in (28, 30, 31, 32, 40):
        request = Live(length, random_tokens(length, VOCAB_SIZE, seed=1), blocks)
        request.admit()
        request.draw([1])
        counts.append(len(subject.propose([request.ask("draft_model", 4)])[0]))
    assert counts == [4, 2, 1, 0, 0]


def test_kept_layers_are_the_targets_own() -> None:
    """Not a weight is copied: the same packed matrices, norms, embedding and head."""
    model, skipped = target().model, half().model
    assert skipped.layers[0] is model.layers[0]
    assert skipped.norm_D.data_ptr() == model.norm_D.data_ptr()
    for part in ("_head", "_embed", "_frequencies_H2", "ops"):
        assert getattr(skipped, part) is getattr(model, part)
    assert (len(skipped.layers), skipped.config.num_layers, len(model.layers)) == (1, 1, 2)


@pytest.mark.parametrize(
    "spec", ["layers:", "layers:a", "layers:1-0", "layers:0,0", "layers:2", "layers:-1", "layers:0-5"]
)
def test_layers_that_are_not_there_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"accepted: rising layers of 0 to 1, as in 'layers:0-1,1'"):
        open_draft_model(spec, target(), device=open_device("cpu"))


def test_layers_of_a_divided_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="each of 2 ranks has a part of the layers"):
        open_draft_model("layers:0", target(), device=open_device("cpu"), group_size=2)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """With both of them named."""
    folder = write_tiny_model(tmp_path / "other", vocab_size=128)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 128 tokens, .* one of 256; accepted"):
        open_draft_model(str(folder), target(), device=open_device("cpu"))


def test_memory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 160 blocks of 4 tokens, each 128 bytes in the one layer, half fits."""
    monkeypatch.setattr(Device, "memory", lambda self: DeviceMemory(40_960, 1 << 30))
    with pytest.raises(ConfigError, match=r"needs 81920 bytes .* 40960 are free on cpu, accepted: at most 80 blocks"):
        proposer(half())


def test_many_rows_are_computed_in_several_runs() -> None:
    """A run of 16 rows at most: those who are nearly there go first, and nobody's drafts change."""
    blocks, subject = ledger(), proposer(half())
    live = [Live(i, random_tokens(n, VOCAB_SIZE, seed=i), blocks) for i, n in enumerate((50, 3, 20))]
    for request in live:
        request.admit()
        request.draw([2])
    rows = rows_of_runs(subject)
    drafts = subject.propose([r.ask("draft_model", 3) for r in live])
    assert drafts == [greedy(half(), r.tokens, 3) for r in live]
    assert max(rows) == 16
    assert sum(rows) == 51 + 4 + 21 + 3 * 2
