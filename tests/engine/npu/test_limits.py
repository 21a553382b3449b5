"""Validators accept what we do, and find what the documentation of each operator rules out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.npu.by_reference import References
from tests.engine.npu.samples import ALONE, CALLS, TOP_K, WIDE, D, E, H, K, N, P, R, experts, paged, random
from xllm_lab.engine.ops.npu import calls
from xllm_lab.engine.ops.npu.operators import OPERATORS, LimitError, calling, check_calls


@pytest.fixture(autouse=True)
def _checked() -> Iterator[None]:
    check_calls(on=True)
    with calling(References()):
        yield
    check_calls(on=False)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_our_calls_are_within_limits(operator: str) -> None:
    CALLS[operator]()


def attend(**changes: Any) -> None:
    query = paged()._replace(**changes)
    calls.attend(query, None, torch.empty_like(query.q_TNH), torch.empty(1))


def scatter(slots: Any = (0, 700, 5), rows: int = 3, heads: int = K) -> None:
    pools = torch.zeros(2, 6, P, K, H, dtype=torch.bfloat16)
    calls.scatter_kv(random(rows, heads, H), random(rows, heads, H), pools[0], pools[1], torch.as_tensor(slots))


def pools(block_size: int = P, heads: int = K) -> dict[str, Any]:
    return dict.fromkeys(("k_BPF", "v_BPF"), random(6, block_size, heads * H))


TOO_MUCH: dict[str, tuple[Callable[[], Any], str]] = {
    "blocks of 16 tokens": (lambda: attend(**pools(16)), "block_size is 16; accepted: 128, 256, 384, 512"),
    "float32": (lambda: attend(q_TNH=random(9, N, H, dtype=torch.float32)), "dtype of query is torch.float32"),
    "a pool of another type": (lambda: attend(v_BPF=random(6, P, K * H).half()), "dtype of value is torch.float16"),
    "an int64 table": (lambda: attend(table_SM=paged().table_SM.long()), "dtype of block_table is torch.int64"),
    "no such block": (lambda: attend(table_SM=paged().table_SM + 1), r"block_table\[1\] is 6; accepted: 0 to 5"),
    "a short table": (lambda: attend(table_SM=paged().table_SM[:, :1].contiguous()), "columns of block_table is 1"),
    "a table for two": (lambda: attend(table_SM=paged().table_SM[:2]), "rows of block_table is 2"),
    "lengths not cumulated": (lambda: attend(cumulated_S=[1, 3, 5]), "last of actual_seq_lengths is 5; accepted: 9"),
    "lengths that fall": (lambda: attend(cumulated_S=[5, 4, 9]), r"actual_seq_lengths\[1\] is 4"),
    "fewer keys than queries": (lambda: attend(kv_len_S=[7, 2, 5]), r"actual_seq_lengths_kv\[1\] is 2"),
    "lengths of keys for two": (lambda: attend(kv_len_S=[7, 130]), "length of actual_seq_lengths_kv is 2"),
    "heads of 8 numbers": (lambda: attend(q_TNH=random(9, N, 8)), "head dim is 8; accepted: multiples of 16"),
    "a small mask": (lambda: attend(mask=paged().mask[:9, :9].contiguous()), r"shape of atten_mask is \(9, 9\)"),
    "strided queries": (lambda: attend(q_TNH=random(9, N + 1, H)[:, 1:]), "strides of query"),
    "a slot twice": (lambda: scatter([0, 5, 5]), "slot_mapping is .*; accepted: each slot once"),
    "a negative slot": (lambda: scatter([0, -1, 5]), "slot_mapping is -1; accepted: 0 to 767"),
    "a slot behind the pool": (lambda: scatter([0, 768, 5]), "slot_mapping is 768"),
    "other heads than the pool": (lambda: scatter(heads=K + 1), "shape of key_cache"),
    "a weight of another type": (lambda: calls.rms_norm(random(R, D), random(D).half(), 1e-5), "dtype of gamma"),
    "a weight of another width": (lambda: calls.rms_norm(random(R, D), random(D + 1), 1e-5), "shape of gamma"),
    "rows of another number": (
        lambda: calls.add_rms_norm(random(R, D), random(R + 1, D), random(D), 1e-5),
        "shape of x2",
    ),
    "too many heads": (lambda: calls.rotate(random(2, 1000, H), random(2, H), random(2, H)), "batch and heads"),
    "an odd width": (lambda: calls.rotate(random(2, N, 7), random(2, 7), random(2, 7)), "even, below 896"),
    "half a half": (lambda: calls.swiglu(random(R, 7)), "width of input is 7; accepted: even"),
    "a transposed input": (lambda: calls.matmul_all_reduce(random(D, R).T, random(D, WIDE), "a"), "strides of x1"),
    "no communicator": (lambda: calls.matmul_all_reduce(random(R, D), random(D, WIDE), ""), "hcom is "),
    "no rows": (lambda: calls.matmul_all_reduce(random(0, D), random(D, WIDE), "a"), "not empty"),
    "nothing to load": (lambda: calls.prefetch(random(D, WIDE), None, 0), "max_size is 0; accepted: above 0"),
    "another format": (lambda: calls.format_cast(random(D, WIDE), 3), "acl_format is 3; accepted: 2, 29"),
    "float32 for matrix units": (
        lambda: calls.format_cast(random(D, WIDE).float(), calls.FRACTAL_NZ),
        "dtype of input",
    ),
    "more experts than there are": (lambda: calls.gate(random(R, E), E + 1), "k is 5; accepted: 1 to 4"),
    "experts by int64": (lambda: calls.sort_by_expert(random(R, D), experts().long(), E), "dtype of expert_idx"),
    "an expert of another model": (lambda: calls.sort_by_expert(random(R, D), experts(), 3), "expert_idx is 3"),
    "counts by int32": (
        lambda: calls.experts_matmul(random(12, D), random(E, D, WIDE), torch.tensor([3, 0, 5, 4]).int()),
        "dtype of group_list",
    ),
    "more rows than there are": (
        lambda: calls.experts_matmul(random(12, D), random(E, D, WIDE), torch.tensor([3, 0, 5, 5])),
        "rows in group_list is 13",
    ),
    "a row twice": (
        lambda: calls.sum_over_experts(random(12, D), torch.zeros(12).int(), random(R, TOP_K)),
        "sorted_indices is 1",
    ),
    "ranks that share unevenly": (
        lambda: calls.dispatch(random(R, D), experts(), ALONE._replace(size=3)),
        "moe_expert_num is 4; accepted: a multiple of 3",
    ),
    "weights in bfloat16": (
        lambda: calls.combine(
            random(12, D), experts(), random(R, TOP_K), calls.dispatch(random(R, D), experts(), ALONE), ALONE
        ),
        "dtype of expert_scales",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_the_documentation_rules_out_is_found(case: str) -> None:
    call, message = TOO_MUCH[case]
    with pytest.raises(LimitError, match=message):
        call()


def test_unasked_nothing_is_checked() -> None:
    """A run pays for checks only where it asked for them."""
    check_calls(on=False)
    scatter([0, 5, 5])
