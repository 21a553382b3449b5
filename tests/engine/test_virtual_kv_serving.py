"""Virtual KV on the engine: other addresses, the same tokens, and every page accounted for."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import threading
from pathlib import Path

import pytest
import torch

from tests.small_runs import request
from tests.tiny_models import tiny_model
from xllm_lab.engine.device import Geometry, open_device
from xllm_lab.engine.device.cpu_pages import PAGE_BYTES, CpuPages
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.page_mapper import PageMapper
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.pages.next_page import NextPage
from xllm_lab.records import Records, page_runs
from xllm_lab.sim.parity import parity
from xllm_lab.step import Decodes, PageMoves, PageRun, Step
from xllm_lab.workload import RequestId, Workload

# Of the tiny model's 64 bytes a token, layer and side, 64 tokens are a page of 4 KiB.
PAGE_TOKENS = 64
MODES = {
    "async_scheduling": ASYNC_SCHEDULING,
    "enable_prefix_cache": (True, False),
    "shapes": ("eager", "powers-of-two"),
    "draft": ("off", "ngram", "draft_model"),
    "pages": tuple(sorted(policies("pages"))),
    "without": ((), ("native",)),
}


@functools.cache
def engine(without: tuple[str, ...] = ()) -> Engine:
    return Engine(EngineOptions(model=str(tiny_model()), device="cpu", without_ops=without, draft_model="layers:0"))


def config(**changes: object) -> InstanceConfig:
    """So few blocks that requests lose theirs, and so small steps that prompts come in chunks."""
    small = {"max_model_len": 256, "block_size": PAGE_TOKENS, "num_kv_blocks": 11, "max_seqs_per_batch": 6}
    return InstanceConfig(**{**small, "max_tokens_per_batch": 48, **changes})  # type: ignore[arg-type]


def talk(num_requests: int = 8, output: int = 70) -> Workload:
    """Prompts of which every other one begins alike."""
    return Workload(
        requests=tuple(
            request(i, 300 * i, prompt=66 + 9 * i, output=output, hashes=tuple(9 * (i % 2) + k for k in range(16)))
            for i in range(num_requests)
        )
    )


def served(where: InstanceConfig, modes: dict[str, object], work: Workload) -> Records:
    records = Records()
    method = modes.get("draft", "off")
    chosen = Policies(
        make_policy("batch", "decode-first"),
        shapes=make_policy("shapes", modes.get("shapes", "eager")),  # type: ignore[arg-type]
        pages=make_policy("pages", modes.get("pages", "on-demand")),  # type: ignore[arg-type]
        **({} if method == "off" else {"draft": Fixed(method=method)}),  # type: ignore[arg-type]
    )
    engine(modes.get("without", ())).serve(work, where, chosen, records)
    return records.sort()


def tokens(records: Records) -> dict[int, list[int]]:
    return {r.id: r.output_token_ids.tolist() for r in records.requests}


def pairwise_modes() -> list[dict[str, object]]:
    """Few runs in which any two values of any two modes meet: taken while they have a pair that none had before."""
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(MODES, 2)
        for x, y in itertools.product(range(len(MODES[a])), range(len(MODES[b])))
    }
    chosen: list[dict[str, object]] = []
    every = [
        dict(zip(MODES, choice, strict=True)) for choice in itertools.product(*map(range, map(len, MODES.values())))
    ]
    while missing:
        best = max(every, key=lambda c: len(missing & set(itertools.combinations(c.items(), 2))))
        missing -= set(itertools.combinations(best.items(), 2))
        chosen.append({name: MODES[name][k] for name, k in best.items()})
    return chosen


@functools.cache
def plain() -> dict[int, list[int]]:
    """Paged, in turns, without anything."""
    return tokens(served(config(), {}, talk()))


@pytest.mark.parametrize("modes", pairwise_modes(), ids=str)
def test_tokens_are_those_of_paged_blocks(modes: dict[str, object]) -> None:
    """Whatever else is on; and requests did lose their KV, or the modes would not meet that."""
    fields = {name: modes[name] for name in ("async_scheduling", "enable_prefix_cache")}
    records = served(config(kv_layout="virtual", **fields), modes, talk())
    assert tokens(records) == plain()
    assert sum(r.num_preemptions for r in records.requests) > 0
    assert all(s.mapped_tokens is not None for s in records.steps)


def test_a_sequence_is_one_contiguous_range() -> None:
    """Of each layer's keys; and what it holds is the blocks of its table, in order."""
    runner = engine().runner(config(kv_layout="virtual"))
    pool = runner.kv_pool
    assert isinstance(pool, VirtualKvPool)
    assert pool.block_size == pool.slot_tokens >= 257
    pool.map(PageRun(2, 0, 7, 1))
    pool.map(PageRun(2, 1, 3, 1))
    pool.map(PageRun(5, 0, 3, 2))
    (slot,) = pool.table(2)
    keys = pool.layers[1].k_BPKH
    keys[slot, : 2 * PAGE_TOKENS] = torch.arange(2 * PAGE_TOKENS).view(-1, 1, 1).float()
    (other,) = pool.table(5)
    assert keys[other, :PAGE_TOKENS].equal(keys[slot, PAGE_TOKENS : 2 * PAGE_TOKENS])
    assert not keys[other, PAGE_TOKENS : 2 * PAGE_TOKENS].any()


def test_growth_copies_nothing_and_pages_are_used_again() -> None:
    """A token stays at its address while its sequence grows; a second request finds the pages of the first."""
    work = Workload(requests=(request(0, prompt=40, output=200), request(1, 10**9, prompt=40, output=200)))
    host, records = engine(), Records()
    host.serve(work, config(kv_layout="virtual", enable_prefix_cache=False), _with(NextPage()), records)
    runs = [run for s in records.steps for run in (*page_runs(s.page_maps), *page_runs(s.page_maps_ahead))]
    assert sum(run.num_pages for run in runs) == 4  # 239 tokens are 4 pages, of both
    assert len({(run.slot, run.page) for run in runs}) == 4  # no page shows another block later
    assert records.steps[-1].mapped_tokens == 4 * PAGE_TOKENS


def _with(pages: object) -> Policies:
    return Policies(make_policy("batch", "decode-first"), pages=pages)  # type: ignore[arg-type]


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run after run: what the driver maps is what the scheduler says, and all of it goes with the run."""
    pools: list[VirtualKvPool] = []
    opened, before = PageMapper.__init__, _mappings()

    def watched(self: PageMapper, pool: VirtualKvPool, *args: object) -> None:
        opened(self, pool, *args)  # type: ignore[arg-type]
        pools.append(pool)

    monkeypatch.setattr(PageMapper, "__init__", watched)
    for _ in range(3):
        records = served(config(kv_layout="virtual"), {"pages": "xllm-pool"}, talk(4, 30))
        mapped = sum(len(s.page_maps) // 4 + len(s.page_maps_ahead) // 4 for s in records.steps)
        # Of four ranges; and two made-up sequences warm up.
        assert pools.pop().memory.num_map_calls == 4 * (mapped + 2)
        gc.collect()
    assert _mappings() == before
    assert not [fd for fd in os.listdir("/proc/self/fd") if "xllm_lab_kv" in _target(fd)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _mappings() -> int:
    return sum("xllm_lab_kv" in line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


def test_parity_covers_pages(tmp_path: Path) -> None:
    """The simulator decides every page as the engine did; another policy parts ways."""
    for mode in ASYNC_SCHEDULING:
        where = config(kv_layout="virtual", async_scheduling=mode)
        run = engine().replay(talk(), where, _with(NextPage()), out=tmp_path / mode)
        assert parity(run).is_identical
        assert not parity(run, policies=_with(make_policy("pages", "on-demand"))).is_identical


def test_a_block_of_no_whole_pages_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"block_size is 16: .* 1024 bytes, and cpu maps memory by 4096; .* multiples of 64"
    ):
        engine().runner(config(kv_layout="virtual", block_size=16))


def test_more_blocks_than_the_system_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"may take \d+ mappings, .* \(vm.max_map_count\); accepted: at most \d+"):
        open_device("cpu").virtual_memory(Geometry(num_ranges=60, num_positions=10, num_pages=10**7, page_bytes=4096))


def test_what_is_mapped_over_is_replaced() -> None:
    memory = CpuPages(Geometry(num_ranges=2, num_positions=8, num_pages=3, page_bytes=PAGE_BYTES))
    memory.map(0, 0, 3)
    for page in range(3):
        memory.ranges[1][page * PAGE_BYTES] = page + 1
    memory.map(1, 2, 1)
    assert [int(memory.ranges[1][page * PAGE_BYTES]) for page in range(3)] == [1, 3, 3]
    assert not memory.ranges[0].view(8, -1)[:3].any()
    memory.unmap(0, 3)
    memory.map(5, 1, 1)
    assert int(memory.ranges[1][5 * PAGE_BYTES]) == 2
    assert (memory.num_map_calls, memory.num_unmap_calls) == (6, 2)


class Slow(VirtualKvPool):
    """Maps page 1 of any slot when it is let."""

    gate = threading.Event()

    def map(self, run: PageRun) -> None:
        assert run.page != 1 or self.gate.wait(10), "nobody opens"
        super().map(run)


def test_a_step_waits_for_pages_that_are_being_mapped_ahead() -> None:
    """Though it maps none itself: it enters one of them. Otherwise it would write where nothing is."""
    model, where = engine().model.model, config(kv_layout="virtual")
    pool = Slow(model.config, where, num_blocks=11, dtype=model.dtype, device=engine().device)
    with PageMapper(pool, engine().device) as mapper:
        mapper.prepare(_step(0, PageMoves(maps=(PageRun(0, 0, 4, 1),), ahead=(PageRun(0, 1, 5, 1),))))
        threading.Timer(0.05, pool.gate.set).start()
        mapper.prepare(_step(1, PageMoves()))
        assert pool.gate.is_set()
        pool.layers[0].k_BPKH[0, PAGE_TOKENS] = 1.0


def _step(index: int, pages: PageMoves) -> Step:
    decodes = Decodes((RequestId(0),), (PAGE_TOKENS - 1,), index, PAGE_TOKENS, PAGE_TOKENS)
    return Step(index, 0, decodes, (), (), (), (), "", 0, 0, 0, 0, 0, 0, pages=pages)
