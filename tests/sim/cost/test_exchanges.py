"""What devices exchange: each layout's operations counted by hand, and nothing where there is one device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_lab.hardware import Link
from xllm_lab.known_models import known_model
from xllm_lab.sim.cost.collectives import Collectives
from xllm_lab.sim.cost.exchanges import Exchanges

QWEN, LLAMA, DEEPSEEK = (known_model(n) for n in ("qwen3-30b-a3b", "llama-3.1-8b", "deepseek-v3"))
LINK = Link(bytes_per_s=1e9, latency_us=3.0, num_devices=64, frac=1.0)


def links(num_devices: int) -> Collectives:
    return Collectives(num_devices, LINK, kernel_us=0.0)


@dataclass
class Counting:
    """Collectives that cost 1 us, and count who does what with how many bytes."""

    calls: Counter[tuple[str, int, float]] = field(default_factory=Counter)

    def __call__(self, num_devices: int) -> Collectives:
        outer = self

        class Counted(Collectives):
            def all_gather_us(self, num_bytes: float) -> float:
                return outer.count("gather", num_devices, num_bytes)

            def reduce_scatter_us(self, num_bytes: float) -> float:
                return outer.count("scatter", num_devices, num_bytes)

            def all_reduce_us(self, num_bytes: float) -> float:
                return outer.count("reduce", num_devices, num_bytes)

        return Counted(num_devices, LINK, kernel_us=0.0)

    def count(self, what: str, num_devices: int, num_bytes: float) -> float:
        self.calls[what, num_devices, num_bytes] += 1
        return 1.0


@pytest.mark.parametrize(
    ("layout", "in_experts"),
    [
        ({"tensor": 4}, [("reduce", 4, 1.0)]),
        ({"tensor": 4, "expert": 4}, [("reduce", 4, 1.0)]),
        ({"data": 2, "expert": 2}, [("gather", 2, 1.0), ("scatter", 2, 1.0)]),
        ({"data": 2}, [("gather", 2, 1.0), ("scatter", 2, 1.0)]),
        ({"tensor": 4, "data": 2}, [("gather", 2, 1.0), ("scatter", 2, 1.0), ("reduce", 4, 1.0)]),
        (
            {"tensor": 4, "data": 2, "expert": 8},
            [("gather", 8, 0.25), ("scatter", 8, 0.25), ("gather", 4, 0.25)],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_each_layouts_operations(layout: dict[str, int], in_experts: list[tuple[str, int, float]]) -> None:
    """Parts are of a token's activations; and a tensor group sums after attention and dense feed-forwards."""
    counting = Counting()
    us = Exchanges(model=DEEPSEEK, links=counting, **layout).us(1)
    experts = DEEPSEEK.experts
    assert experts is not None
    whole = 2.0 * DEEPSEEK.hidden_size
    asked = {(what, n, num_bytes / whole) for what, n, num_bytes in counting.calls}
    summed = {("reduce", layout["tensor"], 1.0)} if "tensor" in layout else set()
    assert asked == {*in_experts} | summed
    sums = (2 * DEEPSEEK.num_layers - experts.num_layers) * ("tensor" in layout)
    assert us == experts.num_layers * len(in_experts) + sums


def test_a_dense_model_sums_twice_a_layer() -> None:
    num_bytes = 100 * 2.0 * LLAMA.hidden_size
    us = Exchanges(model=LLAMA, links=links, tensor=2).us(100)
    assert us == pytest.approx(2 * LLAMA.num_layers * links(2).all_reduce_us(num_bytes))


@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), st.integers(0, 4096))
def test_more_tokens_are_never_cheaper(tensor: int, data: int, spreads: bool, tokens: int) -> None:
    expert = tensor * data if spreads else 1
    exchanges = Exchanges(model=QWEN, links=links, tensor=tensor, data=data, expert=expert)
    assert exchanges.us(tokens + 1) >= exchanges.us(tokens) >= 0
    if tensor * data == 1:
        assert exchanges.us(tokens) == 0
