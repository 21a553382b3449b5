"""The wheel's caching allocator on the fake's memory: what it asks for, what it reuses, and that nothing is clean."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_cached_blocks() -> None:
    torch.npu.synchronize()
    torch.npu.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    assert torch.empty(1000, dtype=dtype, device="npu").isnan().all()


def test_fresh_integers_are_minus_one() -> None:
    """An index that nobody wrote is out of range, or counts from the end: not a plausible zero."""
    assert (torch.empty(1000, dtype=torch.int32, device="npu") == -1).all()


def test_a_reused_block_is_poisoned_again_and_costs_no_allocation(ledger: Ledger) -> None:
    first = torch.ones(3 * MIB, device="npu")
    address = first.data_ptr()
    del first
    with control.counting() as counts:
        second = torch.empty(3 * MIB, device="npu")
    assert second.data_ptr() == address
    assert second.isnan().all()
    assert counts.calls() == {}
    ledger("allocation from the cache", counts)


def test_a_freed_block_is_poisoned() -> None:
    """A view that outlives its storage's tensor reads NaN, where real memory would look right for a while."""
    from tests.fake_cann.kernels import alias

    freed = torch.ones(5 * MIB, device="npu")
    stale = alias(freed)
    assert stale.eq(1).all()
    del freed
    torch.npu.synchronize()
    assert stale.isnan().all()


def test_work_launched_before_the_free_still_sees_its_data() -> None:
    """Freed memory belongs to its stream's later work only: poison must not overtake the kernel that reads it."""
    for seed in range(10):
        with control.order("shuffled", seed=seed):
            source = torch.full((1000,), 3.0, device="npu")
            doubled = source * 2
            del source
            again = torch.full((1000,), 5.0, device="npu")
            assert doubled.sum().item() == 6000
            assert again.sum().item() == 5000


def test_poison_can_be_switched_off() -> None:
    with control.no_poison():
        block = torch.ones(7 * MIB, device="npu")
        del block
        assert torch.empty(7 * MIB, device="npu").eq(1).all()


def test_statistics_count_what_is_held() -> None:
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    held = [torch.empty(2 * MIB, dtype=torch.uint8, device="npu") for _ in range(3)]
    grown = torch.npu.memory_allocated() - before
    assert 6 * MIB <= grown <= 6 * MIB + 3 * 1024
    del held
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before == grown


def test_a_full_device_is_an_out_of_memory_error_and_a_free_one_serves_again() -> None:
    with control.hbm(torch.npu.memory_reserved() + 64 * MIB):
        free, total = torch.npu.mem_get_info()
        assert free == 64 * MIB
        assert total == torch.npu.memory_reserved() + 64 * MIB
        held = torch.empty(50 * MIB, dtype=torch.uint8, device="npu")
        with pytest.raises(torch.OutOfMemoryError, match=r"NPU out of memory\. Tried to allocate 52\.00 MiB"):
            torch.empty(50 * MIB, dtype=torch.uint8, device="npu")
        del held
        assert torch.empty(50 * MIB, dtype=torch.uint8, device="npu").numel() == 50 * MIB


def test_the_runtime_itself_answers_207001() -> None:
    """What the allocator sees, and turns into the error above."""
    import ctypes

    address = ctypes.c_void_p()
    with control.hbm(0):
        assert control.library().aclrtMalloc(ctypes.byref(address), ctypes.c_size_t(512), 0) == 207001


def test_a_full_cache_is_emptied_before_the_error() -> None:
    cached = torch.empty(40 * MIB, dtype=torch.uint8, device="npu")
    del cached
    with control.hbm(torch.npu.memory_reserved() + 10 * MIB), control.counting() as counts:
        torch.empty(48 * MIB, dtype=torch.uint8, device="npu")
    assert counts["free"].calls >= 1


def test_copies_are_counted_by_direction_and_size() -> None:
    host = torch.arange(1000, dtype=torch.float32)
    with control.counting() as counts:
        device = host.npu()
        back = device.cpu()
    assert torch.equal(back, host)
    assert counts["memcpy:h2d"] == control.Count(1, 4000)
    assert counts["memcpy:d2h"] == control.Count(1, 4000)


def test_a_pinned_copy_does_not_wait() -> None:
    host = torch.arange(1000, dtype=torch.float32).pin_memory()
    assert host.is_pinned()
    device = torch.empty(1000, device="npu")
    with control.counting() as counts:
        device.copy_(host, non_blocking=True)
    assert counts.calls("memcpy_async:h2d", "synchronize_stream", "memcpy:h2d") == {
        "memcpy_async:h2d": 1,
        "synchronize_stream": 0,
        "memcpy:h2d": 0,
    }
    assert torch.equal(device.cpu(), host)


def test_a_pinned_buffer_overwritten_too_early_is_seen() -> None:
    """The control of the law that a staging buffer is not reused before its copy has run."""
    seen = set()
    for wait in (True, False):
        with control.order("shuffled", seed=1):
            host = torch.full((100,), 1.0).pin_memory()
            device = torch.empty(100, device="npu")
            device.copy_(host, non_blocking=True)
            if wait:
                torch.npu.current_stream().synchronize()
            host.fill_(2.0)
            seen.add((wait, device[0].item()))
    assert seen == {(True, 1.0), (False, 2.0)}


EXPANDABLE = """
from tests import fake_cann
fake_cann.start()
import torch
from tests.fake_cann import control
MIB = 1 << 20
with control.counting() as counts:
    held = [torch.full((30 * MIB,), i, dtype=torch.uint8, device="npu") for i in range(3)]
    assert [int(one[-1].item()) for one in held] == [0, 1, 2]
    segments = torch.npu.memory_snapshot()
    assert len(segments) == 1 and segments[0]["is_expandable"], segments
    assert torch.empty(MIB, device="npu").isnan().all()
assert counts["malloc"].calls == 0, counts
assert counts["malloc_physical"].bytes >= 90 * MIB, counts
assert counts["map_memory"].calls == counts["malloc_physical"].calls, counts
with control.counting() as counts:
    del held
    torch.npu.empty_cache()
assert counts["unmap_memory"].calls and counts["free_physical"].calls, counts
with control.hbm(64 * MIB):
    try:
        torch.empty(100 * MIB, dtype=torch.uint8, device="npu")
    except torch.OutOfMemoryError:
        torch.empty(32 * MIB, dtype=torch.uint8, device="npu").zero_()
        print("expandable ok")
"""


def test_expandable_segments_map_one_growing_segment() -> None:
    """The allocator reads its configuration once, so this has a process of its own."""
    import os

    environment = {**os.environ, "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXPANDABLE], env=environment, capture_output=True, text=True, check=False
    )
    assert "expandable ok" in done.stdout, done.stderr[-3000:]
