"""What each slot and each device computes where experts lie so, and how long steps take."""

# Shapes: T ticks, L layers with experts, E experts, D devices, P slots of all devices of a layer

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xllm_lab.sim.experts.loads import Counts


class Placement:
    """Where the experts of each layer lie.

    Attributes:
        slots_LP: the expert in each slot.
        copies_LE: of each expert.
    """

    def __init__(self, slots: Sequence[Sequence[int]], *, num_experts: int, num_devices: int) -> None:
        self.slots_LP = np.asarray(slots, np.int64)
        self.num_devices = num_devices
        num_layers, num_slots = self.slots_LP.shape
        assert num_slots % num_devices == 0, f"{num_slots} slots on {num_devices} devices"
        self._layer_L1 = np.arange(num_layers)[:, None]
        experts = (self.slots_LP + num_experts * self._layer_L1).ravel()
        copies = np.bincount(experts, minlength=num_layers * num_experts)
        assert copies.min() >= 1, "an expert that is nowhere"
        self.copies_LE = copies.reshape(num_layers, num_experts)
        # Which copy of its expert each slot has, from 0 on: slots by expert, counted from each expert's first.
        by_expert = np.argsort(experts, kind="stable")
        copy = np.empty_like(experts)
        copy[by_expert] = np.arange(len(experts)) - (copies.cumsum() - copies)[experts[by_expert]]
        self._copy_LP = copy.reshape(num_layers, num_slots)

    def slot_tokens(self, tokens_TLE: Counts) -> Counts:
        """Tokens of each slot, [T, L, P]. Copies share evenly; the first ones have what is over, so none is lost."""
        even_TLE, over_TLE = np.divmod(tokens_TLE, self.copies_LE)
        at = (slice(None), self._layer_L1, self.slots_LP)
        split: Counts = even_TLE[at] + (self._copy_LP < over_TLE[at])
        return split

    def device_tokens(self, tokens_TLE: Counts) -> Counts:
        """Tokens of each device, [T, L, D]."""
        split_TLP = self.slot_tokens(tokens_TLE)
        on_device: Counts = split_TLP.reshape(*split_TLP.shape[:2], self.num_devices, -1).sum(axis=-1)
        return on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPrice:
    """Time of one layer's experts on one device: what it takes at least, and for each token."""

    layer_us: float
    token_us: float


def peak_to_mean(device_tokens_TLD: Counts) -> npt.NDArray[np.float64]:
    """Tokens of the most loaded devices, summed over layers, by those of the mean ones, [T]; 1 where nothing is done.

    By so much longer than balanced experts do steps compute, as each layer waits for its most loaded device.
    """
    means_T = device_tokens_TLD.mean(axis=-1).sum(axis=-1)
    ratio_T: npt.NDArray[np.float64] = np.divide(
        device_tokens_TLD.max(axis=-1).sum(axis=-1), means_T, out=np.ones_like(means_T), where=means_T > 0
    )
    return ratio_T


def experts_us(
    device_tokens_TLD: Counts, num_steps_T: Counts, price: ExpertPrice, *, num_layers: int | None = None
) -> Counts:
    """Time that the steps of each tick spend in experts, [T].

    A tick's steps are taken to be alike. That is never too much, and too little by what the most loaded device changes
    from step to step (`tests/sim/experts` measures it).

    Args:
        num_layers: of the model, where those given stand for all of them.
    """
    peak_T = device_tokens_TLD.max(axis=-1).sum(axis=-1)
    given = device_tokens_TLD.shape[1]
    scale = 1.0 if num_layers is None else num_layers / given
    total_T: Counts = np.rint(scale * (price.layer_us * given * num_steps_T + price.token_us * peak_T)).astype(np.int64)
    return total_T
