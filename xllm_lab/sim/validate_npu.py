"""The roofline model beside published measurements on Ascend NPUs. Errors are reported as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xllm_lab.hardware import Device, hardware
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.known_models import known_model
from xllm_lab.metrics import summarize, tpot_us
from xllm_lab.model_spec import PRECISIONS
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import Off
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.records import Records
from xllm_lab.sim.acceptance import GivenAcceptance
from xllm_lab.sim.cost import Batch, batch_of
from xllm_lab.sim.cost.host import Hosted, HostOverhead
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding, kv_blocks_that_fit
from xllm_lab.sim.machine import Deployment, Machine, roofline_machine, with_acceptance
from xllm_lab.sim.npu_experts import dispatch, dual_stream, layer, micro_batches
from xllm_lab.sim.npu_fit import FITTED_DEVICE, GRAPHS, collective_us, decoding, mean_step
from xllm_lab.sim.npu_points import Points, Row, point, points
from xllm_lab.sim.simulator import run_simulation
from xllm_lab.sim.validate.published import Point, PublishedValidation
from xllm_lab.step_time import Chunk
from xllm_lab.workload import ClosedLoop, Prompt, Request, RequestId, Workload

# Between two steps of vLLM-Ascend and xDeepServe the device waits about 2 ms for the host (Ascend/msmodeling's serving
# overhead, 2026-08; arXiv 2508.02520).
HOST = HostOverhead(step_us=2000.0)
_DIES_PER_CHIP = 2
_BLOCK_SIZE = 128  # the only one of vLLM-Ascend's kernels
_MTP_ACCEPTANCE_FRAC = 0.7  # CloudMatrix384, arXiv 2506.12708
_MTP = Fixed(method="mtp", num_speculative_tokens=1)
_REQUESTS_PER_CLIENT = 2
_FOOTNOTE = (
    "[in brackets] residuals of rows to which two constants were fitted, kernel_us and link.frac of hardware.toml; "
    "all others are predictions"
)


def validate_npu() -> PublishedValidation:
    """Every published figure beside ours. Deterministic; takes under a minute."""
    found = (of_row(row, points(name)) for name, of_row in _TABLES.items() for row in points(name).rows)
    return PublishedValidation(tuple(point for some in found for point in some), _FOOTNOTE)


def _collective(row: Row, table: Points) -> Iterator[Point]:
    yield point(
        row,
        table,
        name="HCCL on an A3 node, us",
        what=f"{row['op']} of {row['devices']}, {_size(row['num_bytes'])}",
        published=row["us"],
        predicted=collective_us(hardware(FITTED_DEVICE), row["op"], row["devices"], row["num_bytes"]),
        is_fitted=table.is_fitted,
    )


def _step(row: Row, table: Points) -> Iterator[Point]:
    parts = mean_step(hardware(FITTED_DEVICE), row["clients"])
    compute, communication, free = parts.compute_us / 1e3, parts.communication_us / 1e3, HOST.step_us / 1e3
    ours = {
        "compute_ms": compute,
        "communication_ms": communication,
        "free_ms": free,
        "step_ms": compute + communication + free,
    }
    for key, predicted in ours.items():
        yield point(
            row,
            table,
            name="Qwen3-32B bf16 TP16 step, ms",
            what=f"{key.removesuffix('_ms')}, {row['clients']} clients",
            published=row[key],
            predicted=predicted,
            is_fitted=table.is_fitted and key != "free_ms",
        )


def _nightly(row: Row, table: Points) -> Iterator[Point]:
    per_s = None
    if "not_modelled" not in row:
        records = _serve(row, 3584, 1536, drafts=row.get("mtp", False))
        per_s = summarize(records).output_throughput_per_s * row.get("data", 1)
    yield point(
        row,
        table,
        name="vllm-ascend nightly, output tokens/s",
        what=_layout(row),
        published=row["per_s"],
        predicted=per_s,
    )


def _prefix(row: Row, table: Points) -> Iterator[Point]:
    records = _serve(row, 3584, 1, cached_frac=row["cached_frac"])
    yield point(
        row,
        table,
        name="vllm-ascend nightly, prompts/s",
        what=f"{_layout(row)}, {row['cached_frac']:.0%} cached",
        published=row["per_s"],
        predicted=summarize(records).request_throughput_per_s * row.get("data", 1),
    )


def _share(row: Row, table: Points) -> Iterator[Point]:
    sharding = Sharding(tensor=8, data=2, expert=16)
    cost = RooflineCost(
        hardware(FITTED_DEVICE),
        known_model("deepseek-v3"),
        sharding=sharding,
        precision=PRECISIONS["w8a8"],
    )
    if row["stage"] == "prefill":
        batch = Batch((Chunk(2048, 0),), 0, 0, 0, 1)
    else:
        batch = decoding(-(-row["clients"] // sharding.data), 2048)
    parts = cost.parts(batch)
    total_us = parts.compute_us + parts.communication_us + HOST.step_us
    ours = {"compute": parts.compute_us, "communication": parts.communication_us, "free": HOST.step_us}
    for key, us in ours.items():
        yield point(
            row,
            table,
            name="DeepSeek-V3 w8a8 TP8 DP2 EP16, % of the time",
            what=f"{row['stage']}, {row['clients']} clients, {key}",
            published=100 * row[f"{key}_ms"] / row["window_ms"],
            predicted=100 * us / total_us,
        )


def _iteration(row: Row, table: Points) -> Iterator[Point]:
    predicted = None
    if "not_modelled" not in row:
        machine = _machine({"precision": "w8a8", **row})
        if "acceptance_frac" in row:
            predicted = _us_per_token(machine, row) / 1e3
        else:
            predicted = Hosted(machine.cost, machine.host).step(_iterated(row)).us / 1e3
    yield point(
        row,
        table,
        name="steps of DeepSeek and others, ms",
        what=row["what"],
        published=row["tpot_ms"] if "tpot_ms" in row else row["step_ms"],
        predicted=predicted,
    )


def _iterated(row: Row) -> Batch:
    if "prompts" in row:
        return Batch((Chunk(row["prompt_tokens"], 0),) * row["prompts"], 0, 0, 0, row["prompts"])
    return decoding(row["seqs"], row["context"], _shapes(row))


def _us_per_token(machine: Machine, row: Row) -> float:
    """Of a sequence that drafts one token a step: drafting, and the step that verifies it, over what that yields."""
    seqs, context = row["seqs"], row["context"]
    shape = decoding(2 * seqs, context).graph_tokens
    verified = batch_of([Chunk(2, context)] * seqs, 2 * seqs)._replace(graph_tokens=shape)
    step_us = Hosted(machine.cost, machine.host).step(verified).us + machine.draft_time.us("mtp", seqs, 1)
    return step_us / GivenAcceptance((row["acceptance_frac"],)).tokens_per_step(1)


def _mtp(row: Row, table: Points) -> Iterator[Point]:
    layout = {"model": "deepseek-r1", "precision": "w8a8", "tensor": 16, "clients": row["clients"], "is_eager": True}
    for key, is_on in (("tpot_ms", False), ("mtp_tpot_ms", True)):
        records = _serve(layout, 2500, 1500, policy="prefill-first", at_most=80, drafts=is_on)
        times = [tpot for request in records.requests if (tpot := tpot_us(request)) is not None]
        yield point(
            row,
            table,
            name="DeepSeek-R1 TPOT with and without MTP, ms",
            what=f"{'MTP' if is_on else 'base'}, {row['clients']} clients",
            published=row[key],
            predicted=sum(times) / len(times) / 1e3,
        )


def _chip_throughput(row: Row, table: Points) -> Iterator[Point]:
    predicted = None
    if "not_modelled" not in row:
        machine = _machine({"model": "deepseek-r1", "precision": "w8a8", **row})
        if "prompts" in row:
            us = Hosted(machine.cost, machine.host).step(_iterated(row)).us
            tokens = row["prompts"] * row["prompt_tokens"]
        else:
            us, tokens = _us_per_token(machine, row), row["seqs"]
        predicted = _DIES_PER_CHIP * tokens / us * 1e6
    yield point(
        row,
        table,
        name="DeepSeek-R1, tokens/s of a chip",
        what=row["what"],
        published=row["per_s"],
        predicted=predicted,
    )


_TABLES: dict[str, Callable[[Row, Points], Iterator[Point]]] = {
    "collectives": _collective,
    "steps": _step,
    "nightly": _nightly,
    "prefix": _prefix,
    "deepseek_shares": _share,
    "iterations": _iteration,
    "dispatch": dispatch,
    "mtp": _mtp,
    "dual_stream": dual_stream,
    "layers": layer,
    "chip_throughput": _chip_throughput,
    "micro_batches": micro_batches,
}


def _device(row: Row) -> Device:
    return hardware(row.get("device", FITTED_DEVICE))


def _groups(row: Row) -> dict[str, int]:
    tensor, data = row.get("tensor", 1), row.get("data", 1)
    expert = tensor * data if known_model(row["model"]).experts else 1
    return {"tensor_parallel": tensor, "data_parallel": data, "expert_parallel": expert}


def _machine(row: Row) -> Machine:
    groups = _groups(row)
    deployment = Deployment(
        tensor_parallel=groups["tensor_parallel"],
        data_parallel=groups["data_parallel"],
        expert_parallel=groups["expert_parallel"],
        precision=row["precision"],
        host=HOST,
        is_one_of_alike=groups["data_parallel"] > 1,
    )
    return roofline_machine(_device(row), known_model(row["model"]), deployment)


def _serve(
    row: Row,
    prompt_tokens: int,
    output_tokens: int,
    *,
    cached_frac: float = 0.0,
    policy: str = "decode-first",
    at_most: int | None = None,
    drafts: bool = False,
) -> Records:
    """One of the data-parallel instances, with its part of the clients, in simulated time."""
    clients = -(-row["clients"] // row.get("data", 1))
    num = min(clients * _REQUESTS_PER_CLIENT, at_most or clients * _REQUESTS_PER_CLIENT)
    spec, precision = known_model(row["model"]), PRECISIONS[row["precision"]]
    blocks = kv_blocks_that_fit(_device(row), spec, **_groups(row), precision=precision, block_size=_BLOCK_SIZE)
    config = InstanceConfig(
        max_tokens_per_batch=40_960,
        max_seqs_per_batch=max(80, clients),
        block_size=_BLOCK_SIZE,
        num_kv_blocks=blocks,
        enable_prefix_cache=cached_frac > 0,
        max_model_len=40_960,
    )
    shared = tuple(range(round(prompt_tokens * cached_frac) // _BLOCK_SIZE))
    prompt = Prompt(num_tokens=prompt_tokens, block_hashes=shared, hash_block_tokens=_BLOCK_SIZE)
    requests = tuple(
        Request(id=RequestId(i), arrival_us=0, prompt=prompt, output_tokens=output_tokens) for i in range(num)
    )
    workload = Workload(requests=requests, closed_loop=ClosedLoop(num_clients=clients))
    draft = _MTP if drafts else Off()
    machine = with_acceptance(_machine(row), (_MTP_ACCEPTANCE_FRAC,))
    decide = Policies(make_policy("batch", policy), shapes=_shapes(row), draft=draft)
    return run_simulation(workload, config, decide, machine.predicts(config), vocab_size=spec.vocab_size)


def _shapes(row: Row) -> ShapesPolicy:
    return EAGER if row.get("is_eager") else GRAPHS


def _layout(row: Row) -> str:
    groups = f"TP{row['tensor']}" + (f" DP{row['data']}" if "data" in row else "")
    mtp = " MTP" if row.get("mtp") else ""
    device = row["device"].removeprefix("ascend-")
    return f"{row['model']} {row['precision']}{mtp} {groups} {device}, {row['clients']} clients"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 1e3:.0f} KB"
