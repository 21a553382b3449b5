"""One rank of a tensor-parallel engine on the fake NPU, with torchrun's variables: `serve_rank MODEL`.

Rank 0 prints, as JSON, what `test_npu_tensor_parallel.py` asks for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from tests import fake_cann

fake_cann.start(num_devices=2)

from tests.npu.engines import WHERE, install_operators, let_float32_through  # noqa: E402 (the fake comes before torch)
from tests.npu.test_npu_serving import crowd  # noqa: E402
from xllm_lab.engine.engine import Engine, EngineOptions  # noqa: E402
from xllm_lab.engine.follow import follow  # noqa: E402
from xllm_lab.engine.rank_place import place_in_environment  # noqa: E402
from xllm_lab.policies.catalog import make_policy  # noqa: E402
from xllm_lab.policies.of_instance import Policies  # noqa: E402
from xllm_lab.records import Records  # noqa: E402

CASES = (("eager", "off"), ("eager", "on"), ("xllm-buckets", "off"), ("xllm-buckets", "length_aware"))


def main(model: str) -> None:
    """Serve each case, or follow who does."""
    install_operators()
    let_float32_through()
    place = place_in_environment()
    assert place is not None
    if place.rank:
        follow(place)
        return
    options = EngineOptions(model=model, device="npu", dtype="float32", tensor_parallel=place.size, rank_timeout_s=60)
    with Engine(options) as engine:
        found = [tokens_and_graphs(engine, shapes, mode) for shapes, mode in CASES]
        sys.stdout.write(json.dumps({"found": found, "model": engine.describe()}) + "\n")


def tokens_and_graphs(engine: Engine, shapes: str, mode: str) -> tuple[dict[int, list[int]], dict[str, Any] | None]:
    """Output tokens by request, and what became of graphs."""
    records, where, policy = Records(), replace(WHERE, async_scheduling=mode), make_policy("batch", "decode-first")
    graphs = engine.serve(crowd(), where, Policies(policy, shapes=make_policy("shapes", shapes)), records)
    return {r.id: r.output_token_ids.tolist() for r in records.requests}, graphs


if __name__ == "__main__":
    main(sys.argv[1])
