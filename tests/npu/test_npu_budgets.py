"""What a decoding step in a graph asks of the device, to the call."""

from __future__ import annotations

import pytest

from tests.fake_cann import control
from tests.fake_cann.pytest_plugin import Ledger
from tests.npu.engines import NUM_LAYERS, Talk, install_operators, let_float32_through, runner
from xllm_lab.engine.drafts.verify import Row
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.workload import RequestId, Sampling


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_decoding_step(rows: int, ledger: Ledger) -> None:
    """One copy of all inputs, one replay, an update of each layer's attention, one look at the tokens; nothing else.

    Looking at the tokens is the only time that the host waits. No memory is asked for, nor given back.
    """
    subject, talk = runner("npu", XllmBuckets()), Talk(5, 150, 127)
    drawing = [Row(Sampling(), RequestId(i), 0) for i in range(rows)]
    subject.run(talk.prefill())
    size = {1: 1, 2: 2, 3: 4}[rows]
    subject.draw(talk.decode(range(rows)), drawing, size)
    for _ in range(3):
        step = talk.decode(range(rows))
        with control.counting() as counts:
            subject.draw(step, drawing, size)
        assert counts.calls() == {
            "memcpy_async:h2d": 1,
            "replay": 1,
            "task_update_begin": NUM_LAYERS,
            "task_update_end": NUM_LAYERS,
            "record_event": NUM_LAYERS,
            "launch:npu::npu_fused_infer_attention_score.out": NUM_LAYERS,
            "launch:aten::argmax.out": 1,
            "memcpy:d2h": 1,
            "synchronize_stream": 1,
        }
    ledger(f"decoding step of {rows} sequences in a graph of {size}, {NUM_LAYERS} layers", counts)
