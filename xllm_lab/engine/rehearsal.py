"""Steps over made-up tokens before the clock starts: to warm up, and to learn what steps cost."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_lab.engine.clock import make_clock
from xllm_lab.engine.device import Device
from xllm_lab.engine.lead import Lead
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.step_time import Chunk, StepTime, features, fit


def warm_up(runner: Runner, config: InstanceConfig, lead: Lead, device: Device) -> None:
    """Steps of a few shapes: the first call of a kernel may pay for choosing and loading it.

    On a CPU no first step of a shape was slower than its repetition, whoever served the operators, but for the first of
    all: two steps must do.
    """
    longest = min(512, config.num_kv_tokens, config.max_tokens_per_batch, config.max_model_len)
    for num_tokens in (min(longest, 64), 1) if device.is_host else _halves(longest):
        chunks = _synthetic((Chunk(num_tokens, 0),), runner)
        lead.step(chunks)
        runner.run(chunks)
    runner.kv_pool.forget_rehearsals()
    if runner.graphs is not None:
        lead.warm()
        runner.graphs.warm()


def measure_step_time(runner: Runner, config: InstanceConfig, lead: Lead, timer: str) -> StepTime:
    """Step times fitted to a grid of steps, each run three times."""
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
        steps = _synthetic(chunks, runner)
        clock = make_clock("virtual", timer)
        lead.step(steps)
        runner.run(steps).argmax(-1).tolist()
        rows.append(features(chunks, len(chunks)))
        times.append(clock.now_us())
    return fit(rows, times)


def _halves(longest: int) -> list[int]:
    return [longest >> k for k in range(longest.bit_length())]


def _synthetic(chunks: Sequence[Chunk], runner: Runner) -> list[SequenceChunk]:
    """Chunks over made-up tokens, each sequence on blocks of its own."""
    tables = runner.kv_pool.rehearse([num_tokens + num_computed for num_tokens, num_computed in chunks])
    # Token 0 is in every vocabulary.
    return [SequenceChunk([0] * n, computed, table, True) for (n, computed), table in zip(chunks, tables, strict=True)]
