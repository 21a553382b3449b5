"""Views of one layer's experts, written down by hand."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_lab.drawn_experts_views import DrawnExpertLayer, DrawnExpertsView, DrawnWindow
from xllm_lab.policies.experts import LayerId
from xllm_lab.policies.experts.placement import num_copies


def experts_view(
    loads: Sequence[int], slots: Sequence[int], num_devices: int, *, num_nodes: int = 1, num_groups: int = 1
) -> DrawnExpertsView:
    """One layer after one interval of those loads, shared evenly by copies, the first of which take what is over."""
    return DrawnExpertsView(
        number=0,
        now_us=1_000_000,
        counted_until_us=1_000_000,
        num_experts=len(loads),
        num_groups=num_groups,
        num_devices=num_devices,
        num_nodes=num_nodes,
        expert_bytes=1,
        copy_us=None,
        layers=[
            DrawnExpertLayer(
                id=LayerId(0),
                slots=list(slots),
                windows=[DrawnWindow(tuple(loads), shares(loads, slots))],
                num_steps_since_change=100,
            )
        ],
    )


def shares(loads: Sequence[int], slots: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each slot."""
    copies, seen, split = num_copies(slots, len(loads)), [0] * len(loads), list[int]()
    for expert in slots:
        split.append(loads[expert] // copies[expert] + (seen[expert] < loads[expert] % copies[expert]))
        seen[expert] += 1
    return tuple(split)
