"""Compiles every Triton kernel for a GPU that need not be there, and prints what each one takes, a JSON object a line.

python -m tests.engine.triton_compile CAPABILITY DTYPE QUERY_HEADS KV_HEADS HEAD_DIM
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch

from xllm_lab.engine.ops.batch import paged_batch
from xllm_lab.engine.ops.gpu import serving

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"} | {
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = [["tt.divisibility", 16]]  # as Triton itself finds of addresses and strides


def compile_for(capability: int) -> None:
    """Whatever is launched from now on is compiled instead."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        options = {"num_warps": constants.pop("num_warps")} if "num_warps" in constants else {}
        types, names = {}, kernel.arg_names
        for name, operand in zip(names, operands, strict=False):
            is_float = isinstance(operand, float)
            types[name] = _POINTERS[operand.dtype] if torch.is_tensor(operand) else "fp32" if is_float else "i32"
        divides = [n for n, t in types.items() if t.startswith("*") or n in {"q_stride", "x_stride", "k_stride"}]
        source = ASTSource(
            kernel,
            types | dict.fromkeys(constants, "constexpr"),
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): _ALIGNED for name in divides},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack_bytes = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
        told = {"kernel": kernel.fn.__name__, "grid": grid, "registers": registers, "stack_bytes": stack_bytes}
        ptx = compiled.asm["ptx"]
        told |= {"shared_bytes": compiled.metadata.shared, "matrix_unit": "mma." in ptx, "copies": "cp.async" in ptx}
        sys.stdout.write(json.dumps(told) + "\n")

    serving.launch = launch


def main(capability: int, dtype: torch.dtype, N: int, K: int, H: int) -> None:
    compile_for(capability)
    ops, tokens = serving.TritonOps(num_cores=132), 40
    wide, pool = torch.zeros(tokens, N + 2 * K, H, dtype=dtype), torch.zeros(100, 16, K, H, dtype=dtype)
    out_TNH, angle_TH = torch.zeros(tokens, N, H, dtype=dtype), torch.zeros(tokens, H, dtype=dtype)
    for queries, computed in (([1] * tokens, 30), ([1], 1500), ([39, 1], 0)):
        batch = paged_batch(queries, [computed] * len(queries), [range(100)] * len(queries), pool)
        used = sum(queries)
        ops.paged_attention(wide[:used, :N], pool, pool, batch, out_TNH[:used])
    ops.reshape_and_cache(wide[:, N : N + K], wide[:, N + K :], pool, pool, batch)
    ops.head_norm(wide[:, : N + K], torch.zeros(N + K, H, dtype=dtype), 1e-5)
    ops.rope(wide[:, : N + K], angle_TH, angle_TH)
    x_TD = torch.zeros(tokens, N * H, dtype=dtype)
    ops.rms_norm(x_TD, x_TD[0], 1e-5, x_TD)
    ops.add_rms_norm(x_TD, x_TD, x_TD[0], 1e-5, x_TD)
    ops.swiglu(torch.zeros(tokens, 6 * N * H, dtype=dtype), torch.zeros(tokens, 3 * N * H, dtype=dtype))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:]))
