"""A layer's experts on a CPU, by each way to multiply groups of rows: processor time of a layer.

    python benchmarks/experts.py --dtypes float32 bfloat16 --rows 1 16 64 512 --repeats 9

One thread. Ways take turns, and the least and the median of the repeats are told: on a shared machine the least is what
the way costs, the median what it cost that day. Routing is uniform; how many experts had rows is told. `copy` reads as
many bytes as the weights of these experts have, once: what memory alone would allow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from xllm_lab.engine.device import open_device
from xllm_lab.engine.layer_config import Mixture
from xllm_lab.engine.mixture import Loads, MixtureLayer
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.ops.experts import Routing
from xllm_lab.engine.ops.table import ExpertShape, choose
from xllm_lab.engine.workspace import Workspace

NUM_EXPERTS, TOP_K, HIDDEN, SIZE = 64, 8, 1024, 384
WITHOUT = {"native": (), "grouped_mm": ("native",), "torch": ("native", "grouped_mm")}
ROUTING = Routing(NUM_EXPERTS, TOP_K, is_normalized=True)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)


def layers(dtype: torch.dtype) -> tuple[dict[str, Callable[[Tensor], int]], ModelConfig]:
    """Each way as a function of the layer's input; it says how many experts had rows."""
    mixture = Mixture(
        routing=ROUTING, intermediate_size=SIZE, shared_size=0, layers=frozenset({0}), has_bias=False
    )  # of one layer
    config = ModelConfig(
        architecture="qwen3_moe",
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=SIZE,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        max_position=8,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mixture=mixture,
    )
    device = torch.device("cpu")
    router, gate_up = drawn(NUM_EXPERTS, HIDDEN, dtype=dtype), drawn(NUM_EXPERTS, 2 * SIZE, HIDDEN, dtype=dtype)
    down, made = drawn(NUM_EXPERTS, HIDDEN, SIZE, dtype=dtype), dict[str, Callable[[Tensor], int]]()
    for name, without in WITHOUT.items():
        shape = ExpertShape(ROUTING, HIDDEN, SIZE)
        ops = choose(device, dtype, head_dim=16, hidden_size=HIDDEN, expert_shape=shape, without=without)
        assert ops.experts is not None
        if ops.served["grouped_matmul"].by != name:
            continue
        grouped = ops.experts.grouped_matmul
        layer = MixtureLayer(ops.linear(router), None, grouped(gate_up), grouped(down), None, None, mixture)
        workspace = Workspace(config, dtype, device)

        def run(x_TD: Tensor, layer: MixtureLayer = layer, workspace: Workspace = workspace, ops: object = ops) -> int:
            loads = Loads(None, workspace.expert_rows_LE[0], are_read=False)
            layer.feed(x_TD, workspace.rows(len(x_TD)), loads, ops)  # type: ignore[arg-type]
            return int((loads.count_E > 0).sum())

        made[name] = run
    return made, config


def times(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of processor time, ways in turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began_ns = time.process_time_ns()
            way()
            taken[name].append((time.process_time_ns() - began_ns) / 1e6)
    return taken


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(given)
    open_device("cpu", threads=1)
    torch.manual_seed(0)
    print("| dtype | tokens | experts with rows | " + " | ".join(f"{name}, ms" for name in (*WITHOUT, "copy")) + " |")
    print("|---|---|---|" + "---|" * (len(WITHOUT) + 1))
    with torch.inference_mode():
        for dtype_name in options.dtypes:
            dtype = getattr(torch, dtype_name)
            made, _ = layers(dtype)
            for rows in options.rows:
                x_TD = torch.randn(rows, HIDDEN).to(dtype)
                (activated,) = {way(x_TD) for way in made.values()}  # which also warms each
                source = torch.zeros(activated * 3 * HIDDEN * SIZE, dtype=dtype)
                ways: dict[str, Callable[[], object]] = {
                    name: (lambda way=way, x_TD=x_TD: way(x_TD)) for name, way in made.items()
                }
                ways["copy"] = lambda source=source: source.view(torch.int32).max()
                taken = times(ways, options.repeats)
                cells = [
                    f"{min(taken[name]):.2f} ({statistics.median(taken[name]):.2f})" if name in taken else ""
                    for name in (*WITHOUT, "copy")
                ]
                print(f"| {dtype_name} | {rows} | {activated} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
