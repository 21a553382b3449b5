"""Placements and loads as an experts policy meets them, drawn by number for `contract`: skewed, equal, none, huge."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from xllm_lab.policies.experts import LayerId
from xllm_lab.policies.experts.placement import contiguous


class DrawnWindow(NamedTuple):
    """A `WindowView`."""

    expert_tokens: tuple[int, ...]
    slot_tokens: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnExpertLayer:
    """An `ExpertLayerView`."""

    id: LayerId
    slots: list[int]
    windows: list[DrawnWindow]
    num_steps_since_change: int


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnExpertsView:
    """An `ExpertsView`, and its number."""

    number: int
    now_us: int
    counted_until_us: int
    num_experts: int
    num_groups: int
    num_devices: int
    num_nodes: int
    expert_bytes: int
    copy_us: float | None
    layers: list[DrawnExpertLayer]


def drawn_experts_view(number: int) -> DrawnExpertsView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"experts view {number}")
    nodes, per_node = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 4))
    devices = nodes * per_node
    share = rng.choice((1, 2, 4))
    experts = devices * share
    redundant = rng.choice([r for r in (0, 0, 1, 2, experts) if r <= experts - share])
    now_us = rng.randrange(10**12)
    return DrawnExpertsView(
        number=number,
        now_us=now_us,
        counted_until_us=now_us - rng.choice((0, 0, 5000)),
        num_experts=experts,
        num_groups=rng.choice([g for g in (1, 2, nodes, experts) if experts % g == 0]),
        num_devices=devices,
        num_nodes=nodes,
        expert_bytes=rng.choice((1, 3 * 2048 * 768 * 2)),
        copy_us=rng.choice((None, 0.5, 2000.0)),
        layers=[
            _layer(rng, layer, experts, devices, redundant) for layer in rng.sample(range(60), rng.choice((0, 1, 3)))
        ],
    )


def _layer(rng: random.Random, layer: int, experts: int, devices: int, redundant: int) -> DrawnExpertLayer:
    slots = list(contiguous(experts, devices, redundant))
    if rng.random() < 0.5:  # renamed, so that copies are of others
        names = rng.sample(range(experts), experts)
        slots = [names[e] for e in slots]
    num_windows, num_since = rng.choice(((0, 0), (1, 1), (3, 3), (3, 1), (8, 2), (2, 0)))
    windows = list[DrawnWindow]()
    for age in range(num_windows):
        shares = [rng.choice(_TOKENS)(rng) for _ in slots]
        tokens = [sum(n for n, at in zip(shares, slots, strict=True) if at == e) for e in range(experts)]
        windows.append(DrawnWindow(tuple(tokens), tuple(shares) if age < num_since else ()))
    return DrawnExpertLayer(
        id=LayerId(layer),
        slots=slots,
        windows=windows,
        num_steps_since_change=rng.choice((1, 1000)) if num_since else 0,
    )


_TOKENS = (
    lambda rng: 0,
    lambda rng: 100,
    lambda rng: 100,
    lambda rng: rng.randrange(1000),
    lambda rng: int(rng.paretovariate(1.0)),
    lambda rng: 2**62 // 16,
)
