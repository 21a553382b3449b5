"""A prediction module drafts what its formulas say, however the target's steps were cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.drafts import naive
from tests.engine.drafts.living import SAMPLED, Live, random_tokens, tell_logits
from tests.engine.drafts.tiny_mtp import mtp_checkpoint, write_mtp_checkpoint
from tests.tiny_models import MAX_POSITION, VOCAB_SIZE, tiny_model
from xllm_lab.engine.device import Device, DeviceMemory, open_device
from xllm_lab.engine.drafts.model_proposer import ModelProposer
from xllm_lab.engine.drafts.mtp import mtp_proposer
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.models import LoadedModel, load_model
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ConfigError, ModelError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.ledger import Ledger
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.workload import RequestId

STYLES = tuple(naive.NAMES)
CONFIG = InstanceConfig(
    block_size=4, num_kv_blocks=120, max_model_len=MAX_POSITION, max_tokens_per_batch=24, max_seqs_per_batch=4
)
TOLERANCE = 1e-4


@functools.cache
def loaded(style: str) -> LoadedModel:
    return load_model(str(mtp_checkpoint(style).folder), device=open_device("cpu"))


class Serving:
    """A target whose module drafts; requests compute their tokens in whatever chunks a test says."""

    def __init__(self, style: str, model: LoadedModel | None = None, *, enable_prefix_cache: bool = True) -> None:
        blocks, size, device = CONFIG.num_kv_blocks, CONFIG.block_size, open_device("cpu")
        self.style, self.ledger = style, Ledger(blocks, size, enable_prefix_cache=enable_prefix_cache)
        target = model or loaded(style)
        decoder = target.model
        self.pool = KvPool(
            decoder.config, num_blocks=blocks + 1, block_size=size, dtype=decoder.dtype, device=device
        )  # a block more, which pads graphs
        self.runner = Runner(decoder, self.pool, device)
        self.proposer: ModelProposer = mtp_proposer(target, self.runner, CONFIG, device, tell_logits)
        self.computed: dict[RequestId, int] = {}

    def admit(self, request: Live) -> None:
        self.computed[request.id] = request.admit()

    def compute(self, request: Live, most: int, drafts: Sequence[int] = ()) -> None:
        """The target's next chunk of a request, and of drafts behind its last token."""
        start = self.computed[request.id]
        tokens = request.tokens[start : start + most]
        end = start + len(tokens)
        tokens += drafts
        self.runner.run([SequenceChunk(tokens, start, request.ask("mtp", len(drafts)).block_table, True)])
        self.computed[request.id] = end

    def reach_the_last_token(self, request: Live, most: int = 1000) -> None:
        while self.computed[request.id] < request.state.num_tokens - 1:
            self.compute(request, min(most, request.state.num_tokens - 1 - self.computed[request.id]))

    def check(self, asking: Sequence[Live], depths: Sequence[int]) -> list[Sequence[int]]:
        """Has drafts made, and holds them and their logits against the formulas."""
        made = self.proposer.propose([r.ask("mtp", d) for r, d in zip(asking, depths, strict=True)])
        checkpoint = mtp_checkpoint(self.style)
        for request, depth, drafts in zip(asking, depths, made, strict=True):
            tokens, logits_dV = naive.drafts(request.tokens, depth, checkpoint.weights, checkpoint.config, self.style)
            told = self.proposer.probabilities(request.id)
            assert told is not None
            torch.testing.assert_close(told, logits_dV, rtol=0, atol=TOLERANCE)
            assert drafts == tokens
        return made


def sampled(id: int, length: int, serving: Serving, prefix: Sequence[int] = ()) -> Live:
    return Live(id, [*prefix, *random_tokens(length, VOCAB_SIZE, seed=id)], serving.ledger, SAMPLED)


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_at_once(style: str) -> None:
    """Three drafts behind a prompt and its first token."""
    serving = Serving(style)
    request = sampled(0, 21, serving)
    serving.admit(request)
    request.draw([9])
    serving.reach_the_last_token(request)
    serving.check([request], [3])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_drafts_follow_the_formulas_whatever_went_before(data: st.DataObject) -> None:
    """Random chunks of the target, requests that draft together at different depths, drafts of which some are verified
    and some rejected, turns without drafts, KV that is lost."""
    serving = Serving(data.draw(st.sampled_from(STYLES)), enable_prefix_cache=False)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    live = [sampled(i, length, serving) for i, length in enumerate(lengths)]
    for request in live:
        serving.admit(request)
        request.draw([5])
    for turn in range(data.draw(st.integers(1, 3))):
        for request in live:
            serving.reach_the_last_token(request, data.draw(st.integers(1, 12)))
        asking = data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
        drafts = serving.check(asking, [data.draw(st.integers(1, 3)) for _ in asking])
        for request, made in zip(asking, drafts, strict=True):
            serving.compute(request, 1, made)
            kept = made[: data.draw(st.integers(0, len(made)))]
            request.draw([*kept, *random_tokens(1, VOCAB_SIZE, seed=50 + turn)])
            serving.computed[request.id] += len(kept)
        if data.draw(st.booleans()):
            lost = data.draw(st.sampled_from(live))
            serving.proposer.forget(lost.id)
            lost.leave()
            serving.admit(lost)


@pytest.mark.parametrize("style", STYLES)
def test_tokens_of_the_prefix_cache_have_their_hidden_states(style: str) -> None:
    """A request whose blocks another one computed drafts as if it had computed them, though the target never did."""
    serving = Serving(style)
    first = sampled(0, 6, serving, prefix=random_tokens(16, VOCAB_SIZE, seed=77))
    serving.admit(first)
    first.draw([4])
    serving.reach_the_last_token(first)
    first.publish()
    second = sampled(1, 6, serving, prefix=random_tokens(16, VOCAB_SIZE, seed=77))
    serving.admit(second)
    assert serving.computed[second.id] == 16
    second.draw([8])
    serving.reach_the_last_token(second)
    serving.check([second], [2])


def test_replayed_steps_are_observed_too() -> None:
    """A target whose steps are captured and replayed, padding and all, is heard as well."""
    serving, device = Serving("mimo"), open_device("cpu")
    runner, model = serving.runner, loaded("mimo").model
    runner.graphs = Graphs(model, serving.pool, device, runner.workspace, config=CONFIG, policy=PowersOfTwo())
    request = sampled(0, 5, serving)
    serving.admit(request)
    request.draw([9])
    for start, end, size in ((0, 3, 4), (3, 4, 2), (4, 5, 2)):
        chunk = SequenceChunk(request.tokens[start:end], start, request.ask("mtp", 0).block_table, True)
        runner.run([chunk], graph_tokens=size)
    assert runner.graphs.counts.captures
    serving.check([request], [3])


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_stays_near_float32(style: str) -> None:
    """Eight bits of mantissa, also where a norm is undone by its weights: the direction of the logits survives."""
    serving = Serving(
        style, load_model(str(mtp_checkpoint(style).folder), device=open_device("cpu"), dtype=torch.bfloat16)
    )
    request = sampled(0, 21, serving)
    serving.admit(request)
    request.draw([9])
    serving.reach_the_last_token(request)
    serving.proposer.propose([request.ask("mtp", 1)])
    told = serving.proposer.probabilities(request.id)
    checkpoint = mtp_checkpoint(style)
    _, logits_1V = naive.drafts(request.tokens, 1, checkpoint.weights, checkpoint.config, style)
    assert told is not None
    assert torch.cosine_similarity(told, logits_1V).item() > 0.99


def test_embedding_and_head_are_the_targets() -> None:
    """The module adds a layer, two projections' worth of a matrix and norms, and nothing twice."""
    model, module = loaded("mimo").model, loaded("mimo").mtp
    assert module is not None
    assert module.body._head is model._head
    assert module.body._embed is model._embed
    assert all(module.body.layers[0] is not layer for layer in model.layers)


def test_memory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's KV and a hidden state a token: 128 and 128 bytes; 480 tokens."""
    serving = Serving("mimo")
    monkeypatch.setattr(Device, "memory", lambda self: DeviceMemory(100_000, 1 << 30))
    with pytest.raises(ConfigError, match=r"the prediction module of .* needs 122880 bytes .*at most 97 blocks"):
        mtp_proposer(loaded("mimo"), serving.runner, CONFIG, open_device("cpu"), tell_logits)


def test_a_model_without_a_module_is_refused() -> None:
    """By name, when drafts are wanted; without drafts it runs as ever."""
    plain, device = load_model(str(tiny_model()), device=open_device("cpu")), open_device("cpu")
    assert plain.mtp is None
    with pytest.raises(ConfigError, match="has no prediction module; accepted for drafts by mtp"):
        mtp_proposer(plain, Serving("mimo").runner, CONFIG, device, tell_logits)


def test_further_modules_and_copies_are_left_out(tmp_path: Path) -> None:
    """A second module is counted and not run; the shared embedding and head, written again, are no strangers."""
    folder = write_mtp_checkpoint(
        tmp_path / "two",
        "deepseek",
        **{
            "model.layers.2.embed_tokens.weight": torch.zeros(VOCAB_SIZE, 32),
            "model.layers.2.shared_head.head.weight": torch.zeros(VOCAB_SIZE, 32),
            "model.layers.3.enorm.weight": torch.zeros(32),
        },
    ).folder
    module = load_model(str(folder), device=open_device("cpu")).mtp
    assert module is not None
    assert (module.style, module.num_unused) == ("deepseek", 1)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.mtp_layers.0.mlp.experts.0.gate_proj.weight", (2, 2), "is not part of a prediction module that we run"),
        ("model.mtp_layers.0.input_proj.weight", (32, 32), r"has shape \[32, 32\], \[32, 64\] is accepted"),
        ("model.layers.7.mlp.up_proj.weight", (2, 2), "is not part of this model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...], told: str) -> None:
    folder = write_mtp_checkpoint(tmp_path / "odd", "mimo", **{name: torch.zeros(shape)}).folder
    with pytest.raises(ModelError, match=told):
        load_model(str(folder), device=open_device("cpu"))


def test_a_norm_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    """MiMo's module reads what the target's last norm read; a weight of 0 leaves nothing of it."""
    gone = torch.ones(32)
    gone[3] = 0.0
    folder = write_mtp_checkpoint(tmp_path / "zero", "mimo", **{"model.norm.weight": gone}).folder
    with pytest.raises(ModelError, match="has a weight of 0"):
        load_model(str(folder), device=open_device("cpu"))
