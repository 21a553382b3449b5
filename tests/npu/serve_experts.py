"""One of two ranks that share experts on the fake NPU, with torchrun's variables: `serve_experts MODEL`.

Each rank prints, as JSON, what `test_npu_expert_parallel.py` asks for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from tests import fake_cann

fake_cann.start(num_devices=2)

import torch  # noqa: E402 (the fake comes before it)
from torch import Tensor  # noqa: E402

from tests.fake_cann import control, operators  # noqa: E402
from tests.npu.engines import WHERE, Talk, install_operators, let_float32_through  # noqa: E402
from tests.npu.serve_rank import tokens_and_graphs  # noqa: E402
from xllm_lab.engine.engine import Engine, EngineOptions  # noqa: E402
from xllm_lab.engine.follow import follow  # noqa: E402
from xllm_lab.engine.ops.npu import limits  # noqa: E402
from xllm_lab.engine.ops.npu.moe_references import combined, dispatched  # noqa: E402
from xllm_lab.engine.rank_place import Place, place_in_environment  # noqa: E402
from xllm_lab.engine.ranks import join  # noqa: E402
from xllm_lab.errors import ConfigError  # noqa: E402
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets  # noqa: E402

DISPATCHES = ("all-gather", "all-to-all")
CASES = (("eager", "off"), ("xllm-buckets", "length_aware"))


def main(model: str, layout: str, dispatch: str) -> None:
    """Serve, or follow who does; with data parallel attention, compute beside one another."""
    install_operators()
    let_float32_through()
    if dispatch == "fused":
        dispatch, limits.EXCHANGE_DTYPES = "all-to-all", limits.FLOATS
        here: dict[str, Callable[..., Any]] = {"dispatch": dispatched_here, "combine": combined_here}
        operators.install({f"npu_moe_distribute_{way}_v2": reference for way, reference in here.items()})
    place = place_in_environment()
    assert place is not None
    usual: dict[str, Any] = {"model": model, "device": "npu", "dtype": "float32", "rank_timeout_s": 60.0}
    usual |= {"expert_parallel": True, "expert_dispatch": dispatch, "num_redundant_experts": 1}
    if layout == "data":
        told = beside_one_another(EngineOptions(**usual), place)
    elif place.rank:
        follow(place)
        return
    else:
        told = together(EngineOptions(**usual, tensor_parallel=place.size))
    sys.stdout.write(json.dumps(told) + "\n")


def together(options: EngineOptions) -> dict[str, Any]:
    """Tokens of each case, and the collectives of one decoding step."""
    with Engine(options) as engine:
        captures = options.expert_dispatch == "all-gather" or torch.float32 in limits.EXCHANGE_DTYPES
        cases = CASES if captures else CASES[:1]
        found = [tokens_and_graphs(engine, shapes, mode) for shapes, mode in cases]
        runner, talk = engine._runner(WHERE), Talk(5, 150, 127)
        for step in (talk.prefill(), talk.decode()):
            engine._lead.step(step)
            with control.counting() as counts:
                runner.run(step)
        try:
            engine._runner(WHERE, XllmBuckets())
            refused = ""
        except ConfigError as error:
            refused = str(error)
        return {"found": found, "collectives": collectives(counts.calls()), "refused": refused}


def beside_one_another(options: EngineOptions, place: Place) -> dict[str, Any]:
    """Rank 0 has a talk, of which rank 1 computes what its experts do, and the other way round."""
    engine = Engine(options, ranks=join(place, 60.0))
    runner, found = engine._runner(WHERE), list[list[int]]()
    for rank in (0, 1):
        talk = Talk(5, 150, 127)
        for step in (talk.prefill(), talk.decode()):
            with control.counting() as counts:
                if rank == place.rank:
                    found.append(runner.run(step).argmax(-1).tolist())
                else:
                    runner.run_beside()
    engine.close()
    return {"found": found, "collectives": collectives(counts.calls())}


def dispatched_here(x: Tensor, expert_ids: Tensor, group: str, *ranks: int, **modes: object) -> tuple[Tensor, ...]:
    """The fused operator where ranks meet inside of it, as references do."""
    _, rank, experts = ranks
    x_rRD, expert_rRk = operators.all_gather(group, x), operators.all_gather(group, expert_ids)
    rows_XD, origin, count_P, received = dispatched(x_rRD, expert_rRk, rank, experts)
    return rows_XD, torch.zeros(len(rows_XD)), origin, count_P, received, torch.zeros(0).int(), torch.zeros(0)


def combined_here(
    y: Tensor, expert_ids: Tensor, origin: Tensor, received: Tensor, scales: Tensor, *group: Any, **_: object
) -> Tensor:
    """Likewise, the way back."""
    ys, origins, counts = (list(operators.all_gather(group[0], one)) for one in (y, origin, received))
    return combined(ys, origins, counts, group[2], scales)


def collectives(calls: dict[str, int]) -> dict[str, int]:
    return {name.removeprefix("hccl:"): count for name, count in calls.items() if name.startswith("hccl:")}


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0) if sys.argv[2] == "data" else None
