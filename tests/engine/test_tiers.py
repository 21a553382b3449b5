"""KV tiers of the engine: whatever is copied to the host and back, however late, the tokens are those without.

Every pair of settings of two switches meets in some combination below, as for drafts.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.drafts.test_speculation import all_pairs
from tests.engine.drafts.tiny_mtp import mtp_checkpoint
from tests.laws import obey_the_laws
from tests.small_runs import STEP_TIME, WildCache
from tests.tiny_models import VOCAB_SIZE, tiny_model
from xllm_lab.copies import Copy
from xllm_lab.copy_time import HOST_KINDS, KINDS, CopyTime, CopyWeights
from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.copies import EngineCopies
from xllm_lab.engine.device import Device, DeviceMemory
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.host_pool import HostPool, stretches_of
from xllm_lab.engine.kv import LayerKv
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.fcfs import Fcfs
from xllm_lab.policies.cache import CachePolicy, CopyKind
from xllm_lab.policies.cache.cost_aware import CostAware
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.reuse_aware import ReuseAware
from xllm_lab.policies.cache.watermark import Watermark
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import Records
from xllm_lab.sim.parity import parity
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_SESSIONS, NUM_TURNS, NUM_TOKENS = 6, 4, 5
WHERE = InstanceConfig(
    max_tokens_per_batch=256, max_seqs_per_batch=16, block_size=4, num_kv_blocks=400, max_model_len=128
)
TIGHT = 44  # blocks: two of the longest prompts
# Slower to compute than to copy, so that a policy that weighs them copies.
COPY_TIME = CopyTime(dict.fromkeys(KINDS, CopyWeights(1.0, 0.1)))
SWITCHES: dict[str, tuple[Any, ...]] = {
    "cache": (
        Lru(),
        Watermark(low_frac=1.0),
        ReuseAware(half_life_us=1_000),
        CostAware(),
        WildCache(host_blocks_factor=2.0),
        Lru(max_offloading_blocks=3, max_restoring_blocks=2),
    ),
    "batch": (DecodeFirst(), Fcfs()),
    "shapes": (EAGER, PowersOfTwo()),
    "draft": (
        OFF,
        Fixed(method="ngram", num_speculative_tokens=3),
        Fixed(method="draft_model", num_speculative_tokens=2),
    ),
    "async_scheduling": ASYNC_SCHEDULING,
    "max_tokens_per_batch": (256, 24),  # prompts are cut
    "num_kv_blocks": (80, TIGHT),  # requests lose their KV
    "store": (False, True),  # that the runs before have filled
    "link": (None, 2e7, 1e6),  # a block takes what the machine takes, or 0.2 ms, or a step's time and more
}


def sessions(turns: int = NUM_TURNS, *, gap_us: int = 3_000) -> Workload:
    """Clients who say a bit more each time, in turns, so that what they said is pushed out meanwhile."""
    rng = np.random.default_rng(7)
    said = [rng.integers(3, VOCAB_SIZE, 90).tolist() for _ in range(NUM_SESSIONS)]
    requests = []
    for i in range(NUM_SESSIONS * turns):
        turn, session = divmod(i, NUM_SESSIONS)
        tokens = tuple(said[session][: 24 + 20 * turn + session])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=gap_us * i, prompt=prompt, output_tokens=NUM_TOKENS))
    return Workload(requests=tuple(requests))


@functools.cache
def store() -> str:
    """Of all runs of this process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return f"dir:{folder}"


@functools.cache
def engine(link: float | None = None, clock: str = "virtual", timer: str = "cpu", *, stores: bool = False) -> Engine:
    """Its draft model is itself, so that drafts are kept."""
    return Engine(
        EngineOptions(
            model=str(tiny_model()),
            device="cpu",
            dtype="float32",
            draft_model="layers:0-1",
            clock=clock,
            timer=timer,
            host_link_bytes_per_s=link,
            store=store() if stores else None,
        )
    )


def served(
    host: Engine, work: Workload, config: InstanceConfig, policies: Policies, *, copy_time: CopyTime = COPY_TIME
) -> Records:
    records = Records()
    host.serve(work, config, policies, records, step_time=STEP_TIME, copy_time=copy_time)
    obey_the_laws(work, config, records.sort(), vocab_size=VOCAB_SIZE)
    return records


def tokens_of(records: Records) -> list[list[int]]:
    return [r.output_token_ids.tolist() for r in records.requests]


@functools.cache
def plain(gap_us: int = 3_000) -> list[list[int]]:
    """Without tiers, and with room for everybody."""
    return tokens_of(served(engine(), sessions(gap_us=gap_us), WHERE, Policies(Fcfs())))


@pytest.mark.parametrize(
    "combination", list(all_pairs(SWITCHES)), ids=lambda c: "-".join(str(v)[:12] for v in c.values())
)
def test_the_tokens_are_those_without_tiers(combination: dict[str, Any]) -> None:
    limits = {k: v for k, v in combination.items() if k not in ("cache", "batch", "shapes", "draft", "link", "store")}
    policies = Policies(
        combination["batch"], shapes=combination["shapes"], draft=combination["draft"], cache=combination["cache"]
    )
    host = engine(combination["link"], stores=combination["store"])
    records = served(host, sessions(), replace(WHERE, **limits), policies)
    assert tokens_of(records) == plain()
    assert any(c.kind == "offload" for c in records.copies), "nothing was offloaded"


class Watched(HostPool):
    """Keeps what the device's blocks held when they went, and compares when they come back."""

    def __init__(self, device_layers: Sequence[LayerKv], *, num_slots: int, device: Device) -> None:
        super().__init__(device_layers, num_slots=num_slots, device=device)
        self._kept: dict[int, list[torch.Tensor]] = {}
        self.num_compared = 0

    def _bits(self, block: int) -> list[torch.Tensor]:
        return [x[block].clone().view(torch.int32) for layer in self._device_layers for x in layer]

    def move(self, kind: CopyKind, blocks: Sequence[int], slots: Sequence[int]) -> None:
        if kind == "offload":
            self._kept.update({s: self._bits(b) for b, s in zip(blocks, slots, strict=True)})
        super().move(kind, blocks, slots)
        if kind == "restore":
            for block, slot in zip(blocks, slots, strict=True):
                assert all(map(torch.equal, self._bits(block), self._kept[slot])), f"block {block} has other bits"
                self.num_compared += 1


@pytest.mark.parametrize("async_scheduling", ASYNC_SCHEDULING)
@pytest.mark.parametrize("clock", ["wall", "virtual"])
def test_what_comes_back_is_what_went(async_scheduling: str, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on either clock."""
    pools: list[Watched] = []

    def watched(*args: Any, **named: Any) -> Watched:
        pools.append(Watched(*args, **named))
        return pools[-1]

    monkeypatch.setattr("xllm_lab.engine.copies.HostPool", watched)
    host = engine(None, clock, "wall" if clock == "wall" else "cpu")
    config = replace(WHERE, num_kv_blocks=TIGHT, async_scheduling=async_scheduling)
    assert tokens_of(served(host, sessions(), config, Policies(Fcfs(), cache=Lru()))) == plain()
    (pool,) = pools
    assert pool.num_compared > 0


@pytest.mark.parametrize("cache", [Lru(), CostAware(), Watermark(low_frac=1.0)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("async_scheduling", ASYNC_SCHEDULING)
@pytest.mark.parametrize(
    "where",
    [("virtual", "cpu", None), ("virtual", "cpu", 1e6), ("virtual", "wall", 2e7), ("wall", "wall", 2e7)],
    ids=lambda w: "-".join(map(str, w)),
)
def test_the_simulator_decides_the_same(
    cache: CachePolicy, async_scheduling: str, where: tuple[str, str, float | None], tmp_path: Path
) -> None:
    clock, timer, link = where
    config = replace(WHERE, num_kv_blocks=TIGHT, async_scheduling=async_scheduling)
    run = engine(link, clock, timer).replay(
        *(sessions(), config, Policies(Fcfs(), cache=cache)),
        out=tmp_path / "run",
        step_time=STEP_TIME,
        copy_time=COPY_TIME,
    )
    compared = parity(run)
    assert compared.is_identical, compared
    assert run.records.copies, "nothing was copied"
    assert run.manifest.timing.get("host_link_bytes_per_s") == link


def test_copies_take_as_long_as_the_link(tmp_path: Path) -> None:
    """One after another, each way; what was measured at start is what the policy is told, and the manifest tells."""
    rate = 1e5
    host, config = engine(rate), replace(WHERE, num_kv_blocks=TIGHT)
    run = host.replay(
        sessions(), config, Policies(Fcfs(), cache=CostAware()), out=tmp_path / "run", step_time=STEP_TIME
    )
    token_us = run.manifest.model["kv_bytes_per_token"] / rate * 1e6
    measured = run.manifest.copy_time_model()
    for kind in HOST_KINDS:
        assert measured.copy_us(kind, 40) == pytest.approx(40 * token_us, rel=0.01)
    slow = served(host, sessions(), config, Policies(Fcfs(), cache=Lru()))
    free_us = dict.fromkeys(KINDS, 0)
    for copy in slow.copies:
        if copy.end_us is not None:
            begins_us = max(copy.asked_us, free_us[copy.kind])
            assert copy.end_us >= begins_us + int(copy.num_tokens * token_us)
            free_us[copy.kind] = copy.end_us


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_stretches_are_the_blocks_in_order(pairs: list[tuple[int, int]]) -> None:
    found = list(stretches_of([b for b, _ in pairs], [s for _, s in pairs]))
    assert [(s.block + k, s.slot + k) for s in found for k in range(s.length)] == pairs
    for one, other in pairwise(found):
        assert (one.block + one.length, one.slot + one.length) != (other.block, other.slot)


def test_what_ended_unseen_ends_behind_the_answer_before(device: Device) -> None:
    """A thread may be done before an answer, and say so only after it."""
    layers = [LayerKv(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8))]
    copies = EngineCopies(4)
    with copies.open(make_clock("virtual", "cpu"), layers, device):
        copies.over(1_000_000)
        copies.launch(Copy(0, "offload", None, (0,), (0,), (), 5))
        (end,) = copies.over(1_000_001)
        assert end.end_us == 1_000_001


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = Policies(Fcfs(), cache=Lru())
    speculating = Engine(EngineOptions(model=str(mtp_checkpoint("mimo").folder), device="cpu", dtype="float32"))
    drafts = replace(tiers, draft=Fixed(method="mtp", num_speculative_tokens=2))
    with pytest.raises(ConfigError, match=r"may draft by 'mtp', .* the host keeps none; accepted: another method"):
        speculating.serve(sessions(1), WHERE, drafts, Records())
    monkeypatch.setattr(engine(), "options", replace(engine().options, tensor_parallel=2))
    with pytest.raises(ConfigError, match=r"with tensor_parallel 2 each rank .* accepted: tensor_parallel 1"):
        engine().serve(sessions(1), WHERE, tiers, Records())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="host_link_bytes_per_s is 0, more than 0 is accepted"):
        Engine(replace(engine().options, host_link_bytes_per_s=0))
    monkeypatch.setattr(Device, "host_memory", lambda _: DeviceMemory(100_000, 1_000_000))
    with pytest.raises(ConfigError, match=r"makes 1600 host blocks: they take \d+ bytes, 100000 are free"):
        engine().serve(sessions(1), WHERE, tiers, Records())
    assert not served(engine(), sessions(1), WHERE, Policies(Fcfs())).copies  # no room is needed without tiers


@pytest.mark.slow
def test_a_conversation_with_the_embedded_model(twenty_prompts: list[list[int]]) -> None:
    """SmolLM2, three turns of four texts: what was said is fetched, and the answers are those of one with room."""
    texts = [(p * 9)[:160] for p in twenty_prompts[4:8]]
    requests = []
    for i in range(12):
        tokens = tuple(texts[i % 4][: 60 + 48 * (i // 4)])
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        requests.append(Request(id=RequestId(i), arrival_us=2_000_000 * i, prompt=prompt, output_tokens=12))
    work, host = Workload(requests=tuple(requests)), Engine(EngineOptions(device="cpu", dtype="float32", timer="cpu"))
    where = InstanceConfig(
        max_tokens_per_batch=128, max_seqs_per_batch=8, block_size=16, num_kv_blocks=100, max_model_len=512
    )
    roomy, tight = Records(), Records()
    host.serve(work, where, Policies(Fcfs()), roomy)
    host.serve(work, replace(where, num_kv_blocks=16), Policies(Fcfs(), cache=Lru()), tight)
    assert tokens_of(tight.sort()) == tokens_of(roomy.sort())
    assert sum(c.num_tokens for c in tight.copies if c.kind == "restore") >= 300
