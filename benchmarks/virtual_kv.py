"""What virtual KV costs and saves beside paged blocks, on SmolLM2: decode steps, mapping, whole runs; and a soak.

    python benchmarks/virtual_kv.py steps --repeats 30
    python benchmarks/virtual_kv.py mapping
    python benchmarks/virtual_kv.py runs --repeats 3
    python benchmarks/virtual_kv.py soak --minutes 30

`steps`: the same decode step over blocks in random order, paged and virtual in changing order, in processor time;
fails if the logits differ in one bit. `mapping`: quartiles of the time to map, map anew and unmap a run of pages, us.
`runs`: the same requests with paged blocks and with each pages policy. `soak`: run after run of random requests, with
every policy and way of scheduling in turn; fails unless every step has as many pages mapped as were mapped and not
unmapped before it, and unless nothing of virtual KV is left after a run. One JSON object a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.runner import Runner, SequenceChunk
from xllm_lab.engine.virtual_kv_pool import VirtualKvPool
from xllm_lab.instance_config import ASYNC_SCHEDULING, InstanceConfig
from xllm_lab.metrics import summarize
from xllm_lab.page_time import fit_page_time
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.records import Records
from xllm_lab.slots import runs
from xllm_lab.step_samples import mapped
from xllm_lab.workload import Prompt, Request, RequestId, Sampling, Workload

CONFIG = InstanceConfig(
    max_tokens_per_batch=512, max_seqs_per_batch=32, block_size=16, num_kv_blocks=1000, max_model_len=1024
)
SHAPES = VllmBuckets()


def tables(count: int, context: int) -> list[list[int]]:
    """Blocks in random order, as they are after a while."""
    blocks = list(range(CONFIG.num_kv_blocks))
    random.Random(7).shuffle(blocks)
    each = context // CONFIG.block_size + 1
    return [blocks[each * i : each * (i + 1)] for i in range(count)]


def decodes(runner: Runner, own: Sequence[Sequence[int]], context: int) -> list[SequenceChunk]:
    pool = runner.kv_pool
    if isinstance(pool, VirtualKvPool):
        for slot, table in enumerate(own):
            for run in runs(slot, enumerate(table)):
                pool.map(run)
        return [SequenceChunk([5 + i], context, pool.table(i), True) for i in range(len(own))]
    return [SequenceChunk([5 + i], context, tuple(table), True) for i, table in enumerate(own)]


def fill(runner: Runner) -> None:
    """Random keys and values, the same ones in the same physical blocks."""
    pool = runner.kv_pool
    generator = torch.Generator().manual_seed(3)
    for layer in pool.layers:
        for side in layer:
            block = torch.randn((CONFIG.num_kv_blocks, CONFIG.block_size, *side.shape[2:]), generator=generator)
            if isinstance(pool, VirtualKvPool):
                flat = side.view(-1, *side.shape[2:])
                flat[: CONFIG.num_kv_blocks * CONFIG.block_size] = block.flatten(0, 1).to(side.dtype)
            else:
                side[: CONFIG.num_kv_blocks] = block.to(side.dtype)


def steps(engine: Engine, repeats: int) -> None:
    layouts = ("paged", "virtual")
    runners = {layout: engine.runner(replace(CONFIG, kv_layout=layout), SHAPES) for layout in layouts}
    virtual = runners["virtual"].kv_pool
    assert isinstance(virtual, VirtualKvPool)
    pages = virtual.slot_tokens // CONFIG.block_size
    for first in range(0, CONFIG.num_kv_blocks, pages):  # all blocks, behind one another
        count = min(pages, CONFIG.num_kv_blocks - first)
        for run in runs(first // pages, ((k, first + k) for k in range(count))):
            virtual.map(run)
    for runner in runners.values():
        fill(runner)
    for context in (200, 900):
        for count in (1, 4, 16):
            own = tables(count, context)
            chunks = {layout: decodes(runners[layout], own, context) for layout in layouts}
            logits = [runners[layout].run(chunks[layout], count).clone() for layout in layouts]
            assert torch.equal(*logits), "other addresses, other logits"
            times: dict[str, list[float]] = {layout: [] for layout in layouts}
            for repeat in range(repeats):
                for layout in layouts if repeat % 2 else layouts[::-1]:
                    start_ns = time.process_time_ns()
                    engine.model.model.ops.argmax(runners[layout].run(chunks[layout], count))
                    times[layout].append((time.process_time_ns() - start_ns) / 1000)
            ratio = sorted(v / p for p, v in zip(times["paged"], times["virtual"], strict=True))
            told = {
                "context": context,
                "sequences": count,
                **{f"{layout}_us": round(statistics.median(times[layout])) for layout in layouts},
                **{f"{layout}_least_us": round(min(times[layout])) for layout in layouts},
                "virtual_to_paged": round(statistics.median(ratio), 4),
                "middle_half": [round(ratio[len(ratio) // 4], 4), round(ratio[3 * len(ratio) // 4], 4)],
            }
            print(json.dumps(told), flush=True)


def mapping(engine: Engine) -> None:
    pool = engine.runner(replace(CONFIG, kv_layout="virtual")).kv_pool
    assert isinstance(pool, VirtualKvPool)
    for size in (1, 4, 16, 64):
        taken: dict[str, list[float]] = {"map_us": [], "remap_us": [], "unmap_us": []}
        for k in range(30):
            (run,) = runs(2 * k, ((i, 13 * k + i) for i in range(size)))
            for name, move in (("map_us", pool.map), ("remap_us", pool.map), ("unmap_us", pool.unmap)):
                start_ns = time.perf_counter_ns()
                move(run._replace(block=run.block + (name == "remap_us")))
                taken[name].append((time.perf_counter_ns() - start_ns) / 1000)
        quartiles = {name: [round(q) for q in statistics.quantiles(found)] for name, found in taken.items()}
        print(json.dumps({"run_of_pages": size, **quartiles}), flush=True)


def requests(rng: random.Random, count: int, gap_us: int, *, longest: int = 300, most_outputs: int = 120) -> Workload:
    """A third begin alike, if they are long enough: by up to 320 tokens."""
    made = []
    for i in range(count):
        shared = rng.random() < 0.33
        hashes = tuple(range(20)) if shared else tuple(1000 * i + k for k in range(20))
        made.append(
            Request(
                id=RequestId(i),
                arrival_us=i * gap_us,
                prompt=Prompt(num_tokens=rng.randint(longest // 2, longest), block_hashes=hashes, hash_block_tokens=16),
                output_tokens=rng.randint(most_outputs // 6, most_outputs),
                sampling=Sampling(ignore_eos=True),
            )
        )
    return Workload(requests=tuple(made))


def ways() -> Iterator[tuple[str, str]]:
    yield "paged", "on-demand"
    for name in policies("pages"):
        yield "virtual", name


def whole_runs(engine: Engine, repeats: int) -> None:
    work = requests(random.Random(5), 16, 100_000)
    by_way: dict[tuple[str, str], list[float]] = {way: [] for way in ways()}
    for repeat in range(repeats):
        for layout, name in list(by_way) if repeat % 2 else list(by_way)[::-1]:
            config = replace(CONFIG, kv_layout=layout, num_kv_blocks=400)
            records = Records()
            chosen = Policies(make_policy("batch", "decode-first"), shapes=SHAPES, pages=make_policy("pages", name))
            engine.serve(work, config, chosen, records)
            told = summarize(records)
            by_way[layout, name].append(told.busy_frac * told.makespan_s)
            found = {
                n: getattr(told, n)
                for n in ("makespan_s", "unused_page_frac", "unfilled_page_frac", "page_reuse_frac", "map_frac")
            }
            fitted = fit_page_time(mapped(records.steps))
            row = {"layout": layout, "pages": name, "repeat": repeat, "busy_s": round(by_way[layout, name][-1], 3)}
            beside_ms = sum(s.beside_us or 0 for s in records.steps) / 1e3
            more = {} if fitted is None else {"beside_ms": round(beside_ms, 1), **_rounded(asdict(fitted), 1)}
            print(json.dumps({**row, **_rounded(found, 4), **more}), flush=True)
    for (layout, name), busy_s in by_way.items():
        print(
            json.dumps({"layout": layout, "pages": name, "busy_s": [round(b, 3) for b in sorted(busy_s)]}), flush=True
        )


def _rounded(values: dict[str, float | None], digits: int) -> dict[str, float | None]:
    return {name: None if value is None else round(value, digits) for name, value in values.items()}


def soak(engine: Engine, minutes: float) -> None:
    rng, until, done = random.Random(11), time.monotonic() + 60 * minutes, 0
    before, steps_run, pages_moved = state(), 0, 0
    size = page_tokens(engine)
    turns = [(mode, name) for mode in ASYNC_SCHEDULING for name in policies("pages")]
    while time.monotonic() < until or done < len(turns):
        mode, name = turns[done % len(turns)]
        blocks = rng.choice((20, 40, 100))
        config = replace(
            CONFIG,
            kv_layout="virtual",
            block_size=size,
            num_kv_blocks=max(4, blocks * 16 // size),
            max_model_len=min(CONFIG.max_model_len, engine.model.config.max_position),
            async_scheduling=mode,
        )
        records = Records()
        chosen = Policies(make_policy("batch", "decode-first"), shapes=SHAPES, pages=make_policy("pages", name))
        work = requests(rng, 12, 20_000, longest=100, most_outputs=60)
        engine.serve(work, config, chosen, records)
        assert all(r.finish_reason == "length" for r in records.requests), "a request did not end"
        shown: set[tuple[int, int]] = set()
        for step in records.steps:
            for numbers in (step.page_maps, step.page_maps_ahead, step.page_unmaps):
                for k in range(0, len(numbers), 4):
                    slot, page, _, count = numbers[k : k + 4]
                    moved = {(slot, page + i) for i in range(count)}
                    pages_moved += count
                    shown = shown - moved if numbers is step.page_unmaps else shown | moved
            assert step.mapped_tokens == len(shown) * size, "a page is lost"
        steps_run += len(records.steps)
        done += 1
        if done == len(turns):
            gc.collect()
            before = state()  # what the first of each kind keeps for good
        if done % len(turns) == 0:
            gc.collect()
            now = state()
            print(json.dumps({"runs": done, "steps": steps_run, "pages_moved": pages_moved, **now}), flush=True)
            assert now["kv_mappings"] == now["kv_files"] == 0, "something of virtual KV is left"
    after = state()
    assert after["mappings"] <= before["mappings"] + 50, f"{before['mappings']} mappings became {after['mappings']}"


def page_tokens(engine: Engine) -> int:
    """The smallest blocks of at least 16 tokens that the device maps."""
    model, page_bytes = engine.model.model, engine.device.page_bytes()
    token_bytes = model.config.num_kv_heads * model.config.head_dim * model.dtype.itemsize
    return math.lcm(16, page_bytes // math.gcd(page_bytes, token_bytes))


def state() -> dict[str, int]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    return {
        "mappings": len(lines),
        "kv_mappings": sum("xllm_lab_kv" in line for line in lines),
        "kv_files": sum("xllm_lab_kv" in name for name in files),
        "resident_mib": int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 >> 20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "mapping", "runs", "soak"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--timer", default="cpu", help="of `runs`; wall, where nobody else is on the machine")
    o = parser.parse_args()
    options = EngineOptions(model=o.model, device="cpu", dtype=o.dtype, threads=1, timer=o.timer)
    engine = Engine(options)
    if o.what == "steps":
        steps(engine, o.repeats)
    elif o.what == "mapping":
        mapping(engine)
    elif o.what == "runs":
        whole_runs(engine, o.repeats)
    else:
        soak(engine, o.minutes)


if __name__ == "__main__":
    main()
