"""Virtual KV by AscendCL: the tokens of paged blocks, call by call, and everything given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import NUM_LAYERS, WHERE, engine, install_operators, let_float32_through
from tests.small_runs import request
from xllm_lab.engine.device.foreign_tensor import bytes_at
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.errors import ConfigError
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.records import Records, page_runs
from xllm_lab.step import PageRun
from xllm_lab.workload import Workload

RANGES = 2 * NUM_LAYERS
# Of 128 tokens of two heads of sixteen float32: a layer's keys of a block.
PAGE_BYTES = 128 * 2 * 16 * 4
VIRTUAL = replace(WHERE, kv_layout="virtual", num_kv_blocks=9)


@pytest.fixture(autouse=True)
def _small_pages() -> Iterator[None]:
    install_operators()
    let_float32_through()
    with control.page_bytes(PAGE_BYTES):
        yield


def _work() -> Workload:
    return Workload(requests=tuple(request(i, 200 * i, prompt=90 + 40 * i, output=50) for i in range(5)))


def _served(device: str, where: object, shapes: str, pages: str) -> Records:
    records = Records()
    chosen = Policies(
        make_policy("batch", "decode-first"),
        shapes=make_policy("shapes", shapes),
        pages=make_policy("pages", pages),
    )
    engine(device).serve(_work(), where, chosen, records)  # type: ignore[arg-type]
    return records.sort()


def _tokens(records: Records) -> dict[int, list[int]]:
    return {r.id: r.output_token_ids.tolist() for r in records.requests}


@pytest.mark.parametrize(
    ("mode", "shapes", "pages"),
    [("off", "eager", "on-demand"), ("length_aware", "xllm-buckets", "next-page"), ("on", "xllm-buckets", "xllm-pool")],
)
def test_tokens_are_those_of_paged_blocks_and_each_page_is_a_call(
    mode: str, shapes: str, pages: str, ledger: Ledger
) -> None:
    """Each page that the scheduler maps is one call for each layer's keys and values; a remapped one is unmapped first.

    In the end every mapping, handle and range is given back.
    """
    plain = _tokens(_served("cpu", replace(VIRTUAL, kv_layout="paged"), "eager", "on-demand"))
    where = replace(VIRTUAL, async_scheduling=mode)
    with control.counting() as counts:
        records = _served("npu", where, shapes, pages)
        gc.collect()
        torch.npu.synchronize()
    assert _tokens(records) == plain
    blocks = where.num_kv_blocks + (shapes != "eager")
    assert counts.calls("reserve_address", "release_address") == dict.fromkeys(
        ("reserve_address", "release_address"), RANGES
    )
    assert counts["malloc_physical"] == control.Count(RANGES * blocks, RANGES * blocks * PAGE_BYTES)
    assert counts["free_physical"].calls == RANGES * blocks
    moved = [run for s in records.steps for run in (*page_runs(s.page_maps), *page_runs(s.page_maps_ahead))]
    num_mapped = sum(run.num_pages for run in moved)
    # Zeroing maps each block once, a graph's padding is a slot of four pages, and rehearsals map what they compute.
    before = blocks + 4 * (shapes != "eager")
    num_rehearsed, rest = divmod(counts["map_memory"].calls - RANGES * (num_mapped + before), RANGES)
    assert rest == 0
    assert 0 <= num_rehearsed <= 24
    assert counts["unmap_memory"].calls == counts["map_memory"].calls
    ledger(f"virtual KV, {num_mapped} pages, {pages}", counts)


def test_a_step_that_enters_no_page_asks_for_nothing(ledger: Ledger) -> None:
    """And one that does, for a map of each range; contents are never copied."""
    pool = engine("npu")._runner(VIRTUAL).kv_pool
    assert isinstance(pool, VirtualKvPool)
    with control.counting() as counts:
        pool.map(PageRun(0, 0, 3, 1))
    assert counts.calls() == {"map_memory": RANGES}
    with control.counting() as counts:
        pool.map(PageRun(0, 1, 4, 2))
        pool.map(PageRun(0, 0, 5, 1))
        pool.unmap(PageRun(0, 1, -1, 2))
    assert counts.calls() == {"map_memory": 3 * RANGES, "unmap_memory": 3 * RANGES}
    ledger("virtual KV: two pages mapped, one remapped, two unmapped", counts)


def test_a_block_seen_twice_is_one_block() -> None:
    """Poison shows that nothing is copied, and that fresh blocks were zeroed."""
    pool = engine("npu")._runner(VIRTUAL).kv_pool
    assert isinstance(pool, VirtualKvPool)
    pool.map(PageRun(0, 0, 3, 1))
    pool.map(PageRun(4, 2, 3, 1))
    keys = pool.layers[0].k_BPKH
    assert pool.block_size == 128
    assert not keys[pool.table(0)[0]].cpu().any()
    keys[pool.table(0)[0]] = 7.0
    assert keys[pool.table(4)[2]].cpu().eq(7).all()


def test_a_page_of_the_device_is_the_least() -> None:
    with (
        control.page_bytes(2 << 20),
        pytest.raises(ConfigError, match=r"npu maps memory by 2097152; .* multiples of 16384"),
    ):
        engine("npu")._runner(VIRTUAL)


def test_foreign_memory_lives_as_long_as_its_tensor() -> None:
    """Who reserved it is told when nobody looks any more."""

    class Owner:
        pass

    import ctypes
    import weakref

    held = torch.zeros(100, dtype=torch.uint8, device="npu")
    owner = Owner()
    gone = weakref.ref(owner)
    seen = bytes_at(held.data_ptr(), 100, held.device, owner)
    del owner
    held += 3
    assert seen.cpu().eq(3).all()
    assert gone() is not None
    del seen
    gc.collect()
    assert gone() is None
    assert ctypes.sizeof(ctypes.c_void_p) == 8
