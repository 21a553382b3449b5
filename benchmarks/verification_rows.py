"""What the verification of drafts costs beside a plain decode: steps of 1 to 16 rows of one sequence, on SmolLM2.

    python benchmarks/verification_rows.py --dtypes float32 bfloat16 --context 512 --repeats 24

Row counts take turns, eagerly (one chunk of several tokens) and in a captured graph (each row a sequence of its own, as
the engine verifies in graphs), in processor time with head, the largest logit of each row, and inputs prepared anew.
One JSON object a line: medians, and the ratio to one row's step in the same turn, median and middle half. `a further
row` is what `AcceptanceDriven.row_cost_frac` stands for. Fails if a row's logits are not the bits of a plain decode.
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

CONFIG = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=16, block_size=16, num_kv_blocks=512, max_model_len=4096
)
ROWS = (1, 2, 3, 5, 9, 16)


def verification(rows: int, context: int, *, apart: bool) -> list[SequenceChunk]:
    """Rows of one sequence, as one chunk or each by itself."""
    tokens, table = [5 + i for i in range(rows)], tuple(range(-(-(context + rows) // CONFIG.block_size)))
    if apart:
        return [SequenceChunk([token], context + i, table, 1) for i, token in enumerate(tokens)]
    return [SequenceChunk(tokens, context, table, rows)]


def refuse_other_bits(runner: Runner, context: int, most_rows: int, size: int | None) -> None:
    """SystemExit if logits of several rows are not those of the same tokens decoded one by one."""
    chunks = verification(most_rows, context, apart=True)
    alone = torch.cat([runner.run([chunk]).clone() for chunk in chunks])
    if not torch.equal(runner.run(verification(most_rows, context, apart=size is not None), size), alone):
        raise SystemExit(f"{most_rows} rows have other logits than rows decoded alone")


def measure(engine: Engine, context: int, repeats: int, *, graphs: bool) -> dict[int, list[float]]:
    """Microseconds of each turn, by row count."""
    runner = engine.runner(CONFIG, VllmBuckets()) if graphs else engine.runner(CONFIG)
    if runner.graphs is not None:
        runner.graphs.warm()
    argmax, sizes = engine.model.model.ops.argmax, {1: 1, 2: 2, 3: 4, 5: 8, 9: 16, 16: 16}
    refuse_other_bits(runner, context, 9, 16 if graphs else None)
    found: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for repeat in range(repeats + 1):
        for rows in ROWS if repeat % 2 else ROWS[::-1]:
            chunks = verification(rows, context, apart=graphs)
            start_ns = time.process_time_ns()
            argmax(runner.run(chunks, sizes[rows] if graphs else None))
            if repeat:
                found[rows].append((time.process_time_ns() - start_ns) / 1000)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=24)
    args = parser.parse_args()
    for dtype in args.dtypes:
        engine = Engine(EngineOptions(device="cpu", dtype=dtype))
        for graphs in (False, True):
            found = measure(engine, args.context, args.repeats, graphs=graphs)
            for rows, times_us in found.items():
                ratios = sorted(us / one for us, one in zip(times_us, found[1], strict=True))
                line = {
                    "dtype": dtype,
                    "in": "graph" if graphs else "eager",
                    "rows": rows,
                    "ms": round(statistics.median(times_us) / 1e3, 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "middle_half": [round(ratios[len(ratios) // 4], 2), round(ratios[3 * len(ratios) // 4], 2)],
                }
                if rows > 1:
                    line["a further row"] = round((statistics.median(ratios) - 1) / (rows - 1), 3)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
