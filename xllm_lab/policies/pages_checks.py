"""What a plan of a pages policy must obey before a host acts on it; used by the hosts and by the contract suite."""

from __future__ import annotations

from xllm_lab.policies.pages import PagePlan, PagesView


def pages_violations(view: PagesView, plan: PagePlan) -> list[str]:
    """Every rule the plan breaks, one sentence each; none if it maps ahead for those who decode, and takes from free
    slots pages that they have."""
    broken: list[str] = []
    most = view.num_entering(view.block_size)
    if not 0 <= plan.num_ahead <= most:
        broken.append(f"maps ahead for {plan.num_ahead} requests, 0 to {most} decode")
    if plan.holds_for < 0:
        broken.append(f"holds for {plan.holds_for} further steps, at least 0 is accepted")
    if plan.reclaim:
        mapped = {slot.id: slot.num_pages for slot in view.free_slots}
        for slot, kept in plan.reclaim.items():
            if slot not in mapped:
                broken.append(f"reclaims pages of slot {slot}, which is not free or has none")
            elif not 0 <= kept < mapped[slot]:
                broken.append(f"reclaims all but {kept} pages of slot {slot}, which has {mapped[slot]}")
    return broken
