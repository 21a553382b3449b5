"""How much the most loaded device has to do in a step, where tokens do not choose their experts evenly."""

# Shapes: L layers with experts, E experts, P slots of all devices of a layer, D devices

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError
from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.experts.loads import ExpertLoads
from xllm_lab.sim.experts.shares import Placement
from xllm_lab.workload import stream

Fracs = npt.NDArray[np.float64]
_MEMO_SIZE = 1 << 14
# Devices of a layer that are kept one by one, those with most; the others are classes of alike ones, as many.
_FIRST_DEVICES = 32
# Points of the distribution of the most loaded device's rows, over the spread of all.
_POINTS = 128
_SIGMAS = 6.0


class Routing:
    """Popularities of experts that stay, and where the experts lie.

    Of the copies of an expert each has its share. A token goes to an expert with k times its popularity, at most
    surely, whatever the other tokens do: exact for experts that are alike, where it is `Experts.num_activated`.

    Args:
        popularity_LE: each layer's parts of all rows that go to its experts; they sum to 1. A row is a token at one of
            its experts.
        slots_LP: the expert in each slot, device by device; None: in order, as vLLM and xLLM place them.
        num_devices: over which they are spread.
        num_per_token: experts of each token.

    Raises:
        ConfigError: popularities that are none, or slots that do not divide over the devices.
    """

    def __init__(
        self,
        popularity_LE: npt.ArrayLike,
        *,
        num_devices: int,
        num_per_token: int,
        slots_LP: Sequence[Sequence[int]] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        popularity = np.asarray(popularity_LE, np.float64)
        if popularity.ndim != 2 or not popularity.size or not np.allclose(popularity.sum(axis=1), 1.0, atol=1e-6):
            raise ConfigError(
                f"popularities of experts have shape {popularity.shape} and sum to "
                f"{popularity.sum(axis=-1).ravel()[:3].tolist()}...; layers by experts that sum to 1 are accepted"
            )
        if popularity.min() < 0:
            raise ConfigError(f"a popularity is {popularity.min()}, at least 0 is accepted")
        num_layers, num_experts = popularity.shape
        slots = np.tile(np.arange(num_experts), (num_layers, 1)) if slots_LP is None else np.asarray(slots_LP, np.int64)
        if num_devices < 1 or slots.shape[-1] % num_devices:
            raise ConfigError(
                f"{slots.shape[-1]} slots of experts on {num_devices} devices; a divisor of them is accepted"
            )
        self.num_devices, self.num_per_token = num_devices, num_per_token
        placement = Placement(slots.tolist(), num_experts=num_experts, num_devices=num_devices)
        layer_L1 = np.arange(num_layers)[:, None]
        share_LP = popularity[layer_L1, placement.slots_LP] / placement.copies_LE[layer_L1, placement.slots_LP]
        share_LDS = share_LP.reshape(num_layers, num_devices, -1)
        share_LD = share_LDS.sum(axis=2)
        peak_L = share_LD.argmax(axis=1)
        self._peak_share_L: Fracs = share_LD.max(axis=1)
        self._share_LC, self._num_alike_C = _classes(share_LD)
        # Of one token's experts, all different: a hypergeometric variance is so much less than a binomial one.
        self._spread_frac = (num_experts - num_per_token) / max(1, num_experts - 1)
        self._chosen_LS: Fracs = np.minimum(1.0, num_per_token * share_LDS[np.arange(num_layers), peak_L])
        self._memo: dict[float, tuple[Fracs, Fracs]] = {}

    @property
    def peak_to_mean(self) -> float:
        """Rows of the most loaded devices, summed over layers, by those of the mean ones."""
        return float(self._peak_share_L.mean() * self.num_devices)

    def peak(self, num_tokens: float) -> tuple[Fracs, Fracs]:
        """Of each layer's most loaded device in a step of so many tokens of all instances: rows, activated experts.

        Both are expected values, of shape [L]; the second is of the device that has most by popularity. The first is of
        whichever has most: rows are taken to be normally distributed, and independent between devices.
        """
        found = self._memo.get(num_tokens)
        if found is None:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            rows_L = self._most_rows(num_tokens * self.num_per_token)
            activated_L = (1.0 - (1.0 - self._chosen_LS) ** num_tokens).sum(axis=1)
            found = self._memo[num_tokens] = rows_L, activated_L
        return found

    def _most_rows(self, num_rows: float) -> Fracs:
        """The expected largest number of any device in each layer: its floor, and how long some device is above it."""
        from scipy.special import log_ndtr

        mean_LC = num_rows * self._share_LC
        sigma_LC = np.sqrt(np.maximum(mean_LC * (1.0 - self._share_LC) * self._spread_frac, 1e-12))
        floor_L = mean_LC.max(axis=1)
        top_L = (mean_LC + _SIGMAS * sigma_LC).max(axis=1)
        bottom_L = np.maximum(0.0, (mean_LC - _SIGMAS * sigma_LC).max(axis=1))
        at_XL = np.linspace(bottom_L, top_L, _POINTS)
        log_below_XL = (self._num_alike_C * log_ndtr((at_XL[:, :, None] - mean_LC) / sigma_LC)).sum(axis=2)
        most_L = bottom_L + np.trapezoid(1.0 - np.exp(log_below_XL), at_XL, axis=0)
        most: Fracs = np.clip(most_L, floor_L, num_rows)
        return most


def _classes(share_LD: Fracs) -> tuple[Fracs, Fracs]:
    """Devices' shares, the largest one by one and the others by classes of their mean, [L, C]; devices of each, [C]."""
    share_LD = -np.sort(-share_LD, axis=1)
    first, rest = share_LD[:, :_FIRST_DEVICES], share_LD[:, _FIRST_DEVICES:]
    parts = [p for p in np.array_split(rest, _FIRST_DEVICES, axis=1) if p.shape[1]]
    means = [p.mean(axis=1, keepdims=True) for p in parts]
    sizes = [*[1.0] * first.shape[1], *[float(p.shape[1]) for p in parts]]
    return np.concatenate([first, *means], axis=1), np.array(sizes)


def popularity(loads: ExpertLoads) -> Fracs:
    """Of each expert over all ticks, [L, E]; even in a layer that never did anything."""
    tokens_LE = loads.tokens.sum(axis=0).astype(np.float64)
    total_L1 = tokens_LE.sum(axis=1, keepdims=True)
    even = np.full_like(tokens_LE, 1.0 / loads.num_experts)
    parts: Fracs = np.divide(tokens_LE, total_L1, out=even, where=total_L1 > 0)
    return parts


def zipf_popularity(num_layers: int, num_experts: int, exponent: float, *, seed: int = 0) -> Fracs:
    """Popularity that falls with rank as 1 / rank^exponent, ranks dealt anew in each layer, [L, E]."""
    if not 0 <= exponent < math.inf:
        raise ConfigError(f"the exponent of experts' popularity is {exponent}, at least 0 is accepted")
    by_rank_E = np.arange(1, num_experts + 1) ** -exponent
    rng = stream(seed, "expert popularity")
    rank_LE = np.stack([rng.permutation(num_experts) for _ in range(num_layers)])
    drawn: Fracs = by_rank_E[rank_LE] / by_rank_E.sum()
    return drawn


def routing_of(
    popular: float | ExpertLoads,
    model: ModelSpec,
    *,
    num_devices: int,
    slots_LP: Sequence[Sequence[int]] | None = None,
) -> Routing:
    """Of a model's experts.

    Args:
        popular: the exponent of popularities, see `zipf_popularity`; or loads, all of whose ticks count alike.

    Raises:
        ConfigError: a model without experts, or with others than the loads are of; and as `Routing`.
    """
    experts = model.experts
    if experts is None:
        raise ConfigError(f"popularities of experts are given, and {model.name} has none")
    if not isinstance(popular, ExpertLoads):
        popularity_LE = zipf_popularity(experts.num_layers, experts.num_experts, popular)
    else:
        popularity_LE = popularity(popular)
        if popularity_LE.shape[1] != experts.num_experts:
            raise ConfigError(
                f"the loads are of {popularity_LE.shape[1]} experts, {model.name} has {experts.num_experts}; the same "
                "number is accepted"
            )
    return Routing(popularity_LE, num_devices=num_devices, num_per_token=experts.num_per_token, slots_LP=slots_LP)
