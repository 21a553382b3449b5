"""Operators on the fake: torch's kernels give torch's results, and what has no kernel fails by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu
from torch.nn import functional

from tests.fake_cann import control, kernels, operators

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
W = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([3, 0, 5, 3])

PURE: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]] = {
    "matmul": lambda at: at(X) @ at(W).t(),
    "linear in bfloat16": lambda at: functional.linear(at(X).bfloat16(), at(W).bfloat16()),
    "softmax": lambda at: at(X).softmax(-1),
    "log_softmax in float16": lambda at: at(X).half().float().log_softmax(-1),
    "embedding": lambda at: functional.embedding(at(IDS), at(X)),
    "index_select": lambda at: at(X).index_select(0, at(IDS)),
    "advanced index": lambda at: at(X)[at(IDS), 2:5],
    "index_put": lambda at: at(X).clone().index_put_((at(IDS[:3]),), at(W[:3])),
    "index_copy of a view": lambda at: at(X).clone()[:, 2:6].index_copy_(0, at(IDS[:3]), at(W[:3, :4])),
    "scatter": lambda at: torch.zeros_like(at(X)).scatter_(1, at(IDS[None]), at(W[:1, :4])),
    "slice assignment": lambda at: at(X).clone().narrow(0, 1, 2).copy_(at(W[:2])),
    "transpose copy": lambda at: at(X).t().contiguous(),
    "where": lambda at: torch.where(at(X) > 0, at(X), 0.0),
    "masked_fill": lambda at: at(X).masked_fill(at(X) > 0, float("-inf")),
    "cat": lambda at: torch.cat([at(X), at(W)]),
    "cumsum": lambda at: at(X).cumsum(0),
    "argmax": lambda at: at(X).argmax(-1),
    "topk values": lambda at: at(X).topk(3).values,
    "sort indices": lambda at: at(X).sort(descending=True).indices,
    "rms": lambda at: at(X) * torch.rsqrt(at(X).pow(2).mean(-1, keepdim=True) + 1e-6),
    "silu": lambda at: functional.silu(at(X)),
    "attention": lambda at: functional.scaled_dot_product_attention(at(X)[None], at(X)[None], at(X)[None]),
    "arange": lambda at: torch.arange(7, device=at(X).device) * 2,
    "to int": lambda at: at(X).to(torch.int32),
    "out argument": lambda at: torch.add(at(X), 1, out=torch.empty(6, 8, device=at(X).device)),
    "resized out argument": lambda at: torch.mm(at(X), at(W).t(), out=torch.empty(0, device=at(X).device)),
    "boolean mask": lambda at: at(X)[at(X) > 0],
    "nonzero": lambda at: (at(X) > 0).nonzero(),
    "empty": lambda at: at(X)[:0] @ at(W).t(),
    "rope": lambda at: torch.polar(at(X).abs(), at(X)).real.contiguous(),
}


@pytest.mark.parametrize("order", ["program", "shuffled"])
@pytest.mark.parametrize("name", PURE)
def test_an_operator_gives_what_torch_gives_on_the_cpu(name: str, order: control.Order) -> None:
    expected = PURE[name](lambda tensor: tensor)
    with control.order(order, seed=1):
        found = PURE[name](lambda tensor: tensor.npu())
        assert found.device.type == "npu"
        assert torch.equal(found.cpu(), expected)


def test_random_numbers_follow_the_device_s_generator() -> None:
    def draw() -> torch.Tensor:
        return torch.cat([torch.randn(4, device="npu"), torch.empty(4, device="npu").exponential_()])

    torch.npu.manual_seed(5)
    first, second = draw(), draw()
    torch.npu.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_a_host_tensor_among_device_tensors_is_refused() -> None:
    x = X.npu()
    with pytest.raises(RuntimeError, match="expected all tensors on the NPU"):
        x + X
    assert torch.equal((X.npu() * torch.tensor(2.0)).cpu(), X * 2)  # a number is welcome


def test_an_operator_without_reference_fails_by_name() -> None:
    x = X.npu()
    with pytest.raises(RuntimeError, match=r"aclnnSwiGlu.* not in libopapi"):
        torch_npu.npu_swiglu(x)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (x.float() * scale * gamma.float()).to(x.dtype), scale


def test_a_reference_computes_an_npu_operator_and_is_counted() -> None:
    operators.install({"npu_rms_norm": rms_norm})
    gamma = torch.arange(8.0)
    with control.counting() as counts:
        y, scale = torch_npu.npu_rms_norm(X.npu(), gamma.npu())
    assert counts.launches() == {"npu::npu_rms_norm": 1}
    expected = rms_norm(X, gamma)
    assert torch.equal(y.cpu(), expected[0])
    assert torch.equal(scale.cpu(), expected[1])


def test_a_reference_of_another_shape_than_the_wheel_s_meta_kernel_is_an_error() -> None:
    operators.install({"npu_rms_norm": lambda x, gamma, epsilon=1e-6: (x, x.float())})
    with pytest.raises(AssertionError, match=r"npu_rms_norm computed \(6, 8\) torch.float32 where \(6, 1\)"):
        torch_npu.npu_rms_norm(X.npu(), torch.ones(8).npu())


def test_a_reference_that_writes_its_arguments() -> None:
    def write(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
              **_: object) -> None:  # fmt: skip
        keys.view(-1, *keys.shape[2:])[slots.long()] = key
        values.view(-1, *values.shape[2:])[slots.long()] = value

    operators.install({"npu_scatter_pa_kv_cache": write})
    caches = [torch.zeros(2, 16, 1, 32, device="npu") for _ in range(2)]
    rows = torch.randn(3, 1, 32)
    slots = torch.tensor([4, 17, 30], dtype=torch.int32).npu()
    torch_npu.npu_scatter_pa_kv_cache(rows.npu(), (rows + 1).npu(), *caches, slots, cache_mode="Norm")
    flat = caches[0].view(32, 1, 32).cpu()
    assert torch.equal(flat[[4, 17, 30]], rows)
    flat[[4, 17, 30]] = 0
    assert not flat.any()


def test_every_aten_kernel_of_the_wheel_is_ours_but_those_of_memory() -> None:
    """Otherwise an operator might reach the wheel's own kernel, which needs the device's libraries."""
    kept = [name for name, op in kernels.wheel_kernels() if not kernels.is_ours(name) and not kernels.is_view(op)]
    assert [name for name in kept if name not in kernels.KEPT and not name.startswith(kernels.KEPT_NAMES)] == []
    assert len(list(kernels.wheel_kernels())) > 1000
