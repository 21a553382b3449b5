"""The engine's fleet: a router in this process, and an engine process for each instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from xllm_lab.copy_time import CopyTime
from xllm_lab.decisions import (
    DECISIONS_FILE,
    DELIVERIES_FILE,
    Delivery,
    FleetDecision,
    decision_table,
    delivery_table,
)
from xllm_lab.draft_time import DraftTime
from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.cluster.processes import Processes
from xllm_lab.engine.cluster.serving import Serving
from xllm_lab.engine.engine import EngineOptions, refuse_unknown_tokens
from xllm_lab.engine.expert_parallel import refuse_if_not_spreadable
from xllm_lab.engine.models import model_config
from xllm_lab.errors import ConfigError, InstanceError
from xllm_lab.fleet_config import FleetConfig, LinkConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.cache.device_only import DeviceOnly
from xllm_lab.policies.catalog import policy_name, values_of
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.routing import InstanceId
from xllm_lab.progress import tell
from xllm_lab.records import Records, RoleChange, role_table, transfer_table
from xllm_lab.registry import open_registry
from xllm_lab.run_writer import ROLES_FILE, TRANSFERS_FILE
from xllm_lab.runs import Manifest, Run, describe, fill_run, new_folder
from xllm_lab.step_time import StepTime
from xllm_lab.transfers import Transfer
from xllm_lab.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a serving leaves behind beside its records.

    Attributes:
        transfers: over links, where they are configured.
        roles: who got another one.
        graphs: of each instance that was up in the end.
        store: below the hosts, where there is one; of the same instances.
    """

    transfers: Sequence[Transfer]
    decisions: Sequence[FleetDecision]
    deliveries: Sequence[Delivery]
    roles: Sequence[RoleChange]
    graphs: dict[str, Any] | None
    store: dict[str, Any] | None


class EngineFleet:
    """Engine processes with the model loaded; they serve any number of workloads, one after another. Close it.

    Args:
        options: of each engine. On a virtual clock they serve in lockstep, on a wall clock side by side.
        registry: "embedded", or "etcd://HOST:PORT/PREFIX".
        host: on which all of them listen.

    Raises:
        ConfigError: options that a fleet cannot have, or a registry that does not answer.
        InstanceError: an engine process does not come up.
    """

    def __init__(
        self, options: EngineOptions, num_instances: int, *, registry: str = "embedded", host: str = "127.0.0.1"
    ) -> None:
        make_clock(options.clock, options.timer)
        if options.tensor_parallel != 1:
            raise ConfigError(f"tensor_parallel is {options.tensor_parallel} in a fleet; accepted: 1")
        if num_instances < 1:
            raise ConfigError(f"num_instances is {num_instances}, at least 1 is accepted")
        if options.expert_parallel:
            refuse_if_not_spreadable(
                model_config(options.model), num_instances, options.num_redundant_experts, options.model
            )
            if options.clock != "wall":
                raise ConfigError(
                    f"clock {options.clock!r} where instances share experts and step together; accepted: 'wall'"
                )
        self.options = options
        opened = open_registry(registry, host)
        self.processes = Processes(options, num_instances, opened, host)
        self.registry_url = opened.url
        try:
            self._come_up()
        except BaseException:
            self.close()
            raise

    def _come_up(self) -> None:
        for instance in self.processes.instances:
            self.processes.start(instance)
        for instance in self.processes.instances:
            self.processes.await_up(instance)
        hellos = [self._hello(instance) for instance in self.processes.instances]
        self.model: dict[str, Any] = hellos[0]["model"]
        self.drafts: dict[str, Any] = hellos[0]["drafts"]
        for instance, hello in zip(self.processes.instances, hellos, strict=True):
            if hello["model"]["checksum"] != self.model["checksum"]:
                raise InstanceError(f"instance {instance} loaded another model; accepted: the same for all")

    def _hello(self, instance: InstanceId) -> dict[str, Any]:
        process = self.processes.process(instance)
        assert process is not None, "it came up"
        return process.hello

    @property
    def process_ids(self) -> dict[InstanceId, int]:
        """Of the instances whose process was started and not given up."""
        running = {instance: self.processes.process(instance) for instance in self.processes.instances}
        return {instance: process.popen.pid for instance, process in running.items() if process is not None}

    @property
    def addresses(self) -> dict[InstanceId, str]:
        """Where the engine processes listened, HOST:PORT."""
        running = {instance: self.processes.process(instance) for instance in self.processes.instances}
        return {i: p.entry.address for i, p in running.items() if p is not None and p.entry is not None}

    def close(self) -> None:
        """All engine processes end."""
        self.processes.close()

    def __enter__(self) -> EngineFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(
        self,
        workload: Workload,
        fleet: FleetConfig,
        config: InstanceConfig,
        policies: Policies,
        records: Records,
        *,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
    ) -> Served:
        """Serve a workload to its end. Every request ends once, finished or with a reason, whoever is lost.

        Raises:
            ConfigError: the model, the clock or the number of processes does not go with what is asked for.
            PolicyError: a policy planned something illegal, or starves a request.
            InstanceError: an engine process does not come up.
        """
        self._refuse(workload, fleet, config, policies, step_time=step_time, copy_time=copy_time)
        by_method = {} if draft_time is None else draft_time.weights
        by_kind = {} if copy_time is None else copy_time.weights
        opening = {
            "instance": values_of(config),
            "policies": policies.as_dict(),
            "step_time": None if step_time is None else list(step_time.weights),
            "draft_time": {method: list(weights) for method, weights in by_method.items()},
            "copy_time": {kind: list(weights) for kind, weights in by_kind.items()},
            "seed": workload.seed,
            "heartbeat_us": fleet.heartbeat_us,
        }
        serving = Serving(
            processes=self.processes,
            workload=workload,
            fleet=fleet,
            config=config,
            vocab_size=self.model["vocab_size"],
            records=records,
            opening=opening,
        )
        try:
            seats = serving.in_real_time() if self.options.clock == "wall" else serving.in_lockstep()
        except BaseException:
            self.close()  # nobody knows where each of them is
            raise
        records.steps.sort(key=lambda s: (s.end_us, s.instance))
        graphs = [seat.graphs for seat in seats]
        known = {"instances": graphs} if any(g is not None for g in graphs) else None
        return Served(
            transfers=serving.transfers,
            decisions=serving.log.decisions,
            deliveries=serving.deliveries,
            roles=serving.roles,
            graphs=known,
            store={"instances": [seat.store for seat in seats]} if self.options.store is not None else None,
        )

    def replay(
        self,
        workload: Workload,
        fleet: FleetConfig,
        config: InstanceConfig,
        policies: Policies,
        *,
        out: Path,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
        recorder: Records | None = None,
    ) -> Run:
        """Serve a workload and write the run folder: as a simulated fleet's, and every decision with its view.

        Raises:
            RequestTooLargeError: a request could never run on this configuration.
            as `serve`, and RunError if the folder exists or cannot be written.
        """
        for request in workload.requests:
            config.refuse_if_too_large(request)
        records = Records() if recorder is None else recorder
        with new_folder(out) as folder:
            served = self.serve(
                *(workload, fleet, config, policies, records),
                step_time=step_time,
                draft_time=draft_time,
                copy_time=copy_time,
            )
            timing = {k: v for k, v in asdict(self.options).items() if k in ("clock", "timer", "threads")}
            manifest = Manifest(
                host="engine",
                timing={**timing, "registry": self.registry_url.partition(":")[0]},
                model=self.model,
                fleet=fleet.as_dict(),
                graphs=served.graphs,
                store=served.store,
                drafts=None if isinstance(policies.draft, Off) else self.drafts,
                **describe(config, policies, step_time, workload, draft_time=draft_time, copy_time=copy_time),
            )
            fill_run(folder, manifest, workload, records)
            if served.transfers:
                pq.write_table(transfer_table(served.transfers), folder / TRANSFERS_FILE, write_page_checksum=True)
            if served.roles:
                pq.write_table(role_table(served.roles), folder / ROLES_FILE, write_page_checksum=True)
            pq.write_table(decision_table(served.decisions), folder / DECISIONS_FILE, write_page_checksum=True)
            pq.write_table(delivery_table(served.deliveries), folder / DELIVERIES_FILE, write_page_checksum=True)
        return Run(out, manifest)

    def tell_where(self) -> None:
        """One line for people: who listens where."""
        where = ", ".join(f"{instance} at {address}" for instance, address in self.addresses.items())
        tell(f"xllm-lab: registry {self.registry_url}; instances: {where}")

    def _refuse(
        self,
        workload: Workload,
        fleet: FleetConfig,
        config: InstanceConfig,
        policies: Policies,
        *,
        step_time: StepTime | None,
        copy_time: CopyTime | None,
    ) -> None:
        options, num = self.options, len(self.processes.instances)
        if fleet.num_instances != num:
            raise ConfigError(f"num_instances is {fleet.num_instances}, and {num} processes are up; accepted: {num}")
        if options.clock == "wall" and fleet.link != LinkConfig():
            raise ConfigError("[link] on clock 'wall', where links are real; accepted: clock 'virtual'")
        if options.clock == "virtual" and options.timer == "wall" and config.async_scheduling != "off":
            raise ConfigError(
                f"async_scheduling is {config.async_scheduling!r}: a fleet in lockstep cannot tell host from device "
                "on wall time; accepted: timer 'cpu', clock 'wall', or async_scheduling 'off'"
            )
        if options.store is not None and isinstance(policies.cache, DeviceOnly):
            raise ConfigError(
                f"store is {options.store!r}, and cache policy device-only never uses it; accepted: another policy"
            )
        if not isinstance(policies.cache, DeviceOnly) and options.clock == "virtual" and options.timer == "wall":
            raise ConfigError(
                f"cache policy {policy_name(policies.cache)}: a fleet in lockstep cannot tell copies beside steps from "
                "other engines on wall time; accepted: timer 'cpu', clock 'wall', or cache policy device-only"
            )
        for decides, policy in policies:
            if step_time is None and getattr(policy, "needs_step_time", False):
                name = policy_name(policy)
                raise ConfigError(f"{decides} policy {name} needs step times; accepted: a machine's calibration")
            if not copy_time and getattr(policy, "needs_copy_time", False):
                name = policy_name(policy)
                raise ConfigError(f"{decides} policy {name} needs copy times; accepted: a machine's calibration")
        if self.processes.share_experts and fleet.outages:
            raise ConfigError("outages where instances share experts, and all end with one; accepted: none")
        refuse_unknown_tokens(workload, self.model["vocab_size"])
