"""Whether what the device computes is right: operators, logits, captured steps, bookkeeping where memory is short."""

# Shapes: R rows, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from xllm_lab.acceptance.machine import MachineUnderTest
from xllm_lab.engine.engine import Engine
from xllm_lab.engine.model import expert_shape
from xllm_lab.engine.ops.check import TOLERANCES, Sizes, check_operators
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import MOST_KV_BLOCKS, InstanceConfig
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.records import FinishReason, Records, RequestRecord
from xllm_lab.scheduler import Scheduler
from xllm_lab.serving import WorkloadFeed
from xllm_lab.workload import Prompt, Request, RequestId, Workload, prompt_token_ids

# Of each sequence: tokens computed in the first step, in the second, ... of which each wants logits.
_STEPS = ((48, 8, 1, 1), (5, 1, 1, 1), (16, 1, 16, 1), (1, 1, 1, 1))
# A layer adds its own rounding to what comes in.
_LOGITS_TOLERANCE_PER_ROOT_LAYER = 4.0


def operators(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """One finding for each operator."""
    model, config = machine.engine.model.model, machine.engine.model.config
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    sizes = Sizes(*heads, config.hidden_size, machine.block_size, expert_shape(config))
    for found in check_operators(model.ops, sizes, model.dtype, machine.engine.device.torch_device):
        told = f"largest error {found.error:.2g} of the spread, {found.tolerance:.2g} is accepted"
        yield found.passed, f"{found.op} by {found.by}: {told}"


def logits(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Prompts packed in one step, then chunks and decodes mixed, on both."""
    config = machine.config()
    layers, dtype = machine.engine.model.config.num_layers, machine.engine.model.model.dtype
    accepted = TOLERANCES[dtype] * _LOGITS_TOLERANCE_PER_ROOT_LAYER * layers**0.5
    pairs = zip(_steps(machine.engine, config), _steps(machine.reference, config), strict=True)
    for step, (found_RV, expected_RV) in enumerate(pairs):
        error = float((found_RV - expected_RV).abs().max() / expected_RV.std())
        same = int((found_RV.argmax(-1) == expected_RV.argmax(-1)).sum())
        told = f"step {step}: largest error {error:.2g} of the spread, {accepted:.2g} is accepted; "
        yield error <= accepted, f"{told}{same} of {len(found_RV)} tokens would be the same"


def graphs(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Tokens of a run, against those of eager steps planned in turns."""
    workload = machine.at_once(machine.windows[0])
    expected, _ = _tokens(machine, workload)
    for shapes in (EAGER, PowersOfTwo(max_graph_tokens=8), PowersOfTwo(graphs_prefill=True)):
        for mode in ("off", "length_aware"):
            if shapes == EAGER and mode == "off":
                continue
            found, counts = _tokens(machine, workload, shapes=shapes, mode=mode)
            what = "eager" if counts is None else f"{counts['captures']} graphs, {counts['replays']} replays"
            differ = sum(a != b for a, b in zip(found, expected, strict=True))
            yield (
                not differ,
                f"{what}, planned {_PLANNED[mode]}: {differ} of {len(expected)} requests have other tokens",
            )


def drafts(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Tokens of greedy requests with drafts by lookup, eager and in graphs, against those without."""
    workload = machine.at_once(machine.windows[0])
    expected, _ = _tokens(machine, workload)
    for method in ("ngram", "suffix"):
        for shapes in (EAGER, PowersOfTwo()):
            records = _served(machine, workload, Policies(DecodeFirst(), shapes=shapes, draft=Fixed(method=method)))[0]
            differ = sum(list(r.output_token_ids) != e for r, e in zip(records.requests, expected, strict=True))
            drafted, kept = (sum(map(sum, counts)) for counts in zip(*map(_drafts_of, records.requests), strict=True))
            what = f"{method}, {'eager' if shapes == EAGER else 'in graphs'}: {kept} of {drafted} drafts kept"
            yield drafted > 0 and not differ, f"{what}, {differ} of {len(expected)} requests have other tokens"


def _drafts_of(request: RequestRecord) -> tuple[Sequence[int], Sequence[int]]:
    return request.num_drafted, request.num_accepted


_PLANNED = {"off": "in turns", "length_aware": "ahead"}


def memory(machine: MachineUnderTest) -> Iterator[tuple[bool, str]]:
    """Four blocks for requests that begin with one and end with two, under a policy that lets in what fits now."""
    prompt = Prompt(num_tokens=machine.block_size - 4)
    requests = (Request(id=RequestId(i), arrival_us=0, prompt=prompt, output_tokens=12) for i in range(6))
    workload = Workload(requests=tuple(requests), seed=5)
    config, records = machine.config(num_kv_blocks=4), Records()
    scheduler = Scheduler(config, Vllm(), records)
    vocab_size = machine.engine.model.config.vocab_size
    machine.engine.serve_on(
        scheduler,
        WorkloadFeed(workload),
        lambda r: prompt_token_ids(r, vocab_size=vocab_size, seed=workload.seed),
    )
    preemptions = sum(r.num_preemptions for r in records.requests)
    served = sum(r.finish_reason in {FinishReason.LENGTH, FinishReason.STOP} for r in records.requests)
    held = scheduler.ledger.num_used_blocks
    told = f"{served} of {len(workload.requests)} served with {preemptions} preemptions, {held} blocks never came back"
    yield served == len(workload.requests) and not held and preemptions > 0, told
    yield _refuses_too_much(machine)


def _refuses_too_much(machine: MachineUnderTest) -> tuple[bool, str]:
    bytes_per_block = machine.block_size * machine.engine.model.config.kv_bytes_per_token(
        machine.engine.model.model.dtype
    )
    blocks = 2 * machine.engine.device.memory().total_bytes // bytes_per_block
    larger = -(-blocks // MOST_KV_BLOCKS)  # of a tiny model
    try:
        machine.engine.runner(machine.config(num_kv_blocks=blocks // larger, block_size=machine.block_size * larger))
    except ConfigError as error:
        return True, f"a pool of twice the memory is refused: {error}"
    return False, "a pool of twice the memory was accepted"


def _steps(engine: Engine, config: InstanceConfig) -> Iterator[Tensor]:
    """Logits of each step, shape [R, V], float32 on the CPU."""
    runner, size = engine.runner(config), config.block_size
    computed, tables, first = [0] * len(_STEPS), list[range](), 0
    for lengths in _STEPS:
        blocks = -(-sum(lengths) // size)
        tables.append(range(first, first + blocks))
        first += blocks
    for lengths in zip(*_STEPS, strict=True):
        chunks = [
            SequenceChunk(_made_up(n, s, computed[s], engine.model.config.vocab_size), computed[s], tables[s], True)
            for s, n in enumerate(lengths)
        ]
        yield runner.run(chunks).float().cpu().clone()
        computed = [before + n for before, n in zip(computed, lengths, strict=True)]


def _made_up(num: int, sequence: int, start: int, vocab_size: int) -> Sequence[int]:
    return [(7919 * (start + k) + 104_729 * sequence + 1) % vocab_size for k in range(num)]


def _tokens(
    machine: MachineUnderTest, workload: Workload, *, shapes: ShapesPolicy = EAGER, mode: str = "off"
) -> tuple[list[list[int]], dict[str, int] | None]:
    """(Output tokens of each request, what became of graphs)."""
    records, counts = _served(machine, workload, Policies(DecodeFirst(), shapes=shapes), mode)
    return [list(r.output_token_ids) for r in records.requests], counts


def _served(
    machine: MachineUnderTest, workload: Workload, policies: Policies, mode: str = "off"
) -> tuple[Records, dict[str, int] | None]:
    records = Records()
    counts = machine.engine.serve(workload, replace(machine.config(), async_scheduling=mode), policies, records)
    return records.sort(), counts
