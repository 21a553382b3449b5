"""A machine to simulate: what prices its steps, and what a run's manifest says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from xllm_lab.copy_time import STORE_KINDS, CopyTime, link_copy_time
from xllm_lab.draft_time import DraftTime
from xllm_lab.errors import ConfigError, ModelError
from xllm_lab.hardware import Device
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import PRECISIONS, ModelSpec, Precision, read_model_spec
from xllm_lab.page_time import PageTime
from xllm_lab.policies.cache.device_only import DeviceOnly
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.experts.static import Static
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.rebalancing import ExpertLayout
from xllm_lab.runs import Run
from xllm_lab.sim.acceptance import GivenAcceptance
from xllm_lab.sim.calibrate import Calibration
from xllm_lab.sim.cost import CostModel, GroupCost, batch_of
from xllm_lab.sim.cost.collectives import collectives
from xllm_lab.sim.cost.fitted import FittedCost
from xllm_lab.sim.cost.host import Hosted, HostedGroup, HostOverhead
from xllm_lab.sim.cost.mtp import draft_spec, mtp_draft_time
from xllm_lab.sim.cost.profile_bundle import bundle_model, read_bundle
from xllm_lab.sim.cost.profiled import ProfiledCost
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding, kv_blocks_that_fit
from xllm_lab.sim.drafts import Acceptance, SimulatedDrafts
from xllm_lab.sim.experts.routing import Routing
from xllm_lab.sim.experts.serving import ServedExperts
from xllm_lab.sim.group import GroupTiming, Waves
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.store import SimulatedStore, StoreRoom, store_room
from xllm_lab.step_time import TERMS, Chunk, StepTime, features, fit

_RUNS = "accepted: a calibration on runs of both kinds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the simulator needs of a machine.

    Attributes:
        cost: prices steps on the device.
        host: what the host adds.
        model: what is served, as in manifests; has `vocab_size`.
        timing: how step times are had, and how far they can be trusted.
        step_time: what policies are told of step times.
        calibration: what they were fitted to, if they were.
        most_kv_tokens: for which the devices have room beside the weights, where that is known.
        acceptance: what becomes of drafts, where that is known.
        draft_time: what making them takes.
        page_time: what mapping pages of virtual KV takes; None: nobody knows, and nobody may have any.
        copy_time: what copies between tiers take, where that is known.
        store: below the host, shared by all instances; None: there is none.
        experts: divided among the devices, where their loads are known; None: nobody counts them.
        expert_layout: of the experts, if they are divided, whether or not their loads are known; of those,
        experts_per_token, expert_link_bytes_per_s: that each token goes to, and at which rate one is copied.
        group: prices steps of `data_parallel` instances that share their experts; None: instances share nothing.
    """

    cost: CostModel
    model: Mapping[str, Any]
    timing: Mapping[str, Any]
    step_time: StepTime
    host: HostOverhead = field(default_factory=HostOverhead)
    calibration: Calibration | None = None
    most_kv_tokens: int | None = None
    acceptance: Acceptance | None = None
    draft_time: DraftTime = field(default_factory=DraftTime)
    page_time: PageTime | None = None
    copy_time: CopyTime = field(default_factory=CopyTime)
    store: StoreRoom | None = None
    experts: ServedExperts | None = None
    expert_layout: ExpertLayout | None = None
    experts_per_token: int = 0
    expert_link_bytes_per_s: float | None = None
    group: GroupCost | None = None
    data_parallel: int = 1

    def cost_of(self, config: InstanceConfig) -> CostModel:
        """Prices whole steps of such an instance: planned ahead, the device does not wait for the host."""
        return Hosted(self.cost, self.host, plans_ahead=config.async_scheduling != "off")

    def steps_together(self, config: InstanceConfig) -> GroupTiming | None:
        """How such instances step in groups, in one run; None: each by itself."""
        if self.group is None:
            return None
        hosted = HostedGroup(self.group, self.host, plans_ahead=config.async_scheduling != "off")
        return GroupTiming(self.data_parallel, hosted, Waves())

    def predicts(self, config: InstanceConfig, *, fast_forward: bool = True) -> Predicted:
        """What answers such an instance's loop, in one run."""
        return Predicted(
            self.cost_of(config),
            fast_forward=fast_forward,
            proposer=None if self.acceptance is None else SimulatedDrafts(self.acceptance),
            draft_time=self.draft_time,
            copy_time=self.copy_time,
            store=self._opened_store(config),
            drafting_cost=Hosted(self.cost, self.host),
            page_time=self.page_time,
            hides_mapping=config.async_scheduling != "off",
            experts=self.experts,
        )

    def _opened_store(self, config: InstanceConfig) -> SimulatedStore | None:
        if self.store is None:
            return None
        room, token_bytes = self.store.num_bytes, self.model.get("kv_bytes_per_token")
        if room is None:
            return SimulatedStore()
        if not token_bytes:
            raise ConfigError(
                "the store has room for so many bytes, and the machine does not say how many a token takes"
            )
        return SimulatedStore(room // (token_bytes * config.block_size))

    def refuse_if_not_priced(self, policies: Policies, config: InstanceConfig) -> None:
        """ConfigError for steps in captured graphs, or eager ones, where none of those calibrated on was one.

        And for virtual KV, or copies between tiers, where nobody knows what mapping or copying costs.
        """
        if not isinstance(policies.cache, DeviceOnly) and not self.copy_time:
            raise ConfigError(
                f"cache is {policy_name(policies.cache)!r}, and what a copy to the host and back takes is not known; "
                "accepted: a calibration on runs with both, or --host-link"
            )
        if self.store is not None and not self.copy_time.has_store:
            raise ConfigError(
                "what a copy to the store and back takes is not known; accepted: a calibration on runs with a store, "
                "or a store's bytes_per_s"
            )
        if config.kv_layout == "virtual" and self.page_time is None:
            raise ConfigError(
                "kv_layout is 'virtual': what mapping its pages costs is not known; accepted: a calibration on runs "
                "with virtual KV, or given times"
            )
        if not isinstance(policies.experts, Static) and self.experts is None:
            raise ConfigError(
                f"experts is {policy_name(policies.experts)!r}, and what there is to balance is not known; accepted: "
                "experts 'static', or --expert-trace"
            )
        if self.calibration is None:
            return
        has_eager, has_replayed = (self.calibration.highest[TERMS.index(t)] > 0 for t in ("eager_us", "replay_us"))
        if isinstance(policies.shapes, Eager) and not has_eager:
            raise ConfigError(f"every step calibrated on ran in a graph: what an eager one costs is not known; {_RUNS}")
        if not isinstance(policies.shapes, Eager) and not has_replayed:
            raise ConfigError(
                f"shapes is {policy_name(policies.shapes)!r}, and no step calibrated on ran in a graph: what one costs "
                f"is not known; {_RUNS}"
            )

    def refuse_if_too_large(self, config: InstanceConfig) -> None:
        """ConfigError for an instance that the machine's memory or its model's context cannot hold."""
        if self.most_kv_tokens is not None and config.num_kv_tokens > self.most_kv_tokens:
            most = self.most_kv_tokens // config.block_size
            raise ConfigError(
                f"num_kv_blocks is {config.num_kv_blocks}, the devices have room for {most} of "
                f"{config.block_size} tokens"
            )
        longest = self.model.get("max_model_len")
        if longest is not None and config.max_model_len > longest:
            name = self.model.get("name", "served")
            raise ConfigError(f"max_model_len is {config.max_model_len}, model {name} accepts {longest}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How a model is put on devices that were not measured as a whole.

    Attributes:
        is_one_of_alike: of data-parallel instances one is simulated, and the others are taken to do what it does.
        routing: how tokens choose experts, and where these lie; None: evenly.
    """

    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    precision: str = "bf16"
    host: HostOverhead = field(default_factory=HostOverhead)
    is_one_of_alike: bool = False
    routing: Routing | None = None

    def __post_init__(self) -> None:
        if self.is_one_of_alike and self.data_parallel == 1:
            raise ConfigError("one of alike instances is asked for, and data_parallel is 1; accepted: at least 2")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}, accepted: {', '.join(PRECISIONS)}")

    @property
    def has_group(self) -> bool:
        """Whether instances that share their experts are simulated side by side."""
        return self.data_parallel > 1 and not self.is_one_of_alike

    @property
    def bytes_and_rates(self) -> Precision:
        return PRECISIONS[self.precision]


def model_of(name_or_path: str | Path) -> ModelSpec:
    """A well-known model by its name, or the one of a transformers config.json.

    Raises:
        ModelError: neither.
    """
    if Path(name_or_path).suffix == ".json" or Path(name_or_path).is_dir():
        return read_model_spec(name_or_path)
    return known_model(str(name_or_path))


def fitted_machine(calibration: Calibration) -> Machine:
    """The machine on which the calibration's runs were made."""
    return Machine(
        cost=FittedCost(calibration),
        model=calibration.model,
        timing={
            "cost_model": "fitted",
            "calibrated_on": list(calibration.runs),
            "residual": asdict(calibration.residual),
            **({} if calibration.acceptance is None else {"acceptance": calibration.acceptance.described()}),
        },
        step_time=calibration.step_time_with_host(),
        host=calibration.host,
        calibration=calibration,
        acceptance=calibration.acceptance,
        draft_time=calibration.draft_time,
        page_time=calibration.page_time,
        copy_time=calibration.copy_time,
    )


def with_page_time(machine: Machine, given: PageTime) -> Machine:
    """The same machine, on which mapping pages takes so long."""
    return replace(machine, page_time=given, timing={**machine.timing, "page_time": asdict(given)})


def with_acceptance(machine: Machine, fracs: Sequence[float]) -> Machine:
    """The same machine, on which drafts are kept so, whatever makes them.

    Raises:
        ConfigError: as `GivenAcceptance`.
    """
    given = GivenAcceptance(tuple(fracs))
    return replace(machine, acceptance=given, timing={**machine.timing, "acceptance": given.described()})


def with_host_link(machine: Machine, bytes_per_s: float) -> Machine:
    """The same machine, whose host is behind a link of that rate each way.

    Raises:
        ConfigError: no rate above 0, or a machine that does not say how large a token's KV is.
    """
    token_bytes = machine.model.get("kv_bytes_per_token")
    if not token_bytes:
        raise ConfigError("the machine does not say how many bytes of KV a token takes; accepted: one whose model does")
    told = {**machine.timing, "host_link_bytes_per_s": bytes_per_s}
    link = link_copy_time(bytes_per_s, token_bytes)
    copy_time = link.with_store(machine.copy_time) if machine.copy_time.has_store else link
    return replace(machine, copy_time=copy_time, timing=told)


def with_store_of(machine: Machine, run: Run, policies: Policies) -> Machine:
    """The same machine, with room for everything in a store if the run had one, and these policies would use it."""
    has_store = run.manifest.store is not None and not isinstance(policies.cache, DeviceOnly)
    return with_store(machine, "sim:", policies) if has_store else machine


def with_store(machine: Machine, spec: str, policies: Policies) -> Machine:
    """The same machine, with a store below the host; its times are the calibration's, if the spec has none.

    Args:
        spec: "sim:" and, after a "?", any of bytes=SIZE, bytes_per_s=RATE and latency_us=TIME.

    Raises:
        ConfigError: anything else; a machine that does not say how large a token's KV is, where that matters; policies
            that never use a store.
    """
    if isinstance(policies.cache, DeviceOnly):
        raise ConfigError(f"store is {spec!r}, and cache policy device-only never uses it; accepted: another policy")
    room, rate, latency_us = store_room(spec)
    copy_time = machine.copy_time
    if rate is not None:
        token_bytes = machine.model.get("kv_bytes_per_token")
        if not token_bytes:
            raise ConfigError("the machine does not say how many bytes of KV a token takes; accepted: one that does")
        given = link_copy_time(rate, token_bytes, latency_us=latency_us, kinds=STORE_KINDS)
        copy_time = copy_time.with_store(given)
    return replace(machine, copy_time=copy_time, store=room, timing={**machine.timing, "store": spec})


def roofline_machine(device: Device, model: ModelSpec, deployment: Deployment | None = None) -> Machine:
    """Devices and a model that nobody has measured together. Drafts by "mtp" cost what one more layer of it would.

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    d = deployment or Deployment()
    if d.has_group and d.expert_parallel == 1:
        raise ConfigError(
            f"data_parallel is {d.data_parallel} without expert_parallel: the instances share nothing; accepted: so "
            "many instances, or one of alike ones"
        )
    room = kv_blocks_that_fit(
        device,
        model,
        tensor_parallel=d.tensor_parallel,
        data_parallel=d.data_parallel,
        expert_parallel=d.expert_parallel,
        precision=d.bytes_and_rates,
        block_size=1,
    )
    sharding = Sharding(tensor=d.tensor_parallel, data=d.data_parallel, expert=d.expert_parallel)
    cost = RooflineCost(device, model, sharding=sharding, precision=d.bytes_and_rates)
    cost.route(d.routing)
    layer = RooflineCost(device, draft_spec(model), sharding=sharding, precision=d.bytes_and_rates)
    told = {"cost_model": "roofline", "device": device.name, "error": "unknown: nothing was measured", **_told(d)}
    return Machine(
        cost=cost,
        model=_described(model),
        timing=told,
        step_time=step_time_of(Hosted(cost, d.host)),
        host=d.host,
        most_kv_tokens=room,
        draft_time=mtp_draft_time(layer),
        group=cost if d.has_group else None,
        data_parallel=d.data_parallel,
        **_divided_experts(model, d, device),
    )


def _divided_experts(model: ModelSpec, d: Deployment, device: Device | None) -> dict[str, Any]:
    """What a machine knows of experts that are spread over devices."""
    e = model.experts
    # Published deployments have devices beyond those of a divisor, for copies and shared experts: nothing moves there.
    if e is None or d.expert_parallel == 1 or e.num_experts % d.expert_parallel:
        return {}
    layers = tuple(range(model.num_dense_layers, model.num_dense_layers + e.num_layers))
    return {
        "expert_layout": ExpertLayout(
            layers=layers,
            num_experts=e.num_experts,
            num_devices=d.expert_parallel,
            expert_bytes=round(e.params_per_expert * d.bytes_and_rates.weight_bytes),
        ),
        "experts_per_token": e.num_per_token,
        "expert_link_bytes_per_s": None if device is None else device.link_for(d.expert_parallel).bytes_per_s,
    }


def profiled_machine(
    folder: Path, model: ModelSpec | None = None, deployment: Deployment | None = None, device: Device | None = None
) -> Machine:
    """A machine whose operators were measured.

    Args:
        folder: a profile bundle.
        model: if it is not the bundle's own: that of its config.json, or the well-known one of its name.
        device: whose links join the devices of an instance, and of a group.

    Raises:
        ProfileError: the bundle cannot be read, or lacks an operator.
        ConfigError: several devices without a `device`; another precision; or a model that cannot be divided so.
    """
    d = deployment or Deployment()
    if d.precision != "bf16":
        raise ConfigError(
            f"a profile is of the precision it was taken in: {d.precision!r} is given, 'bf16' is accepted"
        )
    bundle = read_bundle(folder, d.tensor_parallel, d.tensor_parallel * d.data_parallel)
    spec = model or profiled_model(folder)
    links = None if device is None else partial(collectives, device)
    cost = ProfiledCost(bundle, spec, links=links, data_parallel=d.data_parallel, expert_parallel=d.expert_parallel)
    cost.route(d.routing)
    told = {"cost_model": "profiled", "profile": str(folder), **_told(d)}
    step_time = step_time_of(Hosted(cost, d.host))
    return Machine(
        cost=cost,
        model=_described(spec),
        timing=told,
        step_time=step_time,
        host=d.host,
        page_time=bundle.page_time,
        group=cost if d.has_group else None,
        data_parallel=d.data_parallel,
        **_divided_experts(spec, d, device),
    )


def profiled_model(folder: Path) -> ModelSpec:
    """A bundle's own model: that of its config.json, or the well-known one of its name.

    Raises:
        ProfileError: no bundle.
        ModelError: a name that is not known, and no config.json.
    """
    return read_model_spec(folder) if (folder / "config.json").exists() else known_model(bundle_model(folder))


def step_time_of(cost: CostModel) -> StepTime:
    """What a policy is told of a machine that is known by its cost model: step times fitted to a grid of its prices."""
    rows, times = [], []
    prompts: list[tuple[Chunk, ...]] = [(), *((Chunk(n, k),) for n, k in product((16, 128, 512, 2048), (0, 1024)))]
    for prefill, num_decodes, context in product(prompts, (0, 1, 4, 16, 64, 128), (64, 512, 2048)):
        chunks = (*prefill, *[Chunk(1, context)] * num_decodes)
        if chunks:
            rows.append(features(chunks, len(chunks)))
            times.append(cost.step(batch_of(chunks, len(chunks))).us)
    return fit(rows, times)


def _described(model: ModelSpec) -> dict[str, Any]:
    if model.vocab_size < 1:
        raise ModelError(f"{model.name}: vocab_size is {model.vocab_size}, at least 1 is accepted")
    return {
        "name": model.name,
        "vocab_size": model.vocab_size,
        "max_model_len": model.max_position,
        "kv_bytes_per_token": round(model.kv_bytes_per_token()),
    }


def _told(d: Deployment) -> dict[str, Any]:
    return {
        "tensor_parallel": d.tensor_parallel,
        "data_parallel": d.data_parallel,
        "expert_parallel": d.expert_parallel,
        "precision": d.precision,
        "host": asdict(d.host),
        **({"is_one_of_alike": True} if d.is_one_of_alike else {}),
        **({} if d.routing is None else {"experts_peak_to_mean": round(d.routing.peak_to_mean, 4)}),
    }
