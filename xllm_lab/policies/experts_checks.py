"""What a plan of an experts policy must obey before a host acts on it; used by the hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.experts import ExpertsPlan, ExpertsView
from xllm_lab.policies.experts.placement import by_device


def experts_violations(view: ExpertsView, plan: ExpertsPlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if in each layer that changes every slot has an expert,
    every expert a slot, and no device an expert twice."""
    layers = {layer.id: layer for layer in view.layers}
    broken = list[str]()
    for layer, slots in plan.slots.items():
        if layer not in layers:
            broken.append(f"places experts of layer {layer!r}, which has none")
        elif len(slots) != len(layers[layer].slots):
            broken.append(f"fills {len(slots)} slots of layer {layer}, there are {len(layers[layer].slots)}")
        elif tuple(slots) == tuple(layers[layer].slots):
            broken.append(f"changes nothing in layer {layer}, which it names")
        else:
            broken += _misplaced(view, f"layer {layer}", slots)
    return broken


def _misplaced(view: ExpertsView, where: str, slots: tuple[int, ...]) -> list[str]:
    known = range(view.num_experts)
    broken = [
        f"puts expert {e!r} into a slot of {where}, there are 0 to {known[-1]}"
        for e in slots
        if not isinstance(e, int) or e not in known
    ]
    if lost := sorted(set(known) - set(slots)):
        broken.append(f"leaves no slot of {where} to experts {lost}")
    for device, own in enumerate(by_device(slots, view.num_devices)):
        if twice := sorted({e for e in own if own.count(e) > 1}):
            broken.append(f"puts experts {twice} twice on device {device} in {where}")
    return broken
