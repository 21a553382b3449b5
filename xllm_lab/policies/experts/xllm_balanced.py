"""xLLM's default balance of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from xllm_lab.policies.api import Flag, Knob, refuse_below
from xllm_lab.policies.experts import ExpertsPlan, ExpertsView
from xllm_lab.policies.experts.packing import copies_of, heaviest_first, load_taken_off, packed
from xllm_lab.policies.experts.round import xllm_round


@dataclass(frozen=True, slots=True, kw_only=True)
class XllmBalanced:
    """Copies where they lighten the most, the heaviest first to the least loaded device; published if the peak falls.

    As xLLM's main branch does since August 2026 (`eplb_policy_kind` "balanced", xllm/core/framework/eplb at 3906f5a):
    an expert has no two copies on a device, and who stays on a device keeps its slot there.

    Attributes:
        num_redundant_experts: slots of each device beside those that hold every expert once.
        interval_us: how long tokens are counted between two rounds.
        min_peak_gain_frac: of the most loaded device's tokens; a layer that gains less stays as it is.
        decay_frac: what tokens of the interval before count for. A change forgets them all.
    """

    decides: ClassVar[str] = "experts"
    xllm_flags: ClassVar[Mapping[str, bool | str]] = {"enable_eplb": True, "eplb_policy_kind": "balanced"}

    num_redundant_experts: Annotated[int, Knob(0, 8), Flag("redundant_experts_num")] = 1
    interval_us: Annotated[
        int, Knob(10_000_000, 10_000_000_000, log=True), Flag("eplb_update_interval", divide_by=1_000_000)
    ] = 1_000_000_000
    min_peak_gain_frac: Annotated[float, Knob(0, 0.3), Flag("eplb_min_peak_load_improvement")] = 0.05
    decay_frac: Annotated[float, Knob(0, 1)] = 0.5

    def __post_init__(self) -> None:
        refuse_below(0, num_redundant_experts=self.num_redundant_experts, decay_frac=self.decay_frac)
        refuse_below(0, min_peak_gain_frac=self.min_peak_gain_frac)
        refuse_below(1, interval_us=self.interval_us)

    def decide(self, view: ExpertsView) -> ExpertsPlan:
        num_slots = len(view.layers[0].slots) if view.layers else 0

        def place(loads: Sequence[int]) -> Sequence[Sequence[int]]:
            copies = copies_of(loads, num_slots, view.num_devices, load_taken_off)
            order = [expert for expert in heaviest_first(loads, copies) for _ in range(copies[expert])]
            return packed(order, loads, copies, view.num_devices)

        return xllm_round(
            view,
            place,
            decay_frac=self.decay_frac,
            min_peak_gain_frac=self.min_peak_gain_frac,
            reason="balanced",
        )
