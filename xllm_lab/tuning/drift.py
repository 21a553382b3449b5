"""Has the live trace left what a promoted configuration was tuned for, and what does that cost?

The fingerprint tells whether; the simulator tells what: the promoted configuration on the live trace beside others that
were good when it was tuned, the default, and itself with one change fewer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xllm_lab import transforms
from xllm_lab.arrivals import rotated
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.sim.calibrate import read_calibration
from xllm_lab.tuning.fingerprint import Change, changes
from xllm_lab.tuning.gain import Gain, paired_gain
from xllm_lab.tuning.intervals import Foresight, one_fewer
from xllm_lab.tuning.promote import Promotion
from xllm_lab.tuning.study import EQUAL_FRAC
from xllm_lab.workload import Slo, Workload

NUM_ARRIVALS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A live trace beside the one that a configuration was promoted for.

    Attributes:
        changes: by feature.
        num_candidates: that were simulated beside the promoted one.
        better: the one of most goodput among them; None if the promoted one has the most.
        cost: what it would gain, on the same arrivals; None where there is none.
    """

    changes: tuple[Change, ...]
    num_candidates: int
    better: Candidate | None
    cost: Gain | None

    @property
    def has_drifted(self) -> bool:
        return any(change.is_drift for change in self.changes)

    @property
    def pays_to_tune(self) -> bool:
        """Another configuration is shown to be better by more than equals may differ by; more may be found."""
        return self.cost is not None and self.cost.low_frac is not None and self.cost.low_frac > EQUAL_FRAC

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "changes": [{**asdict(change), "is_drift": change.is_drift} for change in self.changes],
            "has_drifted": self.has_drifted,
            "num_candidates": self.num_candidates,
            "better": None if self.better is None else self.better.as_dict(),
            "cost": None if self.cost is None else asdict(self.cost),
            "pays_to_tune": self.pays_to_tune,
        }


def drift(live: Workload, promotion: Promotion) -> Drift:
    """What changed, and what it costs.

    Requests of the live trace that were promised nothing are promised what those of the verified one were.

    Raises:
        ConfigError: a live trace of too few requests, one that the promoted configuration cannot serve, or one without
            promises where the verified one's differed.
        RunError: the promotion's calibration cannot be read.
    """
    found = changes(promotion.fingerprint, live)
    live = _promised(live, promotion.slo)
    foresight = Foresight(read_calibration(promotion.path / "calibration.json"), promotion.tiers)
    arrivals = [rotated(live, seed) for seed in range(NUM_ARRIVALS)]
    ours = foresight.goodputs_per_s(promotion.promoted, arrivals)
    if ours is None:
        raise ConfigError(f"{live.source}: cannot be served by the promoted configuration at all; tune again")
    others = _others(promotion)
    better, most = None, ours
    for one in others:
        theirs = foresight.goodputs_per_s(one, arrivals)
        if theirs is not None and sum(theirs) > sum(most):
            better, most = one, theirs
    cost = None if better is None else paired_gain(ours, most)
    return Drift(changes=found, num_candidates=len(others), better=better, cost=cost)


def _others(promotion: Promotion) -> list[Candidate]:
    fewer = (one for *_, one in one_fewer(promotion.rollback, promotion.promoted))
    found: list[Candidate] = []
    for one in (promotion.rollback, *promotion.alternatives, *fewer):
        if one != promotion.promoted and one not in found:
            found.append(one)
    return found


def _promised(live: Workload, slo: Slo | None) -> Workload:
    if any(request.slo != Slo() for request in live.requests):
        return live
    if slo is None:
        raise ConfigError(
            f"{live.source}: promises nothing, and the verified requests were promised different things; accepted: a "
            "trace with promises (--ttft-slo-ms and others)"
        )
    return transforms.with_slo(live, slo)
