"""A tiny model served on the fake device: the CPU engine's tokens, in graphs too, whatever the order of its streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fake_cann import control
from tests.npu.engines import WHERE, Talk, engine, folder, install_operators, let_float32_through, runner, served
from tests.small_runs import request
from tests.tiny_models import VOCAB_SIZE
from xllm_lab.engine.device import open_device
from xllm_lab.engine.drafts.verify import Row
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.workload import RequestId, Sampling, Workload

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, one group": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama, biased": {"attention_bias": True},
    "qwen3": {"model_type": "qwen3", "architectures": ("Qwen3ForCausalLM",)},
}
ORDERS: tuple[tuple[control.Order, int], ...] = (("program", 0), ("shuffled", 3), ("threads", 5))


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


def crowd(count: int = 9, output: int = 11) -> Workload:
    """Prompts from a few tokens to three blocks; every other one shares its first block with the one before it."""
    return Workload(
        requests=tuple(
            request(i, 300 * i, prompt=5 + 37 * (i % 5) + 128 * (i % 2), output=output, hashes=(7,) * 32 * (i % 2))
            for i in range(count)
        ),
        source="crowd",
    )


@pytest.mark.parametrize("model", MODELS)
def test_eager_steps_compute_what_the_cpu_computes(model: str) -> None:
    """Token for token, prompts in chunks beside decodes, sequences on several blocks."""
    at = folder(**MODELS[model])
    assert served(engine("npu", model=at), crowd())[0] == served(engine("cpu", model=at), crowd())[0]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
@pytest.mark.parametrize(
    ("shapes", "knobs"),
    [
        ("xllm-buckets", {}),
        ("xllm-buckets", {"enable_graph_mode_decode_no_padding": True}),
        ("powers-of-two", {"max_graph_tokens": 4, "graphs_prefill": True}),
        ("vllm-buckets", {}),
    ],
)
def test_graphs_compute_what_eager_steps_compute(
    shapes: str, knobs: dict[str, Any], order: tuple[control.Order, int]
) -> None:
    """Whole decoding graphs and prompts in pieces; late streams, delays and any order that events allow."""
    expected, _ = served(engine("cpu"), crowd())
    name, seed = order
    with control.order(name, seed=seed, max_delay_us=200):
        tokens, graphs = served(engine("npu"), crowd(), shapes=shapes, **knobs)
    assert tokens == expected
    assert graphs is not None
    assert graphs["replays"] > graphs["captures"] > 0


@pytest.mark.parametrize("mode", ["off", "on", "length_aware"])
def test_planning_ahead_changes_nothing(mode: str) -> None:
    """The device's thread captures and replays while the host plans."""
    where = InstanceConfig(**{**vars_of(WHERE), "async_scheduling": mode})
    expected, _ = served(engine("cpu"), crowd())
    assert served(engine("npu"), crowd(), where, "xllm-buckets")[0] == expected


@pytest.mark.parametrize("seed", range(4))
def test_who_serves_on_a_stream_of_its_own_is_served_there(seed: int) -> None:
    """The thread beside the host computes behind what the host has prepared."""
    where = InstanceConfig(**{**vars_of(WHERE), "async_scheduling": "on"})
    expected, _ = served(engine("cpu"), crowd())
    with control.order("shuffled", seed=seed), torch.npu.stream(torch.npu.Stream()):
        assert served(engine("npu"), crowd(), where)[0] == expected


def test_a_tight_pool_preempts_and_recomputes() -> None:
    """Blocks of one request become another's, in graphs too."""
    where = InstanceConfig(**{**vars_of(WHERE), "num_kv_blocks": 7})
    expected, _ = served(engine("cpu"), crowd(), where)
    assert served(engine("npu"), crowd(), where, "xllm-buckets")[0] == expected


def test_steps_above_the_limit_are_eager_and_counted() -> None:
    tokens, graphs = served(engine("npu"), crowd(), shapes="xllm-buckets", acl_graph_decode_batch_size_limit=2)
    assert tokens == served(engine("cpu"), crowd())[0]
    assert graphs is not None
    assert set(graphs["eager"]) == {"decode batch above the limit", "prefill"}


def vars_of(where: InstanceConfig) -> dict[str, Any]:
    return {name: getattr(where, name) for name in type(where).__dataclass_fields__}


def test_bfloat16_within_the_operators_limits() -> None:
    """Every call is held against the documentation; logits are the CPU's up to rounding, the same in graphs."""
    npu, talks = engine("npu", "bfloat16", check_ops=True), [Talk(5, 150, 127) for _ in range(3)]
    runners = [
        npu._runner(WHERE),
        npu._runner(WHERE, XllmBuckets()),
        engine("cpu", "bfloat16")._runner(WHERE),
    ]
    for step in range(6):
        eager, captured, cpu = (
            subject.run(talk.decode() if step else talk.prefill(), 4 if step and subject.graphs else None).cpu()
            for subject, talk in zip(runners, talks, strict=True)
        )
        torch.testing.assert_close(captured, eager, rtol=2e-2, atol=0.1)
        torch.testing.assert_close(eager, cpu, rtol=5e-2, atol=0.5)
    ops = npu.describe()["ops"]
    assert {name: served["by"] for name, served in ops.items()} == dict.fromkeys(ops, "torch_npu") | {"linear": "torch"}


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_draws_nothing_is_done_before_the_next_is_written(seed: int) -> None:
    """Nobody waits for its tokens, and what it reads is copied from where the host writes the next step's."""
    subject, expected = runner("npu", VllmBuckets()), runner("cpu")
    talks, tokens = [Talk(0, 0), Talk(0, 0)], []
    with control.order("shuffled", seed=seed):
        for one, talk in zip((subject, expected), talks, strict=True):
            for length in (40, 56, 24):
                silent = [talk.chunk(row, length)._replace(num_logits=0) for row in (0, 1)]
                one.draw(silent, [], 2 * length if one.graphs else None)
            size = 2 if one.graphs else None
            both = [[Row(Sampling(), RequestId(row), step) for row in (0, 1)] for step in range(4)]
            tokens.append([one.draw(talk.decode(), rows, size) for rows in both])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("shapes", [XllmBuckets(), VllmBuckets(), PowersOfTwo(graphs_prefill=True)])
def test_lengths_change_between_replays(shapes: Any) -> None:
    """Across blocks, shrinking and growing batches, each sequence at another length; no row sees another's."""
    captured, eager = runner("npu", shapes), runner("npu")
    talks = [Talk(3, 190, 120, 1), Talk(3, 190, 120, 1)]
    assert captured.run(talks[0].prefill()).shape == eager.run(talks[1].prefill()).shape
    for rows in ((0,), (0, 1), (1, 2, 3), (2,), (0, 1, 2, 3), (3, 1)) * 3:
        size = {1: 1, 2: 2, 3: 4, 4: 4}[len(rows)]
        replayed = captured.run(talks[0].decode(rows), size)
        torch.testing.assert_close(replayed, eager.run(talks[1].decode(rows)), rtol=1e-4, atol=1e-4)


def test_padding_writes_nobodys_block() -> None:
    """And reads only what is there: fresh memory of the fake is not a number."""
    subject = runner("npu", XllmBuckets())
    layers = subject.kv_pool.layers
    for layer in layers:
        layer.k_BPKH.fill_(3.0)
        layer.v_BPKH.fill_(3.0)
    logits = subject.run([SequenceChunk([i], 0, (i,), True) for i in (1, 2, 3)], 4)
    assert logits.isfinite().all()
    for layer in layers:
        for tensor in layer:
            written = (tensor.cpu() != 3.0).flatten(2).any(-1)
            assert {tuple(place) for place in written.nonzero().tolist()} == {
                *((block, 0) for block in (1, 2, 3)),
                (WHERE.num_kv_blocks, 0),
            }


def test_a_run_tells_of_its_device(tmp_path: Any) -> None:
    """The manifest has what the runtime says, and what serves each operator; the hosts decide alike."""
    from xllm_lab.policies.catalog import make_policy
    from xllm_lab.policies.of_instance import Policies
    from xllm_lab.runs import read_run

    engine("npu").replay(
        crowd(4), WHERE, Policies(make_policy("batch", "fcfs"), shapes=XllmBuckets()), out=tmp_path / "run"
    )
    manifest = read_run(tmp_path / "run").manifest
    assert manifest.model is not None
    assert "Ascend910B2, 24 cube and 48 vector cores" in manifest.model["device"]
    assert "torch_npu 2.13.0" in manifest.model["device"]
    assert manifest.model["ops"]["paged_attention"]["by"] == "torch_npu"
    assert manifest.model["vocab_size"] == VOCAB_SIZE


def test_a_stream_of_our_own_is_never_the_one_that_replays() -> None:
    """torch hands out the same 32 again and again; an update behind the replay that waits for it would never come."""
    streams = open_device("npu").streams
    assert streams is not None
    before = streams.current()
    try:
        for _ in range(40):
            streams.use(streams.new())
            one = streams.new()
            other = streams.new(one)
            assert len({s.npu_stream for s in (streams.current(), one, other)}) == 3
    finally:
        streams.use(before)
