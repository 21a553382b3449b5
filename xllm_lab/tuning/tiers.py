"""What the instances of a study have beside the device, where it is not all in the calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError
from xllm_lab.policies.of_instance import Policies
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.expert_trace import checksum, with_expert_trace
from xllm_lab.sim.machine import Machine, fitted_machine, with_host_link, with_store

if TYPE_CHECKING:
    from xllm_lab.engine.engine import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """A link to the host, and a store below it; and what experts on several devices have to do.

    Attributes:
        host_link_bytes_per_s: each way; None: as calibrated.
        store: as `sim.machine.with_store` takes it; None: there is none.
        expert_trace: as `sim.expert_trace.with_expert_trace` takes it; None: nothing is known of it.
    """

    host_link_bytes_per_s: float | None = None
    store: str | None = None
    expert_trace: str | None = None

    def described(self) -> dict[str, str | float | None]:
        """As a specification names them: a trace by what it holds, too."""
        trace = self.expert_trace
        return {**asdict(self), "expert_trace_checksum": None if trace is None else checksum(trace)}

    def machine(self, calibration: Calibration, policies: Policies) -> Machine:
        """The calibrated machine with them.

        Raises:
            ConfigError: as `with_host_link`, `with_store` and `with_expert_trace`; policies that would never use the
                store.
        """
        machine = fitted_machine(calibration)
        if self.host_link_bytes_per_s is not None:
            machine = with_host_link(machine, self.host_link_bytes_per_s)
        if self.expert_trace is not None:
            machine = with_expert_trace(machine, self.expert_trace)
        return machine if self.store is None else with_store(machine, self.store, policies)

    def refuse_without(self, options: EngineOptions) -> None:
        """ConfigError for an engine that has not what was searched with: another is measured there."""
        rate, own = self.host_link_bytes_per_s, options.host_link_bytes_per_s
        if rate is not None and own != rate:
            has = "none" if own is None else f"one of {own:g}"
            raise ConfigError(
                f"the study is of a link to the host of {rate:g} bytes/s, and the engine has {has}; "
                f"accepted: --host-link {rate:g}"
            )
        if self.store is not None and options.store is None:
            raise ConfigError(
                f"the study is of store {self.store!r}, and the engine has none; accepted: with --store dir:/PATH"
            )


def tiers_of(spec: Mapping[str, Any]) -> Tiers:
    """Those of a study, by its specification; earlier ones had none."""
    return Tiers(**{name: spec.get(name) for name in ("host_link_bytes_per_s", "store", "expert_trace")})
