"""The engine as a host of the serving loop: it runs each step on a device and answers with measured time and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.device import DTYPES, Device, open_device
from xllm_lab.engine.graphs import Graphs
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.lane import Done, Lane
from xllm_lab.engine.launcher import Launched, Launcher
from xllm_lab.engine.models import DEFAULT_MODEL, LoadedModel, load_model
from xllm_lab.engine.ops.table import check_calls
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import BatchPolicy
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.records import Recorder, Records
from xllm_lab.runs import Manifest, Run, describe, fill_run, new_folder
from xllm_lab.scheduler import Sampled, Scheduler
from xllm_lab.serving import Completion, Conversation, Feed, Idle, Woke, WorkloadFeed, serve
from xllm_lab.step import Step, Work
from xllm_lab.step_time import Chunk, StepTime, features, fit
from xllm_lab.workload import Request, TokenIds, Workload, prompt_token_ids

EAGER = Eager()


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
        graph_pool_bytes: what a step's memory may take if steps are captured; None: what the device has free.
        check_ops: hold each call of an operator against the limits of its documentation; slow, and only where
            operators have some.
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    clock: str = "virtual"
    timer: str = "wall"
    graph_pool_bytes: int | None = None
    check_ops: bool = False


class Engine:
    """A loaded model on an open device; serves any number of workloads, one after another.

    Raises:
        ConfigError: an unknown device, dtype, clock or timer, or a model that does not fit on the device.
        ModelError: the model cannot be loaded.
    """

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        if self.options.dtype not in (*DTYPES, "auto"):
            raise ConfigError(f"dtype is {self.options.dtype!r}, accepted: auto, {', '.join(DTYPES)}")
        make_clock(self.options.clock, self.options.timer)
        if self.options.graph_pool_bytes is not None and self.options.graph_pool_bytes < 0:
            raise ConfigError(f"graph_pool_bytes is {self.options.graph_pool_bytes}, at least 0 is accepted")
        if self.options.timer == "cpu" and self.options.threads != 1:
            raise ConfigError(f"timer 'cpu' with {self.options.threads} threads counts each; accepted: 1 thread")
        self.device: Device = open_device(self.options.device, threads=self.options.threads)
        check_calls(self.device.torch_device, on=self.options.check_ops)
        dtype = DTYPES.get(self.options.dtype)
        with self.device.refusing_what_does_not_fit(f"model {self.options.model}"):
            self.model: LoadedModel = load_model(self.options.model, device=self.device, dtype=dtype)

    def serve(
        self,
        workload: Workload,
        config: InstanceConfig,
        policy: BatchPolicy,
        recorder: Recorder,
        *,
        step_time: StepTime | None = None,
        shapes: ShapesPolicy = EAGER,
    ) -> dict[str, Any] | None:
        """Serve a workload to its end; records go to `recorder` as they come.

        A request that could never run on this configuration is rejected when it arrives, and the others are served.

        Args:
            shapes: which steps are captured and replayed.

        Returns:
            What became of graphs (`Graphs.describe`); None if every step is eager.

        Raises:
            ConfigError: the KV pool or the graphs' does not fit, the context is longer than the model's, a token is not
                in the vocabulary, or step times are missing.
            PolicyError: a policy planned something illegal, or starves a request.
        """
        self._refuse(workload, config)
        scheduler = Scheduler(config, policy, recorder, step_time=step_time)
        prompts = {r.id: self._prompt_ids(r, workload.seed) for r in workload.requests}
        return self.serve_on(scheduler, WorkloadFeed(workload), lambda r: prompts.pop(r.id), shapes=shapes)

    def serve_on(
        self,
        scheduler: Scheduler,
        feed: Feed,
        prompt_ids: Callable[[Request], TokenIds],
        *,
        shapes: ShapesPolicy = EAGER,
    ) -> dict[str, Any] | None:
        """Serve what a feed brings, to its end, on a scheduler that its owner can look into meanwhile.

        Args:
            prompt_ids: as in `serving.serve`; all in the model's vocabulary.
            shapes: as in `serve`.

        Returns:
            as `serve`.

        Raises:
            as `serve`.
        """
        config = scheduler.config
        with self.device.refusing_what_does_not_fit("a step at the configured limits"):
            runner = self._runner(config, shapes)
            _warm_up(runner, config, self.device)
        clock = make_clock(self.options.clock, self.options.timer)
        with Lane(clock, beside=config.async_scheduling != "off") as lane:
            launcher = Launcher(runner, scheduler, lane, clock)
            conversation = serve(scheduler, feed, prompt_ids, launch=launcher.launch)
            self._answer(conversation, launcher)
        return None if runner.graphs is None else runner.graphs.describe()

    def _answer(self, conversation: Conversation, launcher: Launcher) -> None:
        try:
            command = next(conversation)
            while True:
                if isinstance(command, Idle):
                    assert command.until_us is not None, "a workload says when its next request comes"
                    answer: Completion | Woke = Woke(launcher.rest(command.until_us))
                else:
                    launched, done = launcher.wait_for(command)
                    answer = self._completion(command, launched, done)
                command = conversation.send(answer)
        except StopIteration:
            return

    def _completion(self, step: Step, launched: Launched, done: Done[list[int]]) -> Completion:
        drawn = zip(launched.inputs.drawing, done.result, strict=True)
        sampled = {r.id: Sampled(token, self._stops(r, token)) for r, token in drawn}
        # A step shorter than the clock's tick would end when it started.
        end_us = max(done.end_us, step.start_us + 1)
        work = Work(launched.host_us, done.device_us, done.idle_us, launched.inputs.graph_tokens)
        return Completion((end_us,), sampled, work)

    def replay(
        self,
        workload: Workload,
        config: InstanceConfig,
        policy: BatchPolicy,
        *,
        out: Path,
        step_time: StepTime | None = None,
        recorder: Records | None = None,
        shapes: ShapesPolicy = EAGER,
    ) -> Run:
        """Serve a workload and write the run folder.

        A policy that needs step times gets this machine's, measured first, unless `step_time` has them.

        Raises:
            RequestTooLargeError: a request could never run on this configuration: more likely an oversight in a trace
                than meant.
            as `serve`, and RunError if the folder exists or cannot be written.
        """
        for request in workload.requests:
            config.refuse_if_too_large(request)
        self._refuse(workload, config)  # before step times are measured on a context that the model may not have
        if step_time is None and getattr(policy, "needs_step_time", False):
            step_time = self.measure_step_time(config)
        records = Records() if recorder is None else recorder
        with new_folder(out) as folder:
            graphs = self.serve(workload, config, policy, records, step_time=step_time, shapes=shapes)
            timing = {k: v for k, v in asdict(self.options).items() if k in ("clock", "timer", "threads")}
            manifest = Manifest(
                host="engine",
                timing=timing,
                model=self.describe(),
                graphs=graphs,
                **describe(config, policy, step_time, workload, shapes),
            )
            fill_run(folder, manifest, workload, records)
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
            "kv_bytes_per_token": self.model.config.kv_bytes_per_token(dtype),
        }

    def measure_step_time(self, config: InstanceConfig) -> StepTime:
        """Fit step times to a grid of synthetic steps, as xLLM's `enable_profile_step_time` does at start-up."""
        runner = self._runner(config)
        longest = min(1024, config.num_kv_tokens // 2, config.max_model_len)
        lengths = _halves(longest)
        grid: list[tuple[Chunk, ...]] = [(Chunk(n, 0),) for n in lengths]
        grid += [(Chunk(n, longest - n),) for n in lengths[1:]]
        grid += [
            (Chunk(1, context),) * count
            for context in lengths[1::2]
            for count in (1, 4, 16)
            if count * (context + 1 + config.block_size) <= config.num_kv_tokens
        ]
        rows, times = [], []
        for chunks in grid * 3:
            steps = _synthetic(chunks, config)
            clock = make_clock("virtual", self.options.timer)
            runner.run(steps).argmax(-1).tolist()
            rows.append(features(chunks, len(chunks)))
            times.append(clock.now_us())
        return fit(rows, times)

    def _refuse(self, workload: Workload, config: InstanceConfig) -> None:
        if config.max_model_len > self.model.config.max_position:
            raise ConfigError(
                f"max_model_len is {config.max_model_len}, model {self.model.name} accepts "
                f"{self.model.config.max_position}"
            )
        for request in workload.requests:
            for token in request.prompt.token_ids or ():
                if not 0 <= token < self.model.config.vocab_size:
                    raise ConfigError(
                        f"request {request.id}: token id {token}; the vocabulary accepts 0 to "
                        f"{self.model.config.vocab_size - 1}"
                    )

    def _runner(self, config: InstanceConfig, shapes: ShapesPolicy = EAGER) -> Runner:
        captures = not isinstance(shapes, Eager)
        pool = KvPool(
            self.model.config,
            num_blocks=config.num_kv_blocks + captures,  # what pads a graph has a block of its own
            block_size=config.block_size,
            dtype=self.model.model.dtype,
            device=self.device,
        )
        runner = Runner(self.model.model, pool, self.device)
        if captures:
            runner.graphs = Graphs(
                *(self.model.model, pool, self.device, runner.workspace),
                config=config,
                policy=shapes,
                pool_bytes=self.options.graph_pool_bytes,
            )
        longest = min(config.max_tokens_per_batch, config.num_kv_tokens)
        runner.workspace.reserve(tokens=longest, logits=min(config.max_seqs_per_batch, longest))
        return runner

    def _prompt_ids(self, request: Request, seed: int) -> TokenIds:
        return prompt_token_ids(request, vocab_size=self.model.config.vocab_size, seed=seed)

    def _stops(self, request: Request, token: int) -> bool:
        sampling = request.sampling
        return not sampling.ignore_eos and (token in sampling.stop_token_ids or token in self.model.eos_token_ids)


def _warm_up(runner: Runner, config: InstanceConfig, device: Device) -> None:
    """Steps of a few shapes before the clock starts: the first call of a kernel may pay for choosing and loading it.

    On a CPU no first step of a shape was slower than its repetition, whoever served the operators, but for the first of
    all: two steps must do.
    """
    longest = min(512, config.num_kv_tokens, config.max_tokens_per_batch, config.max_model_len)
    for num_tokens in (min(longest, 64), 1) if device.is_host else _halves(longest):
        runner.run(_synthetic((Chunk(num_tokens, 0),), config))
    if runner.graphs is not None:
        runner.graphs.warm()


def _halves(longest: int) -> list[int]:
    return [longest >> k for k in range(longest.bit_length())]


def _synthetic(chunks: Sequence[Chunk], config: InstanceConfig) -> list[SequenceChunk]:
    """Chunks over made-up tokens, each sequence on blocks of its own."""
    made: list[SequenceChunk] = []
    next_block = 0
    for num_tokens, num_computed in chunks:
        num_blocks = -(-(num_tokens + num_computed) // config.block_size)
        table = range(next_block, next_block + num_blocks)
        next_block += num_blocks
        # Token 0 is in every vocabulary.
        made.append(SequenceChunk([0] * num_tokens, num_computed, table, True))
    assert next_block <= config.num_kv_blocks, "the synthetic step is larger than the pool"
    return made
