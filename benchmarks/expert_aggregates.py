"""How wrong is a step's time when each layer's experts are known by one figure, that of the most loaded device?

    python benchmarks/expert_aggregates.py

DeepSeek-V3 (58 layers with experts, 256 experts, 8 a token) on Ascend 910C dies, 8-bit weights, the roofline's prices.
Beside it steps whose tokens are drawn one by one, each taking 8 different experts by popularity (Gumbel's top k), and
each layer waiting for the die that takes longest. Dies beyond 256 hold copies of all experts, and these share evenly.

    even        every die has its share of rows and experts
    popularity  the die that has most rows by popularity
    chance      and what the most loaded one has beyond that by chance: what `Routing.peak` says
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from xllm_lab.hardware import hardware
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import PRECISIONS
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.experts.routing import Routing, zipf_popularity
from xllm_lab.sim.experts.shares import Placement
from xllm_lab.workload import stream

MODEL = known_model("deepseek-v3")
NUM_EXPERTS, NUM_PER_TOKEN, NUM_LAYERS = 256, 8, 58
DEVICES = (16, 64, 256, 768)
TOKENS_PER_DEVICE = (4, 32)
EXPONENTS = (0.0, 0.5, 1.0)
NUM_STEPS, DRAWN_LAYERS, MOST_DRAWN_TOKENS, MOST_TOKENS = 4, 3, 8192, 1 << 17


def main() -> None:
    print("| dies | tokens a die | exponent | drawn, ms | even | popularity | chance | CPU ms a step |")
    print("|---|---|---|---|---|---|---|---|")
    for num_devices in DEVICES:
        for each in TOKENS_PER_DEVICE:
            if num_devices * each > MOST_TOKENS:
                continue
            for exponent in EXPONENTS:
                print(_row(num_devices, num_devices * each, each, exponent))


def _row(num_devices: int, num_tokens: int, each: int, exponent: float) -> str:
    cost = RooflineCost(
        hardware("ascend-910c"),
        MODEL,
        sharding=Sharding(data=num_devices, expert=num_devices),
        precision=PRECISIONS["w8a8"],
    )
    popularity_LE = zipf_popularity(DRAWN_LAYERS, NUM_EXPERTS, exponent, seed=7)
    copies = max(1, num_devices // NUM_EXPERTS)
    slots = np.tile(np.repeat(np.arange(NUM_EXPERTS), copies), (DRAWN_LAYERS, 1))
    placement = Placement(slots.tolist(), num_experts=NUM_EXPERTS, num_devices=num_devices)
    drawn_us, marginal_LE = _drawn_us(cost, placement, popularity_LE, num_tokens)
    routing = Routing(marginal_LE, num_devices=num_devices, num_per_token=NUM_PER_TOKEN, slots_LP=slots)
    began = time.process_time()
    rows_L, activated_L = routing.peak(num_tokens)
    chance_us = cost.experts_us(rows_L, activated_L)
    cpu_ms = (time.process_time() - began) * 1e3
    by_popularity_L = np.full(DRAWN_LAYERS, num_tokens * NUM_PER_TOKEN * routing.peak_to_mean / num_devices)
    popularity_us = cost.experts_us(by_popularity_L, activated_L)
    even = num_tokens * NUM_PER_TOKEN / num_devices
    experts = MODEL.experts
    assert experts is not None
    held = max(NUM_EXPERTS, num_devices)
    activated = held * (1 - (1 - NUM_PER_TOKEN / held) ** num_tokens) / num_devices
    even_us = cost.experts_us(np.array([even]), np.array([activated]))
    errors = " | ".join(f"{us / drawn_us - 1:+.1%}" for us in (even_us, popularity_us, chance_us))
    return f"| {num_devices} | {each} | {exponent} | {drawn_us / 1e3:.2f} | {errors} | {cpu_ms:.1f} |"


def _drawn_us(
    cost: RooflineCost, placement: Placement, popularity_LE: np.ndarray, num_tokens: int
) -> tuple[float, np.ndarray]:
    """Mean time of steps in all experts, and how often each expert was chosen, [L, E]."""
    rng = stream(num_tokens, "aggregates")
    steps_us, counts_LE = [], np.zeros(popularity_LE.shape)
    for _ in range(NUM_STEPS):
        tokens_LE = np.stack([_chosen(rng, p_E, num_tokens) for p_E in popularity_LE])
        counts_LE += tokens_LE
        slot_LP = placement.slot_tokens(tokens_LE[None])[0]
        slot_LDS = slot_LP.reshape(len(slot_LP), placement.num_devices, -1)
        rows_LD, activated_LD = slot_LDS.sum(axis=2), (slot_LDS > 0).sum(axis=2)
        # The slowest die of a layer: most rows, or most experts.
        steps_us.append(max_us(cost, rows_LD, activated_LD))
    return statistics.mean(steps_us), counts_LE / counts_LE.sum(axis=1, keepdims=True)


def max_us(cost: RooflineCost, rows_LD: np.ndarray, activated_LD: np.ndarray) -> float:
    total = 0.0
    for rows_D, activated_D in zip(rows_LD, activated_LD, strict=True):
        pairs = set(zip(rows_D.tolist(), activated_D.tolist(), strict=True))
        total += max(cost.experts_us(np.array([float(n)]), np.array([float(a)])) for n, a in pairs) / NUM_LAYERS
    return total * NUM_LAYERS / len(rows_LD)


def _chosen(rng: np.random.Generator, popularity_E: np.ndarray, num_tokens: int) -> np.ndarray:
    """Tokens at each expert."""
    tokens_E = np.zeros(NUM_EXPERTS, np.int64)
    for start in range(0, num_tokens, MOST_DRAWN_TOKENS):
        num = min(MOST_DRAWN_TOKENS, num_tokens - start)
        scores = np.log(popularity_E) + rng.gumbel(size=(num, NUM_EXPERTS))
        chosen = np.argpartition(-scores, NUM_PER_TOKEN - 1, axis=1)[:, :NUM_PER_TOKEN]
        tokens_E += np.bincount(chosen.ravel(), minlength=NUM_EXPERTS)
    return tokens_E


if __name__ == "__main__":
    main()
