"""Groups of experts to nodes first, as DeepSeek's load balancer does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Knob, refuse_below
from xllm_lab.policies.experts import ExpertsPlan, ExpertsView
from xllm_lab.policies.experts.packing import copies_of, heaviest_first, load_per_copy, packed
from xllm_lab.policies.experts.placement import peak, settled
from xllm_lab.policies.experts.round import faded


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchical:
    """Groups of experts are spread over nodes, then copied and spread over each node's devices, by decayed load.

    The algorithm of DeepSeek's EPLB, by its description (github.com/deepseek-ai/EPLB): a router that chooses groups
    first then sends a token to few nodes. Where groups do not divide among nodes, or a node has fewer experts than a
    device has slots, all devices are one node. An expert has no two copies on a device, and who stays on a device
    keeps its slot. Loads of experts do not depend on where they lie, so counts survive a change.

    Attributes:
        num_redundant_experts: slots of each device beside those that hold every expert once.
        interval_us: how long tokens are counted between two rounds.
        min_peak_gain_frac: of the most loaded device's tokens; a layer that gains less stays as it is.
        decay_frac: what tokens of the interval before count for.
    """

    decides: ClassVar[str] = "experts"

    num_redundant_experts: Annotated[int, Knob(0, 8)] = 1
    interval_us: Annotated[int, Knob(10_000_000, 10_000_000_000, log=True)] = 300_000_000
    min_peak_gain_frac: Annotated[float, Knob(0, 0.3)] = 0.02
    decay_frac: Annotated[float, Knob(0, 1)] = 0.5

    def __post_init__(self) -> None:
        refuse_below(0, num_redundant_experts=self.num_redundant_experts, decay_frac=self.decay_frac)
        refuse_below(0, min_peak_gain_frac=self.min_peak_gain_frac)
        refuse_below(1, interval_us=self.interval_us)

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        plan = {}
        for layer in view.layers:
            loads = faded((w.expert_tokens for w in layer.windows), self.decay_frac)
            if not any(loads):
                continue
            slots = settled(placed(view, loads, len(layer.slots)), layer.slots)
            now, then = (peak(s, loads, view.num_devices) for s in (layer.slots, slots))
            if then < now and now - then >= self.min_peak_gain_frac * now:
                plan[layer.id] = slots
        return ExpertsPlan(slots=plan, reason="hierarchical" if plan else "no gain")


def placed(view: ExpertsView, loads: Sequence[int], num_slots: int) -> list[tuple[int, ...]]:
    """The experts of each device."""
    nodes, group_size = view.num_nodes, view.num_experts // view.num_groups
    if view.num_groups % nodes or num_slots // view.num_devices > view.num_experts // nodes:
        nodes, group_size = 1, view.num_experts
    num_groups = view.num_experts // group_size
    groups = [sum(loads[g * group_size : (g + 1) * group_size]) for g in range(num_groups)]
    once = [1] * num_groups
    devices = list[tuple[int, ...]]()
    for own in packed(heaviest_first(groups, once), groups, once, nodes):
        experts = [group * group_size + i for group in sorted(own) for i in range(group_size)]
        spread = _on_node([loads[e] for e in experts], num_slots // nodes, view.num_devices // nodes)
        devices += [tuple(experts[i] for i in some) for some in spread]
    return devices


def _on_node(loads: Sequence[int], num_slots: int, num_devices: int) -> tuple[tuple[int, ...], ...]:
    copies = copies_of(loads, num_slots, num_devices, load_per_copy)
    order = [expert for expert in heaviest_first(loads, copies) for _ in range(copies[expert])]
    return packed(order, loads, copies, num_devices)
