"""The engine as a host of the serving loop: it runs each step on a device and answers with measured time and tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.drafting import Proposer
from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.copies import EngineCopies, measure_copy_time
from xllm_lab.engine.device import DTYPES, Device, open_device
from xllm_lab.engine.drafts.draft_model import draft_model_proposer, open_draft_model
from xllm_lab.engine.drafts.engine_drafts import EngineDrafts, Maker
from xllm_lab.engine.drafts.mtp import mtp_proposer
from xllm_lab.engine.drafts.ngram import NgramProposer
from xllm_lab.engine.drafts.suffix import SuffixProposer
from xllm_lab.engine.drafts.verify import draw_draft, kept_until_stop
from xllm_lab.engine.expert_mover import ExpertMover
from xllm_lab.engine.expert_parallel import (
    ALL_GATHER,
    ExpertParallel,
    refuse_dispatch,
    refuse_if_not_spreadable,
)
from xllm_lab.engine.graphs import Graphs, refuse_what_nothing_captures
from xllm_lab.engine.kv import KvLayout, KvPool
from xllm_lab.engine.lane import Done, Lane
from xllm_lab.engine.launcher import Launched, Launcher
from xllm_lab.engine.lead import Lead
from xllm_lab.engine.live_experts import LiveExperts
from xllm_lab.engine.models import DEFAULT_MODEL, LoadedModel, load_model, model_config
from xllm_lab.engine.ops.table import check_calls
from xllm_lab.engine.page_mapper import PageMapper
from xllm_lab.engine.rank_place import refuse_other_size
from xllm_lab.engine.ranks import Ranks, lead
from xllm_lab.engine.rehearsal import measure_step_time, warm_up
from xllm_lab.engine.runner import Runner
from xllm_lab.engine.seat import Seat
from xllm_lab.engine.sharding import refuse_if_indivisible
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.engine.workspace import most_logits
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DeviceOnly
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.draft import METHODS, DraftPolicy
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.experts import ExpertsPolicy
from xllm_lab.policies.experts.static import Static
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER, Eager
from xllm_lab.progress import tell
from xllm_lab.rebalancing import PREPARE_TIMEOUT_US, ExpertLayout, describe_experts
from xllm_lab.records import Recorder, Records
from xllm_lab.runs import Manifest, Run, describe, fill_run, new_folder
from xllm_lab.scheduler import Sampled, Scheduler
from xllm_lab.scheduler_of import scheduler_of
from xllm_lab.serving import Completion, Conversation, Feed, Idle, Woke, WorkloadFeed, serve
from xllm_lab.step import Step, Work
from xllm_lab.step_time import StepTime
from xllm_lab.store import BlockIdentity, BlockStore, open_store
from xllm_lab.tiering_of import num_host_blocks
from xllm_lab.workload import Request, TokenIds, Workload, prompt_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What is served, where, and on whose time.

    Attributes:
        model: "smollm2-135m", a folder with config.json and safetensors, or a .gguf file.
        device: "cpu", "cuda", "npu", or "auto".
        dtype: "float32", "bfloat16", or "auto" for the device's default.
        threads: compute threads on a CPU.
        clock: "wall" replays in real time; "virtual" jumps over idle gaps.
        timer: what a virtual clock counts while it works: "wall", or "cpu" for processor time.
        without_ops: implementations of operators not to use, as `engine.ops.table` names them: "native", "onednn".
        graph_pool_bytes: what a step's memory may take if steps are captured; None: what the device has free.
        tensor_parallel: processes, each with a device of its own, that the model is divided over.
        expert_parallel: experts lie whole on the ranks, instead of a part of each on every rank; in a fleet, on its
            instances, each of which has the attention of its own requests.
        expert_dispatch: how tokens get there, one of `expert_parallel.DISPATCHES`.
        num_redundant_experts: slots of each rank beside those that hold every expert once.
        rank_timeout_s: how long one of them waits for another in a step before the run ends.
        prepare_timeout_s: how long they may take to prepare experts for other places before that is given up.
        draft_model: what drafts by "draft_model": another model, or some layers of the served one, "layers:0-9,28-29".
        host_link_bytes_per_s: copies between device and host end no sooner than at that rate; None: when they end.
        store: of KV blocks below the host, as `store.open_store` names one; None: there is none.
        check_ops: from now on, hold each call of an operator in this process against the limits of its documentation;
            slow, and only where operators have some.
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    clock: str = "virtual"
    timer: str = "wall"
    without_ops: tuple[str, ...] = ()
    graph_pool_bytes: int | None = None
    tensor_parallel: int = 1
    expert_parallel: bool = False
    expert_dispatch: str = ALL_GATHER
    num_redundant_experts: int = 0
    rank_timeout_s: float = 300.0
    prepare_timeout_s: float = PREPARE_TIMEOUT_US / 1e6
    draft_model: str | None = None
    host_link_bytes_per_s: float | None = None
    store: str | None = None
    check_ops: bool = False

    def serving(self, policies: Policies) -> EngineOptions:
        """The same, with as many slots for experts as these policies want, unless it says how many."""
        if not self.expert_parallel or self.num_redundant_experts:
            return self
        return replace(self, num_redundant_experts=policies.experts.num_redundant_experts)


class Engine:
    """A loaded model on an open device; serves any number of workloads, one after another.

    Divided over several processes, this one is rank 0 and drives the others. Close it, or use it with `with`; a run
    that goes wrong closes it, too.

    Args:
        ranks: of a rank other than 0, where it is; of an instance that shares experts with others, who they are.

    Attributes:
        ranks: this process and the others; None if there are none.
        is_divided: the others have parts of all that this one has, and do what rank 0 tells them.
        expert_observer: as `Runner.expert_observer`, of the steps of runs that begin from now on.

    Raises:
        ConfigError: an unknown device, dtype, clock or timer, or a model that cannot be divided so or does not fit.
        ModelError: the model cannot be loaded.
        RankError: another process does not come up.
    """

    def __init__(self, options: EngineOptions | None = None, *, ranks: Ranks | None = None) -> None:
        self.options = options or EngineOptions()
        self.expert_observer: Callable[[int, Tensor], None] | None = None
        if self.options.dtype not in (*DTYPES, "auto"):
            raise ConfigError(f"dtype is {self.options.dtype!r}, accepted: auto, {', '.join(DTYPES)}")
        make_clock(self.options.clock, self.options.timer)
        if self.options.graph_pool_bytes is not None and self.options.graph_pool_bytes < 0:
            raise ConfigError(f"graph_pool_bytes is {self.options.graph_pool_bytes}, at least 0 is accepted")
        if (rate := self.options.host_link_bytes_per_s) is not None and not rate > 0:
            raise ConfigError(f"host_link_bytes_per_s is {rate}, more than 0 is accepted")
        if not self.options.prepare_timeout_s > 0:
            raise ConfigError(f"prepare_timeout_s is {self.options.prepare_timeout_s}, more than 0 is accepted")
        if self.options.timer == "cpu" and self.options.threads != 1:
            raise ConfigError(f"timer 'cpu' with {self.options.threads} threads counts each; accepted: 1 thread")
        o = self.options
        refuse_dispatch(o.expert_dispatch, o.num_redundant_experts, is_parallel=o.expert_parallel)
        self.is_divided = self.options.tensor_parallel > 1
        self.ranks = self._others() if ranks is None else ranks
        self._store: BlockStore | None = None
        self._live_experts: LiveExperts | None = None
        try:
            self._open()
        except BaseException:
            self._abandon()
            raise

    def _others(self) -> Ranks | None:
        size, timeout_s = self.options.tensor_parallel, self.options.rank_timeout_s
        refuse_other_size(size)
        if self.options.expert_parallel:
            config = model_config(self.options.model)
            refuse_if_not_spreadable(config, size, self.options.num_redundant_experts, self.options.model)
        if size == 1:
            return None
        if not timeout_s > 0:
            raise ConfigError(f"rank_timeout_s is {timeout_s}, more than 0 is accepted")
        if self.options.timer == "cpu":
            raise ConfigError(f"timer 'cpu' with tensor_parallel {size} leaves out the others; accepted: timer 'wall'")
        whole = {"has_whole_experts": self.options.expert_parallel}
        refuse_if_indivisible(model_config(self.options.model), size, self.options.model, **whole)
        others = lead(size, timeout_s)
        others.tell(asdict(self.options))
        return others

    def _open(self) -> None:
        o, ranks = self.options, self.ranks
        index = None if ranks is None else ranks.place.local_rank
        self.device: Device = open_device(o.device, threads=o.threads, index=index)
        if ranks is not None:
            ranks.connect(self.device.collectives)
        group = ranks.group if ranks is not None and self.is_divided else None
        experts = None
        if ranks is not None and o.expert_parallel:
            experts = ExpertParallel(
                group=ranks.group,
                dispatch=o.expert_dispatch,
                num_redundant=o.num_redundant_experts,
                has_own_tokens=not self.is_divided,
            )
        check_calls(self.device.torch_device, on=o.check_ops)
        with self.device.refusing_what_does_not_fit(f"model {o.model}"):
            parts: dict[str, Any] = {"group": group, "experts": experts, "without": o.without_ops}
            self.model: LoadedModel = load_model(o.model, device=self.device, dtype=DTYPES.get(o.dtype), **parts)
            self.draft_model = self._open_draft_model()
        if ranks is not None:
            ranks.meet("loaded")
        self._lead = Lead(ranks if self.is_divided else None)

    def _open_draft_model(self) -> LoadedModel | None:
        """Who decides drafts."""
        spec, ranks = self.options.draft_model, self.ranks
        if spec is None or (ranks is not None and self.is_divided and ranks.group.rank > 0):
            return None
        size = 1 if ranks is None else ranks.group.size
        return open_draft_model(spec, self.model, device=self.device, group_size=size, without=self.options.without_ops)

    def close(self) -> None:
        """The other ranks end, and the store is left."""
        if self._store is not None:
            self._store.close()
        if self.ranks is not None and self.is_divided:
            self.ranks.end()
        elif self.ranks is not None:
            self.ranks.leave()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """After a failure nobody knows at which step each rank is."""
        if self.ranks is not None and self.is_divided:
            self.ranks.abandon()
        elif self.ranks is not None:
            self.ranks.leave()

    def serve(
        self,
        workload: Workload,
        config: InstanceConfig,
        policies: Policies,
        recorder: Recorder,
        *,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
    ) -> dict[str, Any] | None:
        """Serve a workload to its end; records go to `recorder` as they come.

        A request that could never run on this configuration is rejected when it arrives, and the others are served.

        Returns:
            What became of steps and graphs (`ShapeCounts`, `Graphs.describe`); None if every step is eager.

        Raises:
            ConfigError: the KV pool or the graphs' does not fit, the context is longer than the model's, a token is not
                in the vocabulary, or step or copy times are missing; tiers that do not fit, or cannot be kept here.
            PolicyError: a policy planned something illegal, or starves a request.
        """
        self._refuse(workload, config, policies)
        scheduler = scheduler_of(
            *(config, policies, recorder),
            proposer=self.proposer(policies, config),
            copier=self.copies(policies.cache, config),
            mover=self.mover(policies.experts),
            step_time=step_time,
            draft_time=draft_time,
            copy_time=copy_time,
        )
        prompts = {r.id: self._prompt_ids(r, workload.seed) for r in workload.requests}
        return self.serve_on(scheduler, WorkloadFeed(workload), lambda r: prompts.pop(r.id))

    def serve_on(
        self,
        scheduler: Scheduler,
        feed: Feed,
        prompt_ids: Callable[[Request], TokenIds],
        *,
        seat: Seat | None = None,
    ) -> dict[str, Any] | None:
        """Serve what a feed brings, to its end, on a scheduler that its owner can look into meanwhile.

        Args:
            prompt_ids: as in `serving.serve`; all in the model's vocabulary.
            seat: in a fleet; None is alone, and time begins when the engine is warm.

        Returns:
            as `serve`.

        Raises:
            as `serve`.
        """
        config = scheduler.config
        shapes = EAGER if scheduler.shapes is None else scheduler.shapes.policy
        mover = None if scheduler.experts is None else scheduler.experts.mover
        assert mover is None or isinstance(mover, ExpertMover), "experts are moved by the engine"
        with self._together():
            if mover is not None and scheduler.experts is not None:
                mover.begin(scheduler.experts.slots)
            with self.device.refusing_what_does_not_fit("a step at the configured limits"):
                runner = self._runner(config, shapes, counts_experts=mover is not None)
                warm_up(runner, config, self._lead, self.device)
            runner.expert_observer = self.expert_observer
            if seat is not None:
                runner.company = seat.company
            clock = make_clock(self.options.clock, self.options.timer) if seat is None else seat.open_clock()
            with contextlib.ExitStack() as run:
                lane = run.enter_context(
                    Lane(clock, beside=config.async_scheduling != "off", begins=self.device.like_this_thread())
                )
                mapper = run.enter_context(self._mapper(runner))
                copies = None if scheduler.tiering is None else scheduler.tiering.copier
                assert copies is None or isinstance(copies, EngineCopies), "copies are the engine's own"
                if copies is not None:
                    run.enter_context(copies.open(clock, runner.kv, self.device, lane))
                drafts = None if scheduler.drafting is None else scheduler.drafting.proposer
                assert drafts is None or isinstance(drafts, EngineDrafts), "drafts are the engine's own"
                if drafts is not None:
                    drafts.serve(clock, runner)
                beside: dict[str, Any] = {"drafts": drafts, "mapper": mapper, "mover": mover}
                launcher = Launcher(runner, scheduler, lane, clock, self._lead, **beside)
                start_us = 0 if seat is None else seat.start_us
                conversation = serve(scheduler, feed, prompt_ids, launch=launcher.launch, start_us=start_us)
                self._answer(conversation, launcher, seat, copies)
            if scheduler.experts is not None:
                scheduler.experts.finish()
        if scheduler.shapes is None or runner.graphs is None:
            return None
        return {**scheduler.shapes.counts.as_dict(), **runner.graphs.describe()}

    def _mapper(self, runner: Runner) -> contextlib.AbstractContextManager[PageMapper | None]:
        """What maps pages in a run, if any are."""
        pool = runner.kv_pool
        return PageMapper(pool, self.device) if isinstance(pool, VirtualKvPool) else contextlib.nullcontext()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _answer(
        self, conversation: Conversation, launcher: Launcher, seat: Seat | None, copies: EngineCopies | None
    ) -> None:
        try:
            command = next(conversation)
            while True:
                answer: Completion | Woke
                if not isinstance(command, Idle):
                    if seat is not None:
                        seat.planned(command)
                    launched, done = launcher.wait_for(command)
                    answer = self._completion(command, launched, done)
                    if copies is not None:
                        answer.copied = copies.over(answer.ends_us[-1])
                elif seat is not None:
                    answer = self._rest(seat, launcher, copies)
                elif copies is not None and (copies.is_copying or command.until_us is None):
                    answer = copies.rest(command.until_us, launcher.rest)
                else:
                    assert command.until_us is not None, "a workload says when its next request comes"
                    answer = Woke(launcher.rest(command.until_us))
                command = conversation.send(answer)
        except StopIteration:
            return

    def _rest(self, seat: Seat, launcher: Launcher, copies: EngineCopies | None) -> Woke:
        """In a fleet: until something comes, or a copy is over, or a step of others is."""
        now_us = launcher.run_beside() if seat.company.is_needed else launcher.rest(seat.rest(copies))
        return Woke(now_us) if copies is None else copies.woke(now_us)

    def _completion(self, step: Step, launched: Launched, done: Done[list[list[int]]]) -> Completion:
        drawn = zip(launched.inputs.drawing, done.result, strict=True)
        sampled = {request.id: self._sampled(request, tokens) for request, tokens in drawn}
        # A step shorter than the clock's tick would end when it started.
        end_us = max(done.end_us, step.start_us + 1)
        work = Work(launched.host_us, done.device_us, done.idle_us)
        return Completion((end_us,), sampled, work)

    def replay(
        self,
        workload: Workload,
        config: InstanceConfig,
        policies: Policies,
        *,
        out: Path,
        step_time: StepTime | None = None,
        draft_time: DraftTime | None = None,
        copy_time: CopyTime | None = None,
        recorder: Records | None = None,
    ) -> Run:
        """Serve a workload and write the run folder.

        A policy that needs step or copy times gets this machine's, measured first, unless they are given. Without a
        `draft_time` it believes that drafting is free.

        Raises:
            RequestTooLargeError: a request could never run on this configuration: more likely an oversight in a trace
                than meant.
            as `serve`, and RunError if the folder exists or cannot be written.
        """
        for request in workload.requests:
            config.refuse_if_too_large(request)
        # Before step times are measured on a context that the model may not have.
        self._refuse(workload, config, policies)
        if step_time is None and any(getattr(policy, "needs_step_time", False) for _, policy in policies):
            step_time = self.measure_step_time(config)
        if copy_time is None and getattr(policies.cache, "needs_copy_time", False):
            copy_time = self.measure_copy_time(config, policies.cache)
        records = Records() if recorder is None else recorder
        times: dict[str, Any] = {"step_time": step_time, "draft_time": draft_time, "copy_time": copy_time}
        with new_folder(out) as folder:
            graphs = self.serve(workload, config, policies, records, **times)
            timing = {k: v for k, v in asdict(self.options).items() if k in ("clock", "timer", "threads")}
            if not isinstance(policies.cache, DeviceOnly) and self.options.host_link_bytes_per_s is not None:
                timing["host_link_bytes_per_s"] = self.options.host_link_bytes_per_s
            manifest = Manifest(
                host="engine",
                timing=timing,
                model=self.describe(),
                graphs=graphs,
                store=None if isinstance(policies.cache, DeviceOnly) else self.describe_store(),
                drafts=None if isinstance(policies.draft, Off) else self.describe_drafts(),
                expert_layout=self.describe_places(policies.experts, records),
                **describe(config, policies, step_time, workload, draft_time=draft_time, copy_time=copy_time),
            )
            fill_run(folder, manifest, workload, records)
        if dropped := sum(decision.dropped_us is not None for decision in records.decisions):
            limit_s = self.options.prepare_timeout_s
            tell(f"xllm-lab: {dropped} changes of experts were given up: a rank was not ready within {limit_s:g} s")
        return Run(out, manifest)

    def describe(self) -> dict[str, Any]:
        """The model and device, for manifests."""
        dtype = self.model.model.dtype
        return {
            "name": self.model.name,
            "checksum": self.model.checksum,
            "dtype": str(dtype).removeprefix("torch."),
            "device": self.device.description,
            "vocab_size": self.model.config.vocab_size,
            "max_model_len": self.model.config.max_position,
            "ops": self.model.model.describe_ops(),
            "kv_bytes_per_token": self.model.model.config.kv_bytes_per_token(dtype),
            "tensor_parallel": self.options.tensor_parallel,
            **self._described_experts(),
        }

    def _described_experts(self) -> dict[str, Any]:
        o, parallel = self.options, self.model.model.experts
        if parallel is None:
            return {}
        told = {"expert_dispatch": o.expert_dispatch, "num_redundant_experts": o.num_redundant_experts}
        return {"expert_parallel": parallel.group.size, **told}

    def describe_places(self, policy: ExpertsPolicy, records: Records) -> dict[str, Any] | None:
        """Of the experts in a run, for manifests; None where they do not lie on ranks that rank 0 drives."""
        mover = self.mover(policy)
        if mover is None:
            return None
        return describe_experts(mover.layout, policy.num_redundant_experts, records.decisions)

    def describe_drafts(self) -> dict[str, Any]:
        """What a policy may choose from, for manifests."""
        smaller = self.draft_model
        model = None if smaller is None else {"name": smaller.name, "checksum": smaller.checksum}
        return {"methods": list(self._makers()), "model": model}

    def measure_step_time(self, config: InstanceConfig) -> StepTime:
        """Fit step times to a grid of synthetic steps, as xLLM's `enable_profile_step_time` does at start-up."""
        with self._together():
            return measure_step_time(self._runner(config), config, self._lead, self.options.timer)

    def measure_copy_time(self, config: InstanceConfig, policy: CachePolicy) -> CopyTime:
        """Fit copy times, over the emulated link if there is one, to copies between this device and its host.

        Raises:
            ConfigError: the KV pool or the host's blocks do not fit.
        """
        copies, num_slots = self.copies(policy, config), num_host_blocks(policy, config)
        assert copies is not None, f"policy {policy_name(policy)} copies nothing"
        with self._together():
            runner = self._runner(config)
            clock = make_clock("virtual", self.options.timer)
            return measure_copy_time(copies, clock, runner.kv, self.device, num_slots=num_slots)

    def copies(self, policy: CachePolicy, config: InstanceConfig) -> EngineCopies | None:
        """What copies between tiers in a run; None where nothing is ever copied.

        Raises:
            ConfigError: the store cannot be opened.
        """
        if isinstance(policy, DeviceOnly):
            return None
        link = self.options.host_link_bytes_per_s
        return EngineCopies(num_host_blocks(policy, config), link_bytes_per_s=link, store=self._opened_store(config))

    def _opened_store(self, config: InstanceConfig) -> BlockStore | None:
        """Kept for the next run: what this process lends to it would be gone with it."""
        if self.options.store is None:
            return None
        identity = self._block_identity(config)
        if self._store is not None and self._store.identity != identity:
            self._store.close()
            self._store = None
        if self._store is None:
            shape, dtype = self.model.model.config, self.model.model.dtype
            block_bytes = shape.kv_bytes_per_token(dtype) * config.block_size
            self._store = open_store(self.options.store, identity, block_bytes)
        return self._store

    def _block_identity(self, config: InstanceConfig) -> BlockIdentity:
        shape = self.model.model.config
        return BlockIdentity(
            model=self.model.checksum,
            layout="layer, key or value, token, head, dimension",
            dtype=str(self.model.model.dtype).removeprefix("torch."),
            block_size=config.block_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )

    def describe_store(self) -> dict[str, Any] | None:
        """The store and what became of its blocks since it was opened, for manifests; None where there is none."""
        if self._store is None:
            return None
        return {"store": self._store.described, **asdict(self._store.counters())}

    def _refuse(self, workload: Workload, config: InstanceConfig, policies: Policies) -> None:
        self.refuse(config, policies)
        refuse_unknown_tokens(workload, self.model.config.vocab_size)

    def refuse(self, config: InstanceConfig, policies: Policies) -> None:
        """ConfigError for a context longer than the model's, or a draft policy that cannot be served here."""
        if config.max_model_len > self.model.config.max_position:
            raise ConfigError(
                f"max_model_len is {config.max_model_len}, model {self.model.name} accepts "
                f"{self.model.config.max_position}"
            )
        if config.kv_layout == "virtual" and self.is_divided:
            raise ConfigError(
                f"kv_layout 'virtual' with tensor_parallel {self.options.tensor_parallel}: only one rank maps pages; "
                "accepted: tensor_parallel 1, or 'paged'"
            )
        self._refuse_method(policies.draft)
        if self.options.store is not None and isinstance(policies.cache, DeviceOnly):
            raise ConfigError(
                f"store is {self.options.store!r}, and cache policy device-only never uses it; accepted: another policy"
            )
        if not isinstance(policies.cache, DeviceOnly):
            self._refuse_tiers(policies.cache, policies.draft)

    def _refuse_tiers(self, cache: CachePolicy, draft: DraftPolicy) -> None:
        name, size = policy_name(cache), self.options.tensor_parallel
        if size > 1:
            raise ConfigError(
                f"cache policy {name}: with tensor_parallel {size} each rank would have to copy its part of a block; "
                "accepted: tensor_parallel 1"
            )
        method = getattr(draft, "method", "mtp")  # a policy without one may choose it
        if not isinstance(draft, Off) and method == "mtp" and self.model.mtp is not None:
            raise ConfigError(
                f"cache policy {name}: draft policy {policy_name(draft)} may draft by 'mtp', which needs hidden states "
                f"of the blocks before, and the host keeps none; accepted: another method, or cache policy device-only"
            )

    def _refuse_method(self, policy: DraftPolicy) -> None:
        name, method, known = policy_name(policy), getattr(policy, "method", None), self._makers()
        if method not in METHODS or method in known:
            return
        missing = {
            "draft_model": "there is no draft model: give one with --draft-model, or EngineOptions(draft_model=...)",
            "mtp": f"model {self.model.name} has no prediction module",
        }
        if method == "mtp" and self.model.model.is_divided:
            missing["mtp"] = "a prediction module drafts on one rank, so with tensor_parallel 1"
            if not self.is_divided:
                missing["mtp"] = "a prediction module would need its experts on each rank, so without expert_parallel"
        raise ConfigError(
            f"draft policy {name}: method is {method!r}, and {missing[method]}; accepted here: {', '.join(known)}"
        )

    def _runner(self, config: InstanceConfig, shapes: ShapesPolicy = EAGER, *, counts_experts: bool = False) -> Runner:
        if not isinstance(shapes, Eager):
            refuse_what_nothing_captures(self.model.model, self.device)  # before others are told, and refuse it, too
        self._lead.open(config, shapes)
        return self.runner(config, shapes, counts_experts=counts_experts)

    def live_experts(self) -> LiveExperts:
        """What moves the experts of this rank.

        Raises:
            ConfigError: they cannot be read one by one.
        """
        if self._live_experts is None:
            self._live_experts = LiveExperts(self.model, self.device)
        return self._live_experts

    def mover(self, policy: ExpertsPolicy) -> ExpertMover | None:
        """What moves experts in a run; None where they do not lie on ranks that rank 0 drives.

        Raises:
            ConfigError: slots other than the policy's, or experts that cannot be read one by one.
        """
        parallel, o, mixture = self.model.model.experts, self.options, self.model.config.mixture
        if parallel is None or parallel.has_own_tokens or mixture is None or self.ranks is None:
            return None
        if isinstance(policy, Static) and not Path(self.model.name).is_dir():
            return None
        if not isinstance(policy, Static) and policy.num_redundant_experts != o.num_redundant_experts:
            raise ConfigError(
                f"experts policy {policy_name(policy)} wants num_redundant_experts {policy.num_redundant_experts}, and "
                f"the engine was opened with {o.num_redundant_experts}; accepted: the same"
            )
        weights = 3 * self.model.config.hidden_size * mixture.intermediate_size
        layout = ExpertLayout(
            layers=tuple(sorted(mixture.layers)),
            num_experts=mixture.routing.num_experts,
            num_groups=mixture.routing.num_groups,
            num_devices=parallel.group.size,
            expert_bytes=weights * self.model.model.dtype.itemsize,
            num_redundant_experts=o.num_redundant_experts,
            prepare_timeout_us=round(o.prepare_timeout_s * 1e6),
        )
        return ExpertMover(layout, self.live_experts(), self.ranks)

    def runner(self, config: InstanceConfig, shapes: ShapesPolicy = EAGER, *, counts_experts: bool = False) -> Runner:
        """What runs the steps of this rank.

        Args:
            counts_experts: somebody reads what each slot of experts had to do.

        Raises:
            ConfigError: the KV pool or the graphs' does not fit.
        """
        captures = not isinstance(shapes, Eager)
        pool = self._kv_pool(config, config.num_kv_blocks + captures)  # what pads a graph has a block of its own
        tells = self.ranks is not None and self.is_divided and config.async_scheduling != "off"
        told = self.ranks.group if tells and self.ranks is not None else None
        runner = Runner(self.model.model, pool, self.device, told=told)
        runner.workspace.counts_experts = counts_experts or self.expert_observer is not None
        if captures:
            runner.graphs = Graphs(
                *(self.model.model, pool, self.device, runner.workspace),
                config=config,
                policy=shapes,
                pool_bytes=self.options.graph_pool_bytes,
            )
        longest = min(config.max_tokens_per_batch, config.num_kv_tokens)
        runner.most_logits = most_logits(config)
        runner.workspace.reserve(tokens=longest, logits=runner.most_logits)
        return runner

    def _kv_pool(self, config: InstanceConfig, num_blocks: int) -> KvLayout:
        shape, dtype, device = self.model.model.config, self.model.model.dtype, self.device
        if config.kv_layout == "virtual":
            return VirtualKvPool(shape, config, num_blocks=num_blocks, dtype=dtype, device=device)
        return KvPool(shape, num_blocks=num_blocks, block_size=config.block_size, dtype=dtype, device=device)

    def proposer(self, policies: Policies, config: InstanceConfig) -> EngineDrafts:
        """Every method that this engine can draft by, and of those what the policy may ask for."""
        method = getattr(policies.draft, "method", None)
        makers: dict[str, Maker] = {name: partial(make, config) for name, make in self._makers().items()}
        return EngineDrafts(makers, [method] if method in METHODS else METHODS)

    def _makers(self) -> dict[str, Callable[[InstanceConfig, Runner], Proposer]]:
        """What opens each method for a run."""
        model, device = self.model, self.device
        makers: dict[str, Callable[[InstanceConfig, Runner], Proposer]] = {
            "ngram": lambda *_: NgramProposer(),
            "suffix": lambda *_: SuffixProposer(),
        }
        if (smaller := self.draft_model) is not None:
            makers["draft_model"] = lambda config, _: draft_model_proposer(smaller, config, device, draw_draft)
        if model.mtp is not None:
            makers["mtp"] = lambda config, runner: mtp_proposer(model, runner, config, device, draw_draft)
        return makers

    def _prompt_ids(self, request: Request, seed: int) -> TokenIds:
        return prompt_token_ids(request, vocab_size=self.model.config.vocab_size, seed=seed)

    def _sampled(self, request: Request, tokens: Sequence[int]) -> Sampled:
        """Of what a request drew, up to the token that ends it."""
        *accepted, last = kept_until_stop(tokens, lambda token: self._stops(request, token))
        return Sampled(last, self._stops(request, last), accepted)

    def _stops(self, request: Request, token: int) -> bool:
        sampling = request.sampling
        return not sampling.ignore_eos and (token in sampling.stop_token_ids or token in self.model.eos_token_ids)


def refuse_unknown_tokens(workload: Workload, vocab_size: int) -> None:
    """ConfigError for a prompt with a token that is not in the vocabulary."""
    for request in workload.requests:
        for token in request.prompt.token_ids or ():
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"request {request.id}: token id {token}; the vocabulary accepts 0 to {vocab_size - 1}"
                )
