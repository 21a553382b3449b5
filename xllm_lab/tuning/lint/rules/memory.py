"""Rules about memory, from the shapes of a model and the size of a device: weights, KV, and what a step needs beside.

Sizes are those of `sim.cost.sharding`. xLLM's KV takes what is free of `max_memory_utilization` once weights are
loaded (`kv_cache_estimation.cpp`), vLLM's what is free of `gpu_memory_utilization` after a step was tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xllm_lab.errors import ConfigError
from xllm_lab.hardware import Device
from xllm_lab.model_spec import ModelSpec
from xllm_lab.sim.cost.sharding import GIB, Sharding, kv_blocks_that_fit
from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Repair, Severity
from xllm_lab.tuning.lint.rules import Found, Rule
from xllm_lab.tuning.lint.settings import Settings

# vLLM's own default, and xLLM's documentation's upper end: beyond it nothing is left for the system.
_MOST_MEMORY_FRAC = 0.95
_SMALL = {"model": "qwen3-14b", "device": "ascend-910b4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What one device of the instance holds.

    Attributes:
        frac_name: the setting that says how much of its memory may be used.
        step_tokens: the most that one step computes.
    """

    model: ModelSpec
    device: Device
    sharding: Sharding
    frac_name: str
    memory_frac: float
    block_size: int
    step_tokens: int

    @property
    def weight_gib(self) -> float:
        return self.weight_bytes / GIB

    weight_bytes: float
    kv_bytes_per_token: float

    @property
    def room_bytes(self) -> float:
        """For KV, in what may be used."""
        return self.device.hbm_bytes * self.memory_frac - self.weight_bytes

    @property
    def kv_tokens(self) -> int:
        return int(self.room_bytes // (self.kv_bytes_per_token * self.block_size)) * self.block_size


def _share(s: Settings) -> _Share | None:
    """None where model or device are unknown, or the file has a value that nobody can read."""
    model, device = s.situation.model, s.situation.device
    if model is None or device is None:
        return None
    is_xllm = s.config.kind is Kind.XLLM
    frac, step = (
        ("max_memory_utilization", "max_tokens_per_batch")
        if is_xllm
        else ("gpu_memory_utilization", "max_num_batched_tokens")
    )
    sizes = _sizes(s, is_xllm)
    if sizes is None or not all(map(s.is_known, (frac, step, "block_size"))):
        return None
    sharding = Sharding(**sizes)
    try:
        sharding.refuse_if_impossible(model)
    except ConfigError:
        return None  # which is not about memory, and has a rule of its own
    precision = s.situation.precision
    return _Share(
        model=model,
        device=device,
        sharding=sharding,
        frac_name=frac,
        memory_frac=s[frac] or 0.9,
        block_size=s["block_size"] or 128,
        step_tokens=s[step] or 2048,
        weight_bytes=sharding.weight_bytes(model, precision),
        kv_bytes_per_token=sharding.kv_bytes_per_token(model, precision),
    )


def _sizes(s: Settings, is_xllm: bool) -> dict[str, int] | None:
    if not is_xllm:
        names = ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel")
        if not all(map(s.is_known, names)):
            return None
        tensor, data = s["tensor_parallel_size"] or 1, s["data_parallel_size"] or 1
        has_experts = s.situation.model is not None and s.situation.model.is_mixture
        return {"tensor": tensor, "data": data, "expert": tensor * data if s[names[2]] and has_experts else 1}
    if not all(map(s.is_known, ("nnodes", "dp_size", "ep_size"))):
        return None
    world, data = s.situation.num_devices or s["nnodes"], s["dp_size"]
    if world % data:
        return None
    return {"tensor": world // data, "data": data, "expert": s["ep_size"] if s["ep_size"] == world else 1}


def _indivisible(s: Settings) -> Iterator[Found]:
    model, sizes = s.situation.model, _sizes(s, s.config.kind is Kind.XLLM)
    if model is None or sizes is None:
        return
    try:
        Sharding(**sizes).refuse_if_impossible(model)
    except ConfigError as error:
        names = ("nnodes", "dp_size", "ep_size") if s.config.kind is Kind.XLLM else ("tensor_parallel_size",)
        yield Found(str(error), names)


def _weights(s: Settings) -> Iterator[Found]:
    share = _share(s)
    if share is None or share.room_bytes >= share.kv_bytes_per_token * share.block_size:
        return
    needed = (share.weight_bytes + 2 * share.kv_bytes_per_token * share.block_size) / share.device.hbm_bytes
    frac = int(needed * 100 + 1) / 100
    repair = Repair(put={share.frac_name: frac}) if frac <= _MOST_MEMORY_FRAC else None
    says = (
        f"{share.model.name} takes {share.weight_gib:.1f} GiB of weights on each of {_devices(share)}, and "
        f"{share.frac_name}={share.memory_frac:g} allows {share.device.hbm_bytes * share.memory_frac / GIB:.1f} GiB: "
        f"no KV block of {share.block_size} tokens fits, and the program ends"
    )
    yield Found(
        says if repair else f"{says}; more devices or fewer bytes a weight are needed", (share.frac_name,), repair
    )


def _devices(share: _Share) -> str:
    return f"{share.sharding.tensor * share.sharding.data} {share.device.name}"


def _fits(s: Settings) -> _Share | None:
    share = _share(s)
    if share is None or share.room_bytes < share.kv_bytes_per_token * share.block_size:
        return None
    # The same blocks that the simulator would give the machine, or the two would disagree about what fits.
    blocks = kv_blocks_that_fit(
        share.device,
        share.model,
        tensor_parallel=share.sharding.tensor,
        data_parallel=share.sharding.data,
        expert_parallel=share.sharding.expert,
        precision=s.situation.precision,
        block_size=share.block_size,
        memory_frac=share.memory_frac,
    )
    assert blocks * share.block_size == share.kv_tokens
    return share


def _context(s: Settings) -> Iterator[Found]:
    share = _fits(s)
    if share is None or s.config.kind is not Kind.VLLM or not s.is_known("max_model_len"):
        return
    length = s["max_model_len"] or share.model.max_position
    if share.kv_tokens < length:
        says = (
            f"max_model_len is {length}, and {_devices(share)} have KV for {share.kv_tokens} tokens beside "
            f"{share.weight_gib:.1f} GiB of weights: vLLM refuses a context that one request could not fill"
        )
        yield Found(says, ("max_model_len",), Repair(put={"max_model_len": share.kv_tokens}))


def _requests(s: Settings) -> Iterator[Found]:
    share, tokens = _fits(s), s.situation.request_tokens
    if share is None or tokens is None:
        return
    at_once = s.situation.concurrency or 1
    seqs = "max_seqs_per_batch" if s.config.kind is Kind.XLLM else "max_num_seqs"
    if s.is_known(seqs) and s[seqs]:
        at_once = min(at_once, s[seqs] * share.sharding.data)
    needed = -(-at_once // share.sharding.data) * -(-tokens // share.block_size) * share.block_size
    if needed > share.kv_tokens:
        fit = share.kv_tokens // (-(-tokens // share.block_size) * share.block_size)
        says = (
            f"{at_once} requests of {tokens} tokens need KV for {needed} tokens on each of {_devices(share)}, which "
            f"have {share.kv_tokens}: {_told(fit)} fit at once, and others are preempted and computed again"
        )
        repair = Repair(put={seqs: max(fit, 1)}) if fit else None
        yield Found(says, (seqs,), repair)


def _told(fit: int) -> str:
    return "not one" if not fit else f"{fit}"


def _beside(s: Settings) -> Iterator[Found]:
    """A lower bound of what xLLM needs outside of its KV: activations of the largest step, and logits of its graphs."""
    share = _fits(s)
    if share is None or s.config.kind is not Kind.XLLM:
        return
    model, shard = share.model, share.sharding
    widest = max(m.outputs * shard.part(m, model) for m in model.matmuls[:-1])
    activations = share.step_tokens * (2 * model.hidden_size + 2 * widest) * 2
    rows = s["acl_graph_decode_batch_size_limit"] if s["enable_graph"] else None
    logits = (rows or 1) * model.vocab_size / shard.tensor * 4
    left = share.device.hbm_bytes * (1 - share.memory_frac)
    if activations + logits > left:
        says = (
            f"max_memory_utilization={share.memory_frac:g} leaves {left / GIB:.2f} GiB, and a step of "
            f"max_tokens_per_batch={share.step_tokens} holds {activations / GIB:.2f} GiB of activations at least, its "
            f"logits {logits / GIB:.2f} GiB: KV takes the rest before the first step runs"
        )
        most = 1 - (activations + logits) / share.device.hbm_bytes
        frac = int(most * 100) / 100
        worth = frac * share.device.hbm_bytes - share.weight_bytes > share.kv_bytes_per_token * share.block_size
        repair = Repair(put={"max_memory_utilization": frac}) if worth and frac > 0 else None
        yield Found(says, ("max_memory_utilization", "max_tokens_per_batch"), repair)


def _cap(s: Settings) -> Iterator[Found]:
    share = _fits(s)
    if share is None or s.config.kind is not Kind.XLLM or not s.is_known("max_cache_size"):
        return
    if s["max_cache_size"] > share.room_bytes:
        says = (
            f"max_cache_size={s['max_cache_size']} is more than the {int(share.room_bytes)} bytes that "
            f"max_memory_utilization={share.memory_frac:g} leaves for KV, which hold {share.kv_tokens} tokens"
        )
        yield Found(says, ("max_cache_size",), Repair(put={"max_cache_size": int(share.room_bytes)}))


def _rule(name: str, kind: Kind, severity: Severity, **more: Any) -> Rule:
    return Rule(id=name, kind=kind, severity=severity, **more)


_KV = "xllm@3906f5a91 xllm/core/framework/kv_cache/kv_cache_estimation.cpp:598"
_XLLM_ENGINE = "xllm@3906f5a91 xllm/core/distributed_runtime/llm_engine.cpp"
_VLLM_KV = "vllm@0.19 vllm/v1/core/kv_cache_utils.py (_check_enough_kv_cache_memory)"

RULES = (
    _rule(
        "weights-do-not-fit",
        Kind.XLLM,
        Severity.ERROR,
        what="weights that leave no room for KV",
        source=_KV,
        finds=_weights,
        example="--max_memory_utilization=0.8",
        example_situation=_SMALL,
    ),
    _rule(
        "vllm-weights-do-not-fit",
        Kind.VLLM,
        Severity.ERROR,
        what="weights that leave no room for KV",
        source=_VLLM_KV,
        finds=_weights,
        example="max_num_seqs: 64\ngpu_memory_utilization: 0.8\nmax_model_len: 1024",
        example_situation=_SMALL,
    ),
    _rule(
        "model-does-not-divide",
        Kind.XLLM,
        Severity.ERROR,
        what="heads or experts that the workers cannot share",
        source="xllm@3906f5a91 xllm/core/distributed_runtime/llm_engine.cpp:257",
        finds=_indivisible,
        example="--nnodes=3",
        example_situation={"model": "qwen3-14b"},
        is_repaired=False,
    ),
    _rule(
        "vllm-model-does-not-divide",
        Kind.VLLM,
        Severity.ERROR,
        what="heads or experts that the workers cannot share",
        source="vllm@0.19 vllm/config/model.py (verify_with_parallel_config)",
        finds=_indivisible,
        example="max_num_seqs: 64\ntensor_parallel_size: 3",
        example_situation={"model": "qwen3-14b"},
        is_repaired=False,
    ),
    _rule(
        "context-does-not-fit",
        Kind.VLLM,
        Severity.ERROR,
        what="a context that KV cannot hold",
        source=_VLLM_KV,
        finds=_context,
        example="max_num_seqs: 64\ngpu_memory_utilization: 0.9\nmax_model_len: 32768",
        example_situation=_SMALL,
    ),
    _rule(
        "requests-do-not-fit",
        Kind.XLLM,
        Severity.WARNING,
        what="requests whose KV does not fit together",
        source="xllm@3906f5a91 xllm/core/scheduler/scheduler_policy.cpp:456",
        finds=_requests,
        example="--max_memory_utilization=0.9",
        example_situation={**_SMALL, "concurrency": 40, "request_tokens": 4096},
    ),
    _rule(
        "vllm-requests-do-not-fit",
        Kind.VLLM,
        Severity.WARNING,
        what="requests whose KV does not fit together",
        source="vllm@0.19 vllm/v1/core/sched/scheduler.py (schedule)",
        finds=_requests,
        example="max_num_seqs: 64\ngpu_memory_utilization: 0.9\nmax_model_len: 4096",
        example_situation={**_SMALL, "concurrency": 40, "request_tokens": 4096},
    ),
    _rule(
        "no-room-for-a-step",
        Kind.XLLM,
        Severity.WARNING,
        what="KV that leaves no room for activations and graphs",
        source=f"{_XLLM_ENGINE}:490",
        finds=_beside,
        example="--max_memory_utilization=0.99",
        example_situation=_SMALL,
    ),
    _rule(
        "cap-above-room",
        Kind.XLLM,
        Severity.NOTE,
        what="a cap on KV that never binds",
        source=f"{_XLLM_ENGINE}:496",
        finds=_cap,
        example="--max_cache_size=60000000000\n--max_memory_utilization=0.9",
        example_situation=_SMALL,
    ),
)
