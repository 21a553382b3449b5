"""Small profiles with the headers that profilers document, and rows like those of a Qwen3-32B decode step."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Cells = Sequence[object]

KERNEL_HEADER = (
    *("Step Id", "Device_id", "Name", "Type", "Accelerator Core", "Start Time(us)", "Duration(us)", "Wait Time(us)"),
    *("Block Num", "Mix Block Num", "Input Shapes", "Input Data Types", "Input Formats"),
    *("Output Shapes", "Output Data Types", "Output Formats"),
)
OLD_KERNEL_HEADER = (
    *("Device_id", "Model ID", "Task ID", "Stream ID", "Name", "Type", "OP State", "Accelerator Core"),
    *("Start Time(us)", "Duration(us)", "Wait Time(us)", "Block Dim", "Mix Block Dim", "HF32 Eligible"),
    *("Input Shapes", "Input Data Types", "Input Formats", "Output Shapes", "Output Data Types", "Output Formats"),
)
STATISTIC_HEADER = (
    *("Device_id", "OP Type", "Core Type", "Count", "Total Time(us)", "Min Time(us)", "Avg Time(us)"),
    *("Max Time(us)", "Ratio(%)"),
)
STEP_HEADER = (
    *("Device_id", "Step", "Computing", "Communication(Not Overlapped)", "Overlapped", "Communication", "Free"),
    *("Stage", "Bubble", "Communication(Not Overlapped and Exclude Receive)", "Preparing"),
)
HOST_HEADER = (
    *("Name", "Input Shapes", "Call Stack", "Host Self Duration(us)", "Host Total Duration(us)"),
    *("Device Self Duration(us)", "Device Total Duration(us)", "Device Self Duration With AICore(us)"),
    "Device Total Duration With AICore(us)",
)

POOL = "16,4,128;2048,128,512;2048,128,512"
# Name, type, core, duration, input shapes, input types; a slice of one layer's decode at 16 sequences, TP 16.
LAYER = (
    ("aclnnAddRmsNormBias", "AddRmsNormBias", "AI_VECTOR_CORE", 6.1, "16,5120;16,5120;5120", "DT_BF16;DT_BF16;DT_BF16"),
    ("aclnnMatmul_MatMulV2", "MatMulV2", "AI_CORE", 18.9, "16,5120;5120,640", "DT_BF16;DT_BF16"),
    ("_triton_rope", "_triton_rope", "AI_VECTOR_CORE", 5.5, "16,4,128;16,128", "DT_BF16;DT_BF16"),
    ("FusedInferAttentionScore", "FusedInferAttentionScore", "MIX_AIC", 25.2, POOL, "DT_BF16;DT_BF16;DT_BF16"),
    ("aclnnMatmul_MatMulV2", "MatMulV2", "AI_CORE", 12.25, "16,512;512,5120", "DT_BF16;DT_BF16"),
    ("hcom_allReduce__503_96_1", "hcom_allReduce_", "HCCL", 19.8, "N/A", "N/A"),
    ("AivKernel", "hcom_allReduce_", "MIX_AIV", 19.75, "N/A", "N/A"),
    ("aclnnSwiGlu", "SwiGlu", "AI_VECTOR_CORE", 5.6, "16,3200", "DT_BF16"),
)
SHADOW_US = 19.75
COLLECTIVE_US = 19.8
OPERATORS_US = sum(kernel[3] for kernel in LAYER) - SHADOW_US - COLLECTIVE_US


def write_csv(path: Path, header: Cells, rows: Iterable[Cells]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def output_folder(root: Path) -> Path:
    return root / "npu01_4711_20260313101831169_ascend_pt" / "ASCEND_PROFILER_OUTPUT"


def kernel_rows(num_steps: int = 2, layers: int = 3, device: int = 0, marked: bool = True) -> list[list[object]]:
    """Rows under KERNEL_HEADER. Start times end in a tab, as CANN writes them."""
    rows: list[list[object]] = []
    clock = 1_774_670_741_777_000.0
    for step in range(1, num_steps + 1):
        for name, type, core, duration, shapes, dtypes in LAYER * layers:
            mark = step if marked else ""
            times = (f"{clock:.3f}\t", duration, 0.5, 24, 0)
            rows.append([mark, device, name, type, core, *times, shapes, dtypes, "ND", "N/A", "N/A", "N/A"])
            clock += 0 if name == "hcom_allReduce__503_96_1" else duration + 0.5
    return rows


def old_kernel_rows(num_steps: int = 2, layers: int = 3) -> list[list[object]]:
    """The same rows under OLD_KERNEL_HEADER; an operation of HCCL has no stream."""
    rows: list[list[object]] = []
    for row in kernel_rows(num_steps, layers, marked=False):
        stream = "N/A" if "hcom" in str(row[2]) else 2
        model = (row[1], 4294967295, 7, stream, row[2], row[3], "dynamic")
        rows.append([*model, *row[4:8], 24, 0, "NO", *row[10:]])
    return rows


def ascend_folder(root: Path, num_steps: int = 2, layers: int = 3) -> Path:
    """All four files, of one device."""
    output = output_folder(root)
    write_csv(output / "kernel_details.csv", KERNEL_HEADER, kernel_rows(num_steps, layers))
    n = num_steps * layers
    statistic: list[list[object]] = [
        [0, "MatMulV2", "AI_CORE", 2 * n, f"{31.15 * n:.2f}", 12.25, 15.575, 18.9, 34],
        [0, "SwiGlu", "AI_VECTOR_CORE", n, f"{5.6 * n:.2f}", 5.6, 5.6, 5.6, 6],
    ]
    write_csv(output / "op_statistic.csv", STATISTIC_HEADER, statistic)
    # Concurrency 1 and 16 of the published Qwen3-32B table.
    split: list[list[object]] = [
        [0, 1, 11_200, 3_400, 12.5, 3_412.5, 1_100, 15_700, 0, 3_400, 10],
        [0, 2, 12_900, 5_200, 0, 5_200, 1_300, 19_400, 0, 5_200, 10],
    ]
    write_csv(output / "step_trace_time.csv", STEP_HEADER, split)
    host: list[list[object]] = [
        ["aten::mm", "16,5120;5120,640", "", 40.5, 60, 18.9, 18.9, 18.9, 18.9],
        ["aten::mm", "16,512;512,5120", "", 39.5, 60, 12.25, 12.25, 12.25, 12.25],
        ["npu::npu_swiglu", "16,3200", "", 12, 20, 5.6, 5.6, 0, 0],
    ]
    write_csv(output / "operator_details.csv", HOST_HEADER, host)
    return output.parent


BATCH_HEADER = (
    *("name", "res_list", "start_datetime", "end_datetime", "during_time(ms)", "batch_type", "prof_id", "batch_size"),
    *("prefill_batch_size", "decode_batch_size", "total_blocks", "used_blocks", "free_blocks", "blocks_allocated"),
    *("blocks_freed", "kvcache_usage_rate", "prefill_scheduled_tokens", "decode_scheduled_tokens"),
    *("total_scheduled_tokens", "dp_rank", "start_time(ms)", "end_time(ms)", "accepted_ratio"),
    "accepted_ratio_per_pos",
)
OLD_BATCH_HEADER = (
    *("name", "res_list", "start_time(microsecond)", "end_time(microsecond)", "batch_size", "batch_type"),
    "during_time(microsecond)",
)
REQUEST_HEADER = (
    *("http_rid", "start_datetime", "recv_token_size", "reply_token_size", "execution_time(ms)"),
    *("queue_wait_time(ms)", "first_token_latency(ms)", "cache_hit_rate", "start_time(ms)"),
)
OLD_REQUEST_HEADER = (
    *("http_rid", "start_time_httpReq(microsecond)", "recv_token_size", "reply_token_size"),
    *("execution_time(microsecond)", "queue_wait_time(microsecond)"),
)
FORWARD_HEADER = (
    *("name", "relative_start_time(ms)", "start_datetime", "end_datetime", "during_time(ms)", "bubble_time(ms)"),
    *("batch_size", "batch_type", "forward_iter", "dp_rank", "prof_id", "hostname", "start_time(ms)", "end_time(ms)"),
)
KVCACHE_HEADER = (
    *("rid", "name", "start_time", "total_blocks", "used_blocks", "free_blocks", "blocks_allocated", "blocks_freed"),
    *("device_kvcache_left", "kvcache_usage_rate"),
)
OLD_KVCACHE_HEADER = (
    *("domain", "rid", "start_time(microsecond)", "end_time(microsecond)", "name", "device_kvcache_left"),
    "during_time(microsecond)",
)
EPOCH_MS = 1_774_670_741_000


def batch_row(
    name: str,
    *,
    ms: float,
    parts: object = "",
    at_ms: int = 0,
    device: str = "1",
    prefills: tuple[int, int] = (0, 0),
    decodes: tuple[int, int] = (0, 0),
    used_blocks: object = "",
) -> list[object]:
    """A row under BATCH_HEADER; prefills and decodes are (requests, tokens)."""
    start = EPOCH_MS + at_ms
    size = prefills[0] + decodes[0]
    type = ",".join(kind for kind, (num, _) in (("Prefill", prefills), ("Decode", decodes)) if num)
    blocks = ("", "", "", "", "", "") if used_blocks == "" else (2048, used_blocks, "", "", "", "")
    return [
        *(name, parts, "2026-03-13 10:18:31:169", "2026-03-13 10:18:31:190", ms, type, device, float(size)),
        *(prefills[0], decodes[0], *blocks, prefills[1], decodes[1], prefills[1] + decodes[1]),
        *("<NA>", start, start + int(ms), "", ""),
    ]


def vllm_part(rid: str, iteration: int, new: int, computed: int, prompt: int) -> dict[str, object]:
    """An entry of res_list as the vLLM hooks write it."""
    return {
        "rid": rid,
        "iter": iteration,
        "type": 0 if computed < prompt else 1,
        "num_scheduled_tokens": new,
        "num_prompt_tokens": prompt,
        "num_computed_tokens": computed,
    }
