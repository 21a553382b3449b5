"""A profile bundle of the machine at hand: operator times that the simulator's profiled cost model reads.

    DIR/meta.yaml             what was profiled, and how
    DIR/config.json           the model's shape, as transformers writes it
    DIR/tp1/dense.csv         layer,tokens,time_us
    DIR/tp1/per_sequence.csv  layer,sequences,time_us
    DIR/tp1/attention.csv     prefill_chunk,kv_prefill,n_decode,kv_decode,time_us
    DIR/tp1/moe.csv           tokens,activated_experts,time_us                             mixtures of experts only

Rows are medians of a few steps. What acts on tokens is timed in prompts through the whole model; attention, head and
sampler in batches through its first layers, which are enough for them.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import yaml

from xllm_lab.engine.engine import Engine
from xllm_lab.engine.layer_config import Mixture
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.operator_times import TimedSteps
from xllm_lab.engine.page_times import measure_page_time
from xllm_lab.engine.runner import SequenceChunk
from xllm_lab.errors import ConfigError
from xllm_lab.runs import new_folder
from xllm_lab.step_time import Chunk

BLOCK_TOKENS = 16
_LAYERS_FOR_ATTENTION = 3
_SHORTEST_US = 0.1  # the reader takes less for another unit
_ON_ROWS = ("lm_head", "sampler")

Key = tuple[int, int, int, int]
Times = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Up to where a machine is measured.

    Attributes:
        most_tokens: of a step's prompts.
        most_seqs: decodes in a step.
        most_kv_tokens: of one sequence, before the step.
        repeats: steps of each shape.
    """

    most_tokens: int = 1024
    most_seqs: int = 64
    most_kv_tokens: int = 2048
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value, least in (
            ("most_tokens", self.most_tokens, 2),
            ("most_seqs", self.most_seqs, 1),
            ("most_kv_tokens", self.most_kv_tokens, 1),
            ("repeats", self.repeats, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}, at least {least} is accepted")

    @property
    def tokens(self) -> list[int]:
        """1, 2, 4, 8, 16, and from there on half a doubling at a time."""
        doublings = _up_to(self.most_tokens, 2.0, 1)
        return sorted({*doublings, *(3 * n // 2 for n in doublings if n >= 16 and 3 * n // 2 < self.most_tokens)})

    @property
    def attention(self) -> list[Key]:
        """(prompt chunk, tokens before it, decodes, tokens before each): decodes alone, prompts alone, and both."""
        decodes = product((0,), (0,), _up_to(self.most_seqs, 2.0, 1), _up_to(self.most_kv_tokens, 2.0, 16))
        chunks = [n for n in _up_to(self.most_tokens, 2.0, 16) if n > 1]
        before = [0, *_up_to(self.most_kv_tokens, 4.0, max(1, self.most_kv_tokens // 4))]
        some_seqs, some_kv = _up_to(self.most_seqs, 8.0, 1), _up_to(self.most_kv_tokens, 4.0, 64)
        return [*decodes, *product(chunks, before, (0,), (0,)), *product(chunks, before, some_seqs, some_kv)]


def write_machine_profile(
    engine: Engine, out: Path, grid: Grid | None = None, *, progress: Callable[[], object] = lambda: None
) -> dict[str, dict[int, float]]:
    """Measure the operators of an engine's model on its device, and write them as a profile bundle.

    Args:
        progress: called after each shape; there are `num_shapes(grid)`.

    Returns:
        Operator -> tokens (or sequences) -> microseconds of one call.

    Raises:
        ConfigError: the model's context is shorter than the grid, the device has too little memory for it, or a bundle
            has no tables for such a model (`operator_times`).
        RunError: the folder exists, or cannot be written.
    """
    grid = grid or Grid()
    config = engine.model.config
    longest = grid.most_tokens + grid.most_kv_tokens
    if longest > config.max_position:
        raise ConfigError(
            f"most_tokens is {grid.most_tokens} and most_kv_tokens {grid.most_kv_tokens}: {longest} together, model "
            f"{engine.model.name} accepts {config.max_position}"
        )
    with new_folder(out) as folder:
        dense, experts = _dense(engine, grid, progress)
        attention, on_rows = _attention(engine, grid, progress)
        tables = folder / "tp1"
        tables.mkdir()
        _write(tables / "dense.csv", ("layer", "tokens"), _by_layer(dense))
        _write(tables / "per_sequence.csv", ("layer", "sequences"), _by_layer(on_rows))
        _write(tables / "attention.csv", ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"), attention)
        if experts:
            _write(tables / "moe.csv", ("tokens", "activated_experts"), experts)
        (folder / "meta.yaml").write_text(yaml.safe_dump(_meta(engine, grid), sort_keys=False), encoding="utf-8")
        told = json.dumps(_transformers_config(config, engine.model.name), indent=1)
        (folder / "config.json").write_text(told, encoding="utf-8")
    return {**dense, **on_rows}


def num_shapes(grid: Grid) -> int:
    return len(grid.tokens) + len(grid.attention)


def _dense(
    engine: Engine, grid: Grid, progress: Callable[[], object]
) -> tuple[dict[str, dict[int, float]], dict[tuple[int, int], float]]:
    """What acts on tokens; and experts by (tokens, how many are activated), if there are some."""
    steps = _steps(engine, engine.model.config.num_layers, grid.most_tokens)
    found: dict[str, dict[int, float]] = {}
    experts: dict[tuple[int, int], float] = {}
    for tokens in grid.tokens:
        times = _median(steps, _on_own_blocks(engine, [Chunk(tokens, 0)]), grid.repeats)
        for row, us in times.items():
            if row not in ("attention", "moe", *_ON_ROWS):
                found.setdefault(row, {})[tokens] = us
        for steps.activation.num_experts in _activations(engine.model.config.mixture, tokens):
            times = _median(steps, _on_own_blocks(engine, [Chunk(tokens, 0)]), grid.repeats)
            experts[tokens, steps.activation.num_experts] = times["moe"]
        steps.activation.num_experts = None
        progress()
    return found, experts


def _activations(mixture: Mixture | None, tokens: int) -> list[int]:
    """From the fewest experts that so many tokens can have to the most, doubling."""
    if mixture is None:
        return []
    fewest = mixture.routing.top_k
    return _up_to(min(mixture.routing.num_experts, tokens * fewest), 2.0, fewest)


def _attention(
    engine: Engine, grid: Grid, progress: Callable[[], object]
) -> tuple[dict[Key, float], dict[str, dict[int, float]]]:
    """Attention of each key; head and sampler of each number of decodes, at the shortest of them."""
    block = _block_tokens(engine)
    most_kv_tokens = grid.most_seqs * (grid.most_kv_tokens + 1 + block)
    steps = _steps(
        engine,
        min(_LAYERS_FOR_ATTENTION, engine.model.config.num_layers),
        most_kv_tokens + grid.most_tokens + grid.most_kv_tokens + block,
    )
    found: dict[Key, float] = {}
    on_rows: dict[str, dict[int, float]] = {row: {} for row in _ON_ROWS}
    for key in grid.attention:
        chunk, before, decodes, kv = key
        prompt = [Chunk(chunk, before)] if chunk else []
        times = _median(steps, _on_own_blocks(engine, [*[Chunk(1, kv)] * decodes, *prompt]), grid.repeats)
        found[key] = times["attention"]
        if not chunk:
            for row in _ON_ROWS:
                on_rows[row].setdefault(decodes, times[row])
        progress()
    return found, on_rows


def _steps(engine: Engine, num_layers: int, kv_tokens: int) -> TimedSteps:
    return TimedSteps(
        engine.model.model,
        engine.device,
        num_layers=num_layers,
        num_blocks=-(-kv_tokens // _block_tokens(engine)),
        block_size=_block_tokens(engine),
        timer=engine.options.timer,
    )


def _median(steps: TimedSteps, batch: Sequence[SequenceChunk], repeats: int) -> Times:
    steps.run(batch)  # the first of a shape may be slower
    runs = [steps.run(batch) for _ in range(repeats)]
    return {row: max(_SHORTEST_US, statistics.median(run[row] for run in runs)) for row in runs[0]}


def _block_tokens(engine: Engine) -> int:
    return engine.device.kv_block_tokens or BLOCK_TOKENS


def _on_own_blocks(engine: Engine, chunks: Sequence[Chunk]) -> list[SequenceChunk]:
    made, following = list[SequenceChunk](), 0
    for num_tokens, num_computed in chunks:
        num_blocks = -(-(num_tokens + num_computed) // _block_tokens(engine))
        made.append(SequenceChunk([0] * num_tokens, num_computed, range(following, following + num_blocks), True))
        following += num_blocks
    return made


def _up_to(most: int, factor: float, first: int) -> list[int]:
    """`first`, `factor` times as many, and so on; `most` is the last."""
    found, value = list[int](), float(first)
    while value < most:
        found.append(round(value))
        value *= factor
    return [*found, most]


def _by_layer(times: Mapping[str, Mapping[int, float]]) -> dict[tuple[str | int, ...], float]:
    return {(row, size): us for row in sorted(times) for size, us in sorted(times[row].items())}


def _write(path: Path, keys: Sequence[str], times: Mapping[Any, float]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow((*keys, "time_us"))
        rows.writerows(chain(key, (f"{us:.6g}",)) for key, us in times.items())


def _meta(engine: Engine, grid: Grid) -> dict[str, Any]:
    return {
        "model": engine.model.name,
        "hardware": engine.device.description,
        "variant": str(engine.model.model.dtype).removeprefix("torch."),
        "tp_degrees": [1],
        "profiler": "xllm-lab",
        "torch_version": str(torch.__version__),
        "checksum": engine.model.checksum,
        "timer": engine.options.timer,
        "threads": engine.options.threads,
        "block_size": _block_tokens(engine),
        "grid": asdict(grid),
        "ops": engine.model.model.describe_ops(),
        "page_time": _page_time(engine, grid.repeats),
        "skew_fit": {"enabled": False},
    }


def _page_time(engine: Engine, repeats: int) -> dict[str, float] | None:
    """What virtual KV would take besides; None where the device has none."""
    model = engine.model.model
    found = measure_page_time(
        model.config, model.dtype, engine.device, least_tokens=_block_tokens(engine), repeats=repeats
    )
    return None if found is None else asdict(found)


def _transformers_config(config: ModelConfig, name: str) -> dict[str, Any]:
    """As much of a `config.json` as says what a step computes."""
    return {
        "_name_or_path": name,
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        **_mixture_fields(config.mixture, config.architecture),
    }


def _mixture_fields(mixture: Mixture | None, architecture: str) -> dict[str, Any]:
    if mixture is None:
        return {}
    size = "intermediate_size" if architecture == "mixtral" else "moe_intermediate_size"
    return {
        "num_local_experts": mixture.routing.num_experts,
        "num_experts_per_tok": mixture.routing.top_k,
        size: mixture.intermediate_size,
    }
