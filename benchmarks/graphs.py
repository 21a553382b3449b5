"""What a replayed step costs beside the same step run eagerly, on SmolLM2, in processor time.

    python benchmarks/graphs.py --dtypes bfloat16 float32 --repeats 40

Decodes of 1 to 64 sequences with 200 tokens in KV each, and a step of decodes and a prompt. Each repeat runs the step
eagerly and replayed, in changing order, its inputs prepared anew, logits and the largest of each row included.
One JSON object a line: medians, the median of the paired differences with its middle half, and what a capture took.
Fails if the logits differ in one bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.step_shape import StepShape, decide_shape

CONFIG = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=64, block_size=16, num_kv_blocks=1024, max_model_len=2048
)
SHAPES = VllmBuckets()
CONTEXT = 200


def decodes(count: int) -> list[SequenceChunk]:
    """Sequences with blocks of their own."""
    return [SequenceChunk([5 + i], CONTEXT, tuple(range(14 * i, 14 * i + 14)), True) for i in range(count)]


def size(chunks: list[SequenceChunk]) -> int | None:
    num_tokens = sum(len(c.token_ids) for c in chunks)
    shape = StepShape(
        num_tokens=num_tokens,
        num_seqs=len(chunks),
        is_decode=num_tokens == len(chunks),
        max_context_tokens=CONTEXT + 1,
        max_tokens_per_batch=CONFIG.max_tokens_per_batch,
        max_seqs_per_batch=CONFIG.max_seqs_per_batch,
        max_model_len=CONFIG.max_model_len,
    )
    return decide_shape(SHAPES, shape).num_tokens


def timed_us(runner: Runner, engine: Engine, chunks: list[SequenceChunk], graph_tokens: int | None) -> float:
    start_ns = time.process_time_ns()
    engine.model.model.ops.argmax(runner.run(chunks, graph_tokens))
    return (time.process_time_ns() - start_ns) / 1000


def measure(engine: Engine, runner: Runner, name: str, chunks: list[SequenceChunk], repeats: int) -> None:
    graph_tokens = size(chunks)
    eager_logits = runner.run(chunks).clone()
    assert torch.equal(eager_logits, runner.run(chunks, graph_tokens)), "a replayed step gave other logits"
    eager_us, replayed_us = [], []
    for repeat in range(repeats):
        for is_eager in (True, False) if repeat % 2 else (False, True):
            found = timed_us(runner, engine, chunks, None if is_eager else graph_tokens)
            (eager_us if is_eager else replayed_us).append(found)
    saved = sorted(e - r for e, r in zip(eager_us, replayed_us, strict=True))
    row = {
        "dtype": str(engine.model.model.dtype).removeprefix("torch."),
        "step": name,
        "graph_tokens": graph_tokens,
        "eager_us": round(statistics.median(eager_us)),
        "replayed_us": round(statistics.median(replayed_us)),
        "saved_us": round(statistics.median(saved)),
        "saved_us_middle_half": [round(saved[len(saved) // 4]), round(saved[3 * len(saved) // 4])],
        "cheapest_us": [round(min(eager_us)), round(min(replayed_us))],
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    for dtype in args.dtypes:
        engine = Engine(EngineOptions(device="cpu", dtype=dtype))
        runner = engine.runner(CONFIG, SHAPES)
        assert runner.graphs is not None
        runner.graphs.warm()
        for count in (1, 16, 17, 64):
            measure(engine, runner, f"decode {count}", decodes(count), args.repeats)
        prompt = SequenceChunk(list(range(48)), 0, tuple(range(900, 903)), True)
        measure(engine, runner, "16 decodes, 48 prompt tokens", [*decodes(16), prompt], max(4, args.repeats // 4))
        print(json.dumps({"dtype": dtype, **runner.graphs.describe()}), flush=True)


if __name__ == "__main__":
    main()
