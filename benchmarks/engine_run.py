"""One engine on one workload in one process and one thread; run by `engine_peers.py`, in each engine's own Python.

    python engine_run.py ours|vllm|llama.cpp INPUTS float32|bfloat16 burst|poisson

The clock is this process's CPU seconds, and waiting for an arrival takes none. One JSON object on the last line.
"""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_REQUEST_MATRIX_UNIT = (158, 0x1023, 18)  # x86-64 Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA)
BLOCK_TOKENS, KV_TOKENS, STEP_TOKENS, MAX_SEQS = 16, 49152, 2048, 64


class Step(NamedTuple):
    """CPU seconds; prompt tokens and requests that got a token, by number."""

    cpu_s: float
    prompt_tokens: int
    sampled: list[int]


class Engine(Protocol):
    version: str

    def add(self, number: int, ids: list[int], out: int) -> None: ...
    def step(self) -> Step: ...
    def busy(self) -> bool: ...


class Vllm:
    """vLLM's CPU build, stepped in this process."""

    def __init__(self, inputs: Path, dtype: str) -> None:
        import vllm

        # Its attention uses the matrix unit without asking the kernel for it, which oneDNN does unless told not to.
        ctypes.CDLL(None).syscall(*_REQUEST_MATRIX_UNIT)
        self.version, self._vllm = vllm.__version__, vllm
        self._engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=str(inputs / "hf"),
                dtype=dtype,
                max_model_len=1024,
                enforce_eager=True,
                max_num_seqs=MAX_SEQS,
                max_num_batched_tokens=STEP_TOKENS,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        self._got: dict[int, int] = {}
        self._prompts: dict[int, int] = {}

    def add(self, number: int, ids: list[int], out: int) -> None:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        self._engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        self._prompts[number] = len(ids)

    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> Step:
        start_s = time.process_time()
        outputs = self._engine.step()
        took_s, sampled, prompts = time.process_time() - start_s, [], 0
        for output in outputs:
            number, count = int(output.request_id.split("-")[0]), len(output.outputs[0].token_ids)
            sampled += [number] * (count - self._got.get(number, 0))
            prompts += self._prompts.pop(number, 0)  # counted in the step that ends the prompt
            self._got[number] = count
        return Step(took_s, prompts, sampled)


class LlamaCpp:
    """llama.cpp through its C interface, with a batching loop of ours: a token of each sequence, then prompts."""

    _STEP_TOKENS = 512  # its default for a batch, and what it was built around

    def __init__(self, inputs: Path, dtype: str) -> None:
        import llama_cpp
        import numpy as np

        self._lib, self._np, self.version = llama_cpp, np, f"llama-cpp-python {llama_cpp.__version__}"
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        file = inputs / {"float32": "F32.gguf", "bfloat16": "BF16.gguf"}[dtype]
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = KV_TOKENS, MAX_SEQS
        params.n_batch = params.n_ubatch = self._STEP_TOKENS
        params.n_threads = params.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(self._STEP_TOKENS, 0, 1)
        self._texts: dict[int, list[int]] = {}
        self._ends: dict[int, int] = {}
        self._done: dict[int, int] = {}
        self._slots: dict[int, int] = {}
        self._free = list(range(MAX_SEQS))

    def add(self, number: int, ids: list[int], out: int) -> None:
        self._texts[number], self._ends[number], self._done[number] = list(ids), len(ids) + out, 0

    def busy(self) -> bool:
        return bool(self._texts)

    def step(self) -> Step:
        start_s, wanted, used, prompts = time.process_time(), [], 0, 0
        decoding = [n for n in self._texts if len(self._texts[n]) - self._done[n] == 1 and self._done[n]]
        for number in [*decoding, *(n for n in self._texts if n not in set(decoding))]:
            if number not in self._slots:
                if not self._free:
                    break
                self._slots[number] = self._free.pop()
            count = min(len(self._texts[number]) - self._done[number], self._STEP_TOKENS - used)
            for _ in range(count):
                self._put(used, number)
                used += 1
            if number not in decoding:
                prompts += count
            if count and self._done[number] == len(self._texts[number]):
                self._batch.logits[used - 1] = 1
                wanted.append((number, used - 1))
        self._batch.n_tokens = used
        failed = self._lib.llama_decode(self._context, self._batch)
        assert not failed, failed
        for number, row in wanted:
            self._sample(number, row)
        return Step(time.process_time() - start_s, prompts, [number for number, _ in wanted])

    def _put(self, row: int, number: int) -> None:
        batch, position = self._batch, self._done[number]
        batch.token[row], batch.pos[row], batch.logits[row] = self._texts[number][position], position, 0
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, self._slots[number]
        self._done[number] = position + 1

    def _sample(self, number: int, row: int) -> None:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        text = self._texts[number]
        text.append(int(self._np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax()))
        if len(text) == self._ends[number]:
            slot = self._slots.pop(number)
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), slot, -1, -1)
            self._free.append(slot)
            del self._texts[number]


def replay(engine: Engine, workload: list[dict[str, Any]]) -> Iterator[tuple[float, Step]]:
    """Yields each step's end and the step; arrivals are taken between steps."""
    now_s, following = 0.0, 0
    while following < len(workload) or engine.busy():
        if not engine.busy():
            now_s = max(now_s, workload[following]["arrival_s"])
        start_s = time.process_time()
        while following < len(workload) and workload[following]["arrival_s"] <= now_s:
            engine.add(following, workload[following]["ids"], workload[following]["out"])
            following += 1
        step = engine.step()
        now_s += time.process_time() - start_s
        yield now_s, step


def peer(engine: Engine, workload: list[dict[str, Any]]) -> dict[str, Any]:
    engine.add(len(workload), workload[0]["ids"][:64], 4)  # the first call of a kernel pays for choosing it
    while engine.busy():
        engine.step()
    times: dict[int, list[float]] = {n: [] for n in range(len(workload))}
    steps, end_s, start_s = [], 0.0, time.process_time()
    for end_s, step in replay(engine, workload):
        steps.append(step)
        for number in step.sampled:
            times[number].append(end_s)
    total_s = time.process_time() - start_s
    assert [len(t) for t in times.values()] == [r["out"] for r in workload], "an engine left tokens out"
    return {"version": engine.version, **figures(workload, total_s, steps, times)}


def ours(inputs: Path, dtype: str, workload: list[dict[str, Any]]) -> dict[str, Any]:
    """The engine as it serves anyone, on its own virtual clock of processor time."""
    from xllm_lab.engine.engine import Engine as Ours
    from xllm_lab.engine.engine import EngineOptions
    from xllm_lab.instance_config import InstanceConfig
    from xllm_lab.policies.batch.decode_first import DecodeFirst
    from xllm_lab.policies.of_instance import Policies
    from xllm_lab.records import Records
    from xllm_lab.workload import Prompt, Request, RequestId, Workload

    start_s = time.perf_counter()
    engine = Ours(EngineOptions(device="cpu", dtype=dtype, clock="virtual", timer="cpu"))
    load_s = time.perf_counter() - start_s
    config = InstanceConfig(
        max_tokens_per_batch=STEP_TOKENS,
        max_seqs_per_batch=MAX_SEQS,
        block_size=BLOCK_TOKENS,
        num_kv_blocks=KV_TOKENS // BLOCK_TOKENS,
        max_model_len=1024,
    )
    made = [
        Request(
            id=RequestId(n),
            arrival_us=round(r["arrival_s"] * 1e6),
            prompt=Prompt(num_tokens=len(r["ids"]), token_ids=tuple(r["ids"])),
            output_tokens=r["out"],
        )
        for n, r in enumerate(workload)
    ]
    records = Records()
    engine.serve(Workload(requests=tuple(made)), config, Policies(DecodeFirst()), records)
    steps = []
    for step in records.steps:
        prompts = sum(
            n
            for i, n, c in zip(step.ids, step.num_tokens, step.num_computed_tokens, strict=True)
            if c < made[i].prompt.num_tokens
        )
        steps.append(Step(step.step_us / 1e6, prompts, [0] * step.num_logits))
    times = {r.id: [us / 1e6 for us in r.token_times_us] for r in records.requests}
    kv_bytes = KV_TOKENS * engine.describe()["kv_bytes_per_token"]
    served = {op: s["by"] for op, s in engine.model.model.describe_ops().items()}
    total_s = sum(step.cpu_s for step in steps)
    more = {"load_wall_s": load_s, "kv_pool_bytes": kv_bytes, "ops": served, "cpu": engine.device.description}
    return {"version": "this commit", **more, **figures(workload, total_s, steps, times)}


def figures(
    workload: list[dict[str, Any]], total_s: float, steps: list[Step], times: dict[int, list[float]]
) -> dict[str, Any]:
    prompt, out = sum(len(r["ids"]) for r in workload), sum(r["out"] for r in workload)
    full = [s.cpu_s / len(s.sampled) for s in steps if not s.prompt_tokens and len(s.sampled) >= 0.9 * MAX_SEQS]
    prefill = [s for s in steps if s.prompt_tokens >= 256 and s.prompt_tokens >= 10 * len(s.sampled)]
    ttft = sorted(times[n][0] - r["arrival_s"] for n, r in enumerate(workload))
    tpot = sorted((t[-1] - t[0]) / (len(t) - 1) for t in times.values())
    return {
        "cpu_s": round(total_s, 2),
        "tokens_per_cpu_s": round((prompt + out) / total_s, 1),
        "full_batch_decode_per_cpu_s": round(1 / statistics.median(full), 1) if full else None,
        "prefill_per_cpu_s": round(sum(s.prompt_tokens for s in prefill) / sum(s.cpu_s for s in prefill), 1)
        if prefill
        else None,
        "ttft_s": [round(statistics.median(ttft), 3), round(ttft[int(0.99 * (len(ttft) - 1))], 3)],
        "tpot_ms": [round(1e3 * statistics.median(tpot), 1), round(1e3 * tpot[int(0.99 * (len(tpot) - 1))], 1)],
        "steps": len(steps),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    name, folder, dtype, arrivals = sys.argv[1:]
    inputs = Path(folder)
    workload = json.loads((inputs / "workload.json").read_text())
    if arrivals == "burst":
        workload = [r | {"arrival_s": 0.0} for r in workload]
    start_s = time.process_time()
    if name == "ours":
        result = ours(inputs, dtype, workload)
    else:
        engine: Engine = {"vllm": Vllm, "llama.cpp": LlamaCpp}[name](inputs, dtype)
        startup_s = time.process_time() - start_s
        result = {"startup_cpu_s": round(startup_s, 1), **peer(engine, workload)}
    print(json.dumps({"engine": name, "dtype": dtype, "arrivals": arrivals, **result}))


if __name__ == "__main__":
    main()
