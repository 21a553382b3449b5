"""Shapes policies: which graph a step runs in, against lists of sizes written down here."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies.shape_sins import CutsTheStep
from xllm_lab.errors import PolicyError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.step import Decodes, ScheduledChunk, Step
from xllm_lab.step_shape import StepShape, decide_shape, graph_sizes, shape_of
from xllm_lab.workload import RequestId

CONFIG = InstanceConfig(max_seqs_per_batch=64, max_tokens_per_batch=4096)


def shape(num_tokens: int, *, num_seqs: int | None = None, max_seqs: int = 64, context: int = 100) -> StepShape:
    return StepShape(
        num_tokens=num_tokens,
        num_seqs=num_seqs or num_tokens,
        is_decode=num_seqs is None,
        max_context_tokens=context,
        max_tokens_per_batch=4096,
        max_seqs_per_batch=max_seqs,
        max_model_len=8192,
    )


@pytest.mark.parametrize(
    ("max_seqs", "limit", "sizes"),
    [
        (64, 64, [64, 48, 32, 16, 8, 4, 2, 1]),
        (40, 40, [40, 32, 16, 8, 4, 2, 1]),  # as xLLM's own test of its warm-up, profile_graph_warmup_test.cpp
        (64, 16, [16, 8, 4, 2, 1]),
        (64, 5, [8, 4, 2, 1]),
        (3, 16, [3, 2, 1]),
    ],
)
def test_xllm_decodes_in_its_buckets(max_seqs: int, limit: int, sizes: list[int]) -> None:
    """1, 2, 4, 8, multiples of 16, and the most sequences that there can be."""
    config = dataclasses.replace(CONFIG, max_seqs_per_batch=max_seqs)
    assert graph_sizes(XllmBuckets(acl_graph_decode_batch_size_limit=limit), config, is_decode=True) == sizes


def test_xllm_runs_eagerly_what_it_does_not_capture() -> None:
    """With the words that are counted."""
    policy = XllmBuckets()
    assert decide_shape(policy, shape(17)).reason == "decode batch above the limit"
    assert decide_shape(policy, shape(30, num_seqs=2)).reason == "prefill"
    assert decide_shape(policy, shape(3, context=9000)).reason == "context above the model's"
    piecewise = XllmBuckets(enable_prefill_piecewise_graph=True)
    assert decide_shape(piecewise, shape(30, num_seqs=2)).num_tokens == 32
    assert decide_shape(piecewise, shape(2049, num_seqs=2)).reason == "prefill above the limit"
    assert decide_shape(piecewise, shape(2048, num_seqs=2)).num_tokens == 2048


def test_without_padding_every_batch_has_its_graph() -> None:
    """One more graph for each size."""
    policy = XllmBuckets(enable_graph_mode_decode_no_padding=True)
    assert graph_sizes(policy, CONFIG, is_decode=True) == list(range(16, 0, -1))
    assert decide_shape(policy, shape(13)).reason == "exact"


def test_vllm_has_its_sizes() -> None:
    """As the simulator's list of them, and none above twice the sequences."""
    config = dataclasses.replace(CONFIG, max_seqs_per_batch=300)
    expected = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert graph_sizes(VllmBuckets(), config, is_decode=False) == expected[:0:-1]
    assert graph_sizes(VllmBuckets(), config, is_decode=True) == [300, *(s for s in expected[::-1] if s <= 300)]
    small = dataclasses.replace(CONFIG, max_seqs_per_batch=3)
    assert graph_sizes(VllmBuckets(), small, is_decode=False) == [4, 2]
    assert graph_sizes(VllmBuckets(cudagraph_mode="full_decode_only"), config, is_decode=False) == []


@given(num_tokens=st.integers(1, 64))
def test_powers_of_two_pad_less_than_half(num_tokens: int) -> None:
    """And eager pads nothing."""
    size = decide_shape(PowersOfTwo(), shape(num_tokens)).num_tokens
    assert size is not None
    assert num_tokens <= size < 2 * num_tokens
    assert size & (size - 1) == 0
    assert decide_shape(Eager(), shape(num_tokens)).num_tokens is None


@pytest.mark.parametrize("name", policies("shapes"))
@given(max_seqs=st.integers(1, 70), data=st.data())
def test_the_sizes_found_by_asking_are_all_that_decodes_use(name: str, max_seqs: int, data: st.DataObject) -> None:
    """So a device that captured them captures no more."""
    policy: ShapesPolicy = policies("shapes")[name]()
    config = dataclasses.replace(CONFIG, max_seqs_per_batch=max_seqs)
    sizes = graph_sizes(policy, config, is_decode=True)
    some = shape(data.draw(st.integers(1, max_seqs)), max_seqs=max_seqs, context=data.draw(st.integers(1, 8192)))
    assert decide_shape(policy, some).num_tokens in (*sizes, None)


def test_an_illegal_plan_is_refused_with_the_numbers() -> None:
    """A graph smaller than the step would lose tokens."""
    with pytest.raises(PolicyError, match="cuts-the-step runs a step of 20 tokens, 20 sequences, in a graph of 16"):
        decide_shape(CutsTheStep(), shape(20))


def test_the_shape_of_a_step() -> None:
    """Decodes and chunks together."""
    step = Step(0, 0, Decodes((RequestId(1), RequestId(2)), (3, 9), 1, 14, 10), (), (), (), (), "", 0, 0, 0, 0, 0, 0)
    found = shape_of(step, CONFIG)
    assert (found.num_tokens, found.num_seqs, found.is_decode, found.max_context_tokens) == (2, 2, True, 11)
    step.others = (ScheduledChunk(RequestId(3), 5, 20, True),)
    found = shape_of(step, CONFIG)
    assert (found.num_tokens, found.num_seqs, found.is_decode, found.max_context_tokens) == (7, 3, False, 25)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PowersOfTwo(max_graph_tokens=0), "max_graph_tokens is 0, at least 1 is accepted"),
        (lambda: XllmBuckets(max_tokens_for_graph_mode=-1), "max_tokens_for_graph_mode is -1, at least 0 is accepted"),
        (lambda: VllmBuckets(cudagraph_mode="full"), "cudagraph_mode is 'full', accepted: full_decode_only, full_and"),
    ],
)
def test_bad_knobs_are_refused(make: object, told: str) -> None:
    """With what is accepted."""
    assert callable(make)
    with pytest.raises(ValueError, match=told):
        make()
