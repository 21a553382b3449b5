"""Every operator that we declare through the real wheel: its dispatcher, its schemas, and its shapes of results.

The fake compares what a reference returns with what the wheel's own function for meta tensors says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.engine.npu.by_reference import References
from tests.engine.npu.samples import CALLS, on
from tests.fake_cann import control
from tests.npu.engines import install_operators
from xllm_lab.engine.device import open_device
from xllm_lab.engine.ops.npu.operators import OPERATORS, calling, check_calls


@pytest.fixture(scope="module", autouse=True)
def _checked() -> Iterator[None]:
    install_operators()
    check_calls(on=True)
    yield
    check_calls(on=False)


def on_cpu(result: Any) -> Any:
    return pytree.tree_map(lambda one: one.cpu() if isinstance(one, torch.Tensor) else one, result)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_wheel_takes_our_call(operator: str) -> None:
    """One launch of that operator, and the result of the reference on a CPU."""
    device = open_device("npu")
    # As the engine runs: of operators that can be differentiated, other kernels would be taken.
    with on(device.torch_device), control.counting() as counts, torch.inference_mode():
        result = on_cpu(CALLS[operator]())
    assert counts.launches()[f"npu::{operator}"] == 1
    with calling(References()):
        expected = CALLS[operator]()
    if operator != "_npu_fused_infer_attention_score_get_max_workspace":  # whose contents mean nothing
        torch.testing.assert_close(result, expected)


def test_a_stream_gets_its_share_of_the_cores() -> None:
    """And the others keep theirs."""
    device = open_device("npu")
    assert device.streams is not None
    one, other = device.streams.new(), device.streams.new()
    before = device.streams.cores(other)
    assert device.streams.limit_cores(one, cube_cores=8, vector_cores=16)
    assert device.streams.cores(one) == (8, 16)
    assert device.streams.cores(other) == before
