"""Rules about arguments of vLLM and options of vLLM-Ascend that conflict, or do nothing on an NPU."""

from __future__ import annotations

from collections.abc import Iterator

from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Repair, Severity
from xllm_lab.tuning.lint.rules import Found, Rule
from xllm_lab.tuning.lint.rules.ascend_rows import (
    BASE,
    CONFIG,
    FINE_TP,
    OPTIONS,
    PLATFORM,
    ROLE,
    SCHEDULER,
    more,
    off,
    pair,
    written,
)
from xllm_lab.tuning.lint.rules.options import LEGACY
from xllm_lab.tuning.lint.settings import Settings

ERROR, WARNING, NOTE = Severity

_OPERATORS = (
    pair(
        "fused-mc2-and-streams",
        WARNING,
        (f"{OPTIONS}multistream_overlap_shared_expert", f"{OPTIONS}enable_fused_mc2"),
        when=lambda s: s[f"{OPTIONS}multistream_overlap_shared_expert"] and s[f"{OPTIONS}enable_fused_mc2"] == 1,
        says="multistream_overlap_shared_expert is turned off by enable_fused_mc2",
        source=f"{CONFIG}:177",
        what="overlap of the shared expert beside fused MC2",
        example=written("multistream_overlap_shared_expert: true", "enable_fused_mc2: 1"),
        put=off(f"{OPTIONS}multistream_overlap_shared_expert"),
    ),
    pair(
        "fused-mc2-and-hierarchy",
        ERROR,
        (f"{OPTIONS}enable_mc2_hierarchy_comm", f"{OPTIONS}enable_fused_mc2"),
        when=lambda s: s[f"{OPTIONS}enable_mc2_hierarchy_comm"] and s[f"{OPTIONS}enable_fused_mc2"] == 1,
        says="enable_mc2_hierarchy_comm and enable_fused_mc2 exclude each other",
        source=f"{PLATFORM}:808",
        what="hierarchical communication beside fused MC2",
        example=written("enable_mc2_hierarchy_comm: true", "enable_fused_mc2: 1"),
        put={f"{OPTIONS}enable_fused_mc2": 0},
    ),
    pair(
        "static-kernel-alone",
        ERROR,
        (
            f"{OPTIONS}ascend_compilation_config.enable_static_kernel",
            f"{OPTIONS}ascend_compilation_config.enable_npugraph_ex",
        ),
        when=lambda s: (
            s[f"{OPTIONS}ascend_compilation_config.enable_static_kernel"]
            and not s[f"{OPTIONS}ascend_compilation_config.enable_npugraph_ex"]
        ),
        says="enable_static_kernel needs enable_npugraph_ex",
        source=f"{CONFIG}:772",
        what="static kernels without npugraph_ex",
        example=written("ascend_compilation_config:", "  enable_static_kernel: true", "  enable_npugraph_ex: false"),
        put={f"{OPTIONS}ascend_compilation_config.enable_npugraph_ex": True},
    ),
    pair(
        "shared-expert-dp-idle",
        WARNING,
        (f"{OPTIONS}enable_shared_expert_dp", "enable_expert_parallel", "tensor_parallel_size"),
        when=lambda s: (
            s[f"{OPTIONS}enable_shared_expert_dp"]
            and not (s["enable_expert_parallel"] and more(s["tensor_parallel_size"], 1))
        ),
        says="enable_shared_expert_dp does nothing without enable_expert_parallel and tensor_parallel_size above 1",
        source=f"{CONFIG}:114",
        what="data parallelism of the shared expert without what it needs",
        example=written("enable_shared_expert_dp: true"),
        removed=(f"{OPTIONS}enable_shared_expert_dp",),
    ),
    pair(
        "c8-writes-idle",
        WARNING,
        (f"{OPTIONS}c8_enable_reshape_optim", f"{OPTIONS}enable_sparse_li_c8"),
        when=lambda s: s[f"{OPTIONS}c8_enable_reshape_optim"] and not s[f"{OPTIONS}enable_sparse_li_c8"],
        says="c8_enable_reshape_optim does nothing without enable_sparse_li_c8",
        source=f"{CONFIG}:264",
        what="faster writes to a cache that is not there",
        example=written("c8_enable_reshape_optim: true"),
        removed=(f"{OPTIONS}c8_enable_reshape_optim",),
    ),
    pair(
        "kv-nz-elsewhere",
        ERROR,
        (f"{OPTIONS}enable_kv_nz", ROLE),
        when=lambda s: s[f"{OPTIONS}enable_kv_nz"] and s[ROLE] not in ("kv_consumer", "kv_both"),
        says="enable_kv_nz is for a kv_consumer",
        source=f"{CONFIG}:257",
        what="the NZ layout of KV outside of decode instances",
        example=written("enable_kv_nz: true"),
        put=off(f"{OPTIONS}enable_kv_nz"),
    ),
    pair(
        "mixed-placement",
        ERROR,
        (f"{OPTIONS}mix_placement", f"{OPTIONS}multistream_overlap_shared_expert", f"{OPTIONS}enable_fused_mc2"),
        when=lambda s: (
            s[f"{OPTIONS}mix_placement"]
            and s[f"{OPTIONS}multistream_overlap_shared_expert"]
            and s[f"{OPTIONS}enable_fused_mc2"] != 1
        ),
        says="mix_placement and multistream_overlap_shared_expert exclude each other",
        source=f"{CONFIG}:449",
        what="mixed placement beside overlap of the shared expert",
        example=written("mix_placement: true", "multistream_overlap_shared_expert: true"),
        put=off(f"{OPTIONS}multistream_overlap_shared_expert"),
    ),
    pair(
        "two-dumps",
        ERROR,
        (f"{OPTIONS}dump_config_path", f"{OPTIONS}dump_config"),
        when=lambda s: s.says(f"{OPTIONS}dump_config_path") and s.says(f"{OPTIONS}dump_config"),
        says="dump_config_path and dump_config exclude each other",
        source=f"{CONFIG}:466",
        what="two configurations of the dump",
        example=written("dump_config_path: /etc/dump.json", "dump_config:", "  task: statistics"),
        removed=(f"{OPTIONS}dump_config_path",),
    ),
    pair(
        "reduced-sampling-and-head",
        ERROR,
        (f"{OPTIONS}enable_reduce_sample", f"{FINE_TP}lmhead_tensor_parallel_size"),
        when=lambda s: s[f"{OPTIONS}enable_reduce_sample"] and s[f"{FINE_TP}lmhead_tensor_parallel_size"] > 0,
        says="enable_reduce_sample and lmhead_tensor_parallel_size exclude each other",
        source=f"{CONFIG}:301",
        what="reduced sampling beside a divided head",
        example=written("enable_reduce_sample: true", "finegrained_tp_config:", "  lmhead_tensor_parallel_size: 1"),
        put=off(f"{OPTIONS}enable_reduce_sample"),
    ),
    pair(
        "reduced-sampling-on-prefill",
        ERROR,
        (f"{OPTIONS}enable_reduce_sample", ROLE),
        when=lambda s: s[f"{OPTIONS}enable_reduce_sample"] and s[ROLE] == "kv_producer",
        says="enable_reduce_sample is not for a kv_producer",
        source=f"{CONFIG}:309",
        what="reduced sampling on a prefill instance",
        example=written("enable_reduce_sample: true", before="kv_transfer_config:\n  kv_role: kv_producer\n"),
        put=off(f"{OPTIONS}enable_reduce_sample"),
    ),
    pair(
        "fine-tp-does-not-divide",
        ERROR,
        (*(f"{FINE_TP}{part}_tensor_parallel_size" for part in ("lmhead", "mlp")), "data_parallel_size"),
        when=lambda s: any(
            size > 0 and (s["data_parallel_size"] or 1) % size
            for size in (s[f"{FINE_TP}{part}_tensor_parallel_size"] for part in ("lmhead", "mlp"))
        ),
        says="sizes in finegrained_tp_config have to divide data_parallel_size",
        source=f"{CONFIG}:709",
        what="module parallelism that does not divide data parallelism",
        example=written("finegrained_tp_config:", "  mlp_tensor_parallel_size: 2"),
        put={f"{FINE_TP}mlp_tensor_parallel_size": 0, f"{FINE_TP}lmhead_tensor_parallel_size": 0},
    ),
    pair(
        "fine-tp-without-recompute",
        ERROR,
        (
            f"{FINE_TP}oproj_tensor_parallel_size",
            f"{FINE_TP}embedding_tensor_parallel_size",
            f"{SCHEDULER}recompute_scheduler_enable",
        ),
        when=lambda s: (
            (s[f"{FINE_TP}oproj_tensor_parallel_size"] > 0 or s[f"{FINE_TP}embedding_tensor_parallel_size"] > 0)
            and not s[f"{SCHEDULER}recompute_scheduler_enable"]
        ),
        says="oproj_tensor_parallel_size and embedding_tensor_parallel_size need recompute_scheduler_enable, which "
        "keeps ranks at the same number of tokens",
        source=f"{CONFIG}:146",
        what="module parallelism whose ranks may differ in tokens",
        example=written("finegrained_tp_config:", "  embedding_tensor_parallel_size: 1"),
        put={f"{FINE_TP}oproj_tensor_parallel_size": 0, f"{FINE_TP}embedding_tensor_parallel_size": 0},
    ),
    pair(
        "fine-oproj-tp",
        ERROR,
        (
            f"{FINE_TP}oproj_tensor_parallel_size",
            "tensor_parallel_size",
            "enforce_eager",
            f"{SCHEDULER}recompute_scheduler_enable",
        ),
        when=lambda s: (
            s[f"{FINE_TP}oproj_tensor_parallel_size"] > 0
            and s[f"{SCHEDULER}recompute_scheduler_enable"]
            and (more(s["tensor_parallel_size"], 1) or s["enforce_eager"])
        ),
        says="oproj_tensor_parallel_size needs tensor_parallel_size 1, and graphs",
        source=f"{CONFIG}:663",
        what="a divided output projection beside tensor parallelism, or eagerly",
        example=written(
            "finegrained_tp_config:",
            "  oproj_tensor_parallel_size: 1",
            "scheduler_config:",
            "  recompute_scheduler_enable: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\ntensor_parallel_size: 2\n",
        ),
        put={f"{FINE_TP}oproj_tensor_parallel_size": 0},
    ),
    pair(
        "cleanup-moved",
        ERROR,
        (),
        when=lambda s: s.says(f"{OPTIONS}enable_sleep_mode_extra_cleanup"),
        says="enable_sleep_mode_extra_cleanup is rl_config.sleep_mode_extra_cleanup now",
        source=f"{CONFIG}:38",
        what="an option that was moved to rl_config",
        example=written("enable_sleep_mode_extra_cleanup: true"),
        put=lambda s: {
            f"{OPTIONS}rl_config.sleep_mode_extra_cleanup": bool(
                s.config.entries[f"{OPTIONS}enable_sleep_mode_extra_cleanup"].value
            )
        },
        removed=(f"{OPTIONS}enable_sleep_mode_extra_cleanup",),
    ),
    pair(
        "flashcomm-is-gone",
        WARNING,
        (),
        when=lambda s: s.says(f"{OPTIONS}enable_flashcomm1"),
        says="enable_flashcomm1 is no option any more: sequence parallelism is vLLM's own",
        source=f"{CONFIG}:44",
        what="an option that was taken out",
        example=written("enable_flashcomm1: true"),
        removed=(f"{OPTIONS}enable_flashcomm1",),
    ),
)


def _legacy(settings: Settings) -> Iterator[Found]:
    for key in LEGACY:
        old, new = f"{OPTIONS}{key}", f"{SCHEDULER}{key}"
        if settings.says(old):
            ignored = settings.says(new)
            why = "is passed over, as scheduler_config has it, too" if ignored else "belongs into scheduler_config now"
            repair = Repair(removed=(old,)) if ignored else Repair(renamed={old: new})
            yield Found(f"{old} {why}", (old,), repair)


# Arguments that do nothing on an NPU, with the value that does, and the line that resets them.
_RESET = {
    "disable_cascade_attn": (False, 531),
    "calculate_kv_scales": (False, 547),
    "mm_encoder_attn_backend": (None, 557),
    "enable_layerwise_nvtx_tracing": (False, 567),
    "max_num_partial_prefills": (1, 577),
    "speculative_config.quantization": (None, 587),
    "kv_transfer_config.kv_buffer_size": (1e9, 599),
    "kv_transfer_config.enable_permute_local_kv": (False, 609),
    "ray_workers_use_nsight": (False, 675),
    "numa_bind": (False, 687),
    "numa_bind_nodes": (None, 700),
    "numa_bind_cpus": (None, 708),
    "enable_dbo": (False, 716),
    "ubatch_size": (0, 724),
}


def _reset(settings: Settings) -> Iterator[Found]:
    for name, (kept, line) in _RESET.items():
        if settings.is_known(name) and settings[name] not in (None, kept):
            says = f"{name} is for other hardware; vLLM-Ascend resets it to {kept}"
            yield Found(says, (name,), Repair(removed=(name,)), f"{PLATFORM}:{line}")


_VLLM = (
    Rule(
        id="reset-on-npu",
        kind=Kind.VLLM,
        severity=WARNING,
        what="an argument that does nothing on an NPU",
        source=f"{PLATFORM}:520",
        finds=_reset,
        example=f"{BASE}enable_dbo: true",
    ),
    Rule(
        id="moved-to-scheduler",
        kind=Kind.VLLM,
        severity=WARNING,
        what="an option outside of scheduler_config",
        source=f"{CONFIG}:1226",
        finds=_legacy,
        example=written("short_request_first_config:", "  enabled: true"),
    ),
    pair(
        "step-below-seqs",
        ERROR,
        ("max_num_batched_tokens", "max_num_seqs"),
        when=lambda s: (
            s["max_num_batched_tokens"] is not None
            and s["max_num_seqs"] is not None
            and s["max_num_batched_tokens"] < s["max_num_seqs"]
        ),
        says="max_num_batched_tokens={max_num_batched_tokens} is less than max_num_seqs={max_num_seqs}: vLLM refuses "
        "a step that cannot hold a token of each",
        source="vllm@01230b40 vllm/config/scheduler.py (verify_max_model_len)",
        what="a step smaller than its sequences",
        example="max_num_seqs: 64\nmax_num_batched_tokens: 32",
        put=lambda s: {"max_num_seqs": s["max_num_batched_tokens"]},
    ),
    pair(
        "whole-prompts-do-not-fit",
        ERROR,
        ("enable_chunked_prefill", "max_num_batched_tokens", "max_model_len"),
        when=lambda s: (
            s["enable_chunked_prefill"] is False
            and s["max_num_batched_tokens"] is not None
            and s["max_model_len"] is not None
            and s["max_num_batched_tokens"] < s["max_model_len"]
        ),
        says="enable_chunked_prefill is off, and max_num_batched_tokens={max_num_batched_tokens} holds no prompt of "
        "max_model_len={max_model_len}: vLLM refuses",
        source="vllm@01230b40 vllm/config/scheduler.py (verify_max_model_len)",
        what="whole prompts that are longer than a step",
        example=f"{BASE}enable_chunked_prefill: false\nmax_num_batched_tokens: 2048\nmax_model_len: 8192",
        put={"enable_chunked_prefill": True},
    ),
)

RULES = (*_OPERATORS, *_VLLM)
