"""The two constants of Ascend 910C that no one published: fitted to HCCL times and to step times, and to nothing else.

    python -m xllm_lab.sim.npu_fit

`kernel_us` is what a kernel, or a round of a collective, takes beyond arithmetic and bytes; `link.frac` is the part of
the link's bandwidth that collectives reach. hardware.toml holds what this finds, and a test holds it to that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from xllm_lab.hardware import Device, hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.sim.cost import Batch
from xllm_lab.sim.cost.collectives import Collectives
from xllm_lab.sim.cost.roofline import RooflineCost, StepParts
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.npu_points import points
from xllm_lab.step_shape import decide_shape, decode_shape
from xllm_lab.step_time import Chunk

FITTED_DEVICE = "ascend-910c"
# Its attention takes lengths that are fixed in a graph, so that steps with prompts run eagerly.
GRAPHS = VllmBuckets(cudagraph_mode="full_decode_only")
_INSTANCE = InstanceConfig(max_seqs_per_batch=256)  # vLLM's default
_PROMPT_TOKENS, _OUTPUT_TOKENS = 4096, 1536


def with_constants(device: Device, kernel_us: float, link_frac: float) -> Device:
    """The device with other values of the two fitted constants."""
    return replace(device, kernel_us=kernel_us, link=replace(device.link, frac=link_frac))


def collective_us(device: Device, op: str, num_devices: int, num_bytes: float) -> float:
    """Predicted time of one row of `collectives`."""
    group = Collectives(num_devices, device.link, device.kernel_us)
    operations = {
        "all_gather": group.all_gather_us,
        "reduce_scatter": group.reduce_scatter_us,
        "all_reduce": group.all_reduce_us,
    }
    return operations[op](num_bytes)


def mean_step(device: Device, clients: int) -> StepParts:
    """Predicted mean step of Qwen3-32B on 16 devices with so many clients in a steady state: a row of `steps`.

    A client's step in `_OUTPUT_TOKENS` is its prefill; in the others it decodes at the mean context of its life.
    """
    cost = RooflineCost(device, known_model("qwen3-32b"), sharding=Sharding(tensor=16))
    context = _PROMPT_TOKENS + _OUTPUT_TOKENS // 2
    decode = cost.parts(decoding(clients, context))
    prefill = cost.parts(Batch((Chunk(_PROMPT_TOKENS, 0),), 0, 0, 0, 1))
    share = clients / _OUTPUT_TOKENS
    return StepParts(*(d + share * p for d, p in zip(decode, prefill, strict=True)))


def decoding(num_seqs: int, context: int, shapes: ShapesPolicy = GRAPHS) -> Batch:
    """A batch of decodes as vLLM-Ascend runs it: padded to one of vLLM's graphs, unless it is told otherwise."""
    graph = decide_shape(shapes, decode_shape(num_seqs, _INSTANCE))
    return Batch((), num_seqs, num_seqs * context, context, num_seqs, graph.num_tokens)


def fit() -> tuple[float, float]:
    """`kernel_us` and `link.frac` with the least squared logarithms of predicted over measured, both tables alike."""
    from scipy.optimize import least_squares

    device = hardware(FITTED_DEVICE)

    def errors(constants: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return _errors(with_constants(device, *constants))

    found = least_squares(errors, (10.0, 0.8), bounds=((0.0, 0.01), (100.0, 1.0)))
    return float(found.x[0]), float(found.x[1])


def _errors(device: Device) -> npt.NDArray[np.float64]:
    collectives = [
        collective_us(device, row["op"], row["devices"], row["num_bytes"]) / row["us"]
        for row in points("collectives").rows
    ]
    steps = []
    for row in points("steps").rows:
        parts = mean_step(device, row["clients"])
        steps += [parts.compute_us / row["compute_ms"] / 1e3, parts.communication_us / row["communication_ms"] / 1e3]
    return np.concatenate([np.log(ratios) / len(ratios) ** 0.5 for ratios in (collectives, steps)])


if __name__ == "__main__":
    kernel_us, link_frac = fit()
    print(f"kernel_us = {kernel_us:.1f}\nlink.frac = {link_frac:.2f}")  # noqa: T201
