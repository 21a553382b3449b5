"""Rules about arguments of vLLM and options of vLLM-Ascend that conflict, or do nothing on an NPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Repair, Severity
from xllm_lab.tuning.lint.rules import Found, Rule, conflict
from xllm_lab.tuning.lint.rules.options import LEGACY
from xllm_lab.tuning.lint.settings import Settings

ERROR, WARNING, NOTE = Severity
_CONFIG = "vllm-ascend@182b75ea vllm_ascend/ascend_config.py"
_PLATFORM = "vllm-ascend@182b75ea vllm_ascend/platform.py"
_A = "additional_config."
_S = f"{_A}scheduler_config."
_F = f"{_A}finegrained_tp_config."
_ROLE = "kv_transfer_config.kv_role"
_BASE = "max_num_seqs: 64\n"


def _more(value: Any, least: int) -> bool:
    return isinstance(value, int | float) and value > least


def _at_most_one(value: Any) -> bool:
    return not _more(value, 1)


def _off(name: str) -> dict[str, Any]:
    return {name: False}


def _yaml(*options: str, before: str = "") -> str:
    """An example: options under additional_config, one a line, nested by their indent."""
    return _BASE + before + "additional_config:\n" + "\n".join(f"  {option}" for option in options)


def _pair(name: str, severity: Severity, names: tuple[str, ...], **more: Any) -> Rule:
    return conflict(name, severity, names, kind=Kind.VLLM, **more)


_SCHEDULERS = (
    _pair(
        "profiled-chunks-need-pipeline",
        ERROR,
        (f"{_S}profiling_chunk_config.enabled", "pipeline_parallel_size"),
        when=lambda s: s[f"{_S}profiling_chunk_config.enabled"] and _at_most_one(s["pipeline_parallel_size"]),
        says="profiling_chunk_config needs pipeline_parallel_size above 1",
        source=f"{_CONFIG}:93",
        what="profiled chunks without a pipeline",
        example=_yaml("scheduler_config:", "  profiling_chunk_config:", "    enabled: true"),
        put=_off(f"{_S}profiling_chunk_config.enabled"),
    ),
    _pair(
        "profiled-chunks-and-balance",
        ERROR,
        (f"{_S}profiling_chunk_config.enabled", f"{_S}enable_balance_scheduling"),
        when=lambda s: s[f"{_S}profiling_chunk_config.enabled"] and s[f"{_S}enable_balance_scheduling"],
        says="profiling_chunk_config and enable_balance_scheduling exclude each other",
        source=f"{_CONFIG}:100",
        what="profiled chunks beside balance scheduling",
        example=_yaml(
            "scheduler_config:",
            "  enable_balance_scheduling: true",
            "  profiling_chunk_config:",
            "    enabled: true",
            before="pipeline_parallel_size: 2\n",
        ),
        put=_off(f"{_S}enable_balance_scheduling"),
    ),
    _pair(
        "balance-and-pd",
        ERROR,
        (f"{_S}enable_balance_scheduling", _ROLE),
        when=lambda s: s[f"{_S}enable_balance_scheduling"] and s[_ROLE] in ("kv_producer", "kv_consumer"),
        says="enable_balance_scheduling is for instances that do both prefill and decode",
        source=f"{_PLATFORM}:827",
        what="balance scheduling on one side of disaggregation",
        example=_yaml(
            "scheduler_config:",
            "  enable_balance_scheduling: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\n",
        ),
        put=_off(f"{_S}enable_balance_scheduling"),
    ),
    _pair(
        "short-first-needs-fcfs",
        ERROR,
        (f"{_S}short_request_first_config.enabled", "scheduling_policy"),
        when=lambda s: s[f"{_S}short_request_first_config.enabled"] and s["scheduling_policy"] not in (None, "fcfs"),
        says="short_request_first_config needs scheduling_policy fcfs",
        source=f"{_PLATFORM}:841",
        what="short requests first under another policy",
        example=_yaml(
            "scheduler_config:",
            "  short_request_first_config:",
            "    enabled: true",
            before="scheduling_policy: priority\n",
        ),
        put=_off(f"{_S}short_request_first_config.enabled"),
    ),
    *(
        _pair(
            f"short-first-and-{short}",
            ERROR,
            (f"{_S}short_request_first_config.enabled", f"{_S}{other}.enabled"),
            when=lambda s, other=other: s[f"{_S}short_request_first_config.enabled"] and s[f"{_S}{other}.enabled"],
            says=f"short_request_first_config and {other} exclude each other",
            source=f"{_PLATFORM}:{line}",
            what=f"short requests first beside {other}",
            example=_yaml(
                "scheduler_config:",
                "  short_request_first_config:",
                "    enabled: true",
                f"  {other}:",
                "    enabled: true",
                before="pipeline_parallel_size: 2\n",
            ),
            put=_off(f"{_S}short_request_first_config.enabled"),
        )
        for short, other, line in (
            ("batch-jobs", "batch_job_sched_config", 846),
            ("chunks", "profiling_chunk_config", 851),
        )
    ),
    _pair(
        "short-first-on-decode",
        ERROR,
        (f"{_S}short_request_first_config.enabled", _ROLE),
        when=lambda s: s[f"{_S}short_request_first_config.enabled"] and s[_ROLE] == "kv_consumer",
        says="short_request_first_config orders prompts, which a kv_consumer has none of",
        source=f"{_PLATFORM}:856",
        what="short requests first on a decode instance",
        example=_yaml(
            "scheduler_config:",
            "  short_request_first_config:",
            "    enabled: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\n",
        ),
        put=_off(f"{_S}short_request_first_config.enabled"),
    ),
    _pair(
        "dyntra-elsewhere",
        ERROR,
        (f"{_S}dyntra_lb_config.enabled", _ROLE, "data_parallel_size"),
        when=lambda s: (
            s[f"{_S}dyntra_lb_config.enabled"] and (s[_ROLE] != "kv_consumer" or _at_most_one(s["data_parallel_size"]))
        ),
        says="dyntra_lb_config balances a kv_consumer with data_parallel_size above 1",
        source=f"{_PLATFORM}:879",
        what="DyntraLB where nothing is to be balanced",
        example=_yaml("scheduler_config:", "  dyntra_lb_config:", "    enabled: true"),
        put=_off(f"{_S}dyntra_lb_config.enabled"),
    ),
    _pair(
        "dyntra-and-chunks",
        ERROR,
        (f"{_S}dyntra_lb_config.enabled", f"{_S}profiling_chunk_config.enabled", _ROLE, "data_parallel_size"),
        when=lambda s: (
            s[f"{_S}dyntra_lb_config.enabled"]
            and s[f"{_S}profiling_chunk_config.enabled"]
            and s[_ROLE] == "kv_consumer"
            and _more(s["data_parallel_size"], 1)
        ),
        says="dyntra_lb_config and profiling_chunk_config exclude each other",
        source=f"{_PLATFORM}:893",
        what="DyntraLB beside profiled chunks",
        example=_yaml(
            "scheduler_config:",
            "  dyntra_lb_config:",
            "    enabled: true",
            "  profiling_chunk_config:",
            "    enabled: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\ndata_parallel_size: 2\npipeline_parallel_size: 2\n",
        ),
        put=_off(f"{_S}profiling_chunk_config.enabled"),
    ),
    _pair(
        "recompute-on-prefill",
        WARNING,
        (f"{_S}recompute_scheduler_enable", _ROLE),
        when=lambda s: s[f"{_S}recompute_scheduler_enable"] and s[_ROLE] == "kv_producer",
        says="recompute_scheduler_enable is turned off on a kv_producer",
        source=f"{_PLATFORM}:900",
        what="the recompute scheduler on a prefill instance",
        example=_yaml(
            "scheduler_config:",
            "  recompute_scheduler_enable: true",
            before="kv_transfer_config:\n  kv_role: kv_producer\n",
        ),
        put=_off(f"{_S}recompute_scheduler_enable"),
    ),
    _pair(
        "recompute-elsewhere",
        ERROR,
        (f"{_S}recompute_scheduler_enable", _ROLE),
        when=lambda s: s[f"{_S}recompute_scheduler_enable"] and s[_ROLE] not in ("kv_producer", "kv_consumer"),
        says="recompute_scheduler_enable is for a kv_consumer",
        source=f"{_PLATFORM}:914",
        what="the recompute scheduler without disaggregation",
        example=_yaml("scheduler_config:", "  recompute_scheduler_enable: true"),
        put=_off(f"{_S}recompute_scheduler_enable"),
    ),
)

_OPERATORS = (
    _pair(
        "fused-mc2-and-streams",
        WARNING,
        (f"{_A}multistream_overlap_shared_expert", f"{_A}enable_fused_mc2"),
        when=lambda s: s[f"{_A}multistream_overlap_shared_expert"] and s[f"{_A}enable_fused_mc2"] == 1,
        says="multistream_overlap_shared_expert is turned off by enable_fused_mc2",
        source=f"{_CONFIG}:177",
        what="overlap of the shared expert beside fused MC2",
        example=_yaml("multistream_overlap_shared_expert: true", "enable_fused_mc2: 1"),
        put=_off(f"{_A}multistream_overlap_shared_expert"),
    ),
    _pair(
        "fused-mc2-and-hierarchy",
        ERROR,
        (f"{_A}enable_mc2_hierarchy_comm", f"{_A}enable_fused_mc2"),
        when=lambda s: s[f"{_A}enable_mc2_hierarchy_comm"] and s[f"{_A}enable_fused_mc2"] == 1,
        says="enable_mc2_hierarchy_comm and enable_fused_mc2 exclude each other",
        source=f"{_PLATFORM}:808",
        what="hierarchical communication beside fused MC2",
        example=_yaml("enable_mc2_hierarchy_comm: true", "enable_fused_mc2: 1"),
        put={f"{_A}enable_fused_mc2": 0},
    ),
    _pair(
        "static-kernel-alone",
        ERROR,
        (f"{_A}ascend_compilation_config.enable_static_kernel", f"{_A}ascend_compilation_config.enable_npugraph_ex"),
        when=lambda s: (
            s[f"{_A}ascend_compilation_config.enable_static_kernel"]
            and not s[f"{_A}ascend_compilation_config.enable_npugraph_ex"]
        ),
        says="enable_static_kernel needs enable_npugraph_ex",
        source=f"{_CONFIG}:772",
        what="static kernels without npugraph_ex",
        example=_yaml("ascend_compilation_config:", "  enable_static_kernel: true", "  enable_npugraph_ex: false"),
        put={f"{_A}ascend_compilation_config.enable_npugraph_ex": True},
    ),
    _pair(
        "shared-expert-dp-idle",
        WARNING,
        (f"{_A}enable_shared_expert_dp", "enable_expert_parallel", "tensor_parallel_size"),
        when=lambda s: (
            s[f"{_A}enable_shared_expert_dp"]
            and not (s["enable_expert_parallel"] and _more(s["tensor_parallel_size"], 1))
        ),
        says="enable_shared_expert_dp does nothing without enable_expert_parallel and tensor_parallel_size above 1",
        source=f"{_CONFIG}:114",
        what="data parallelism of the shared expert without what it needs",
        example=_yaml("enable_shared_expert_dp: true"),
        removed=(f"{_A}enable_shared_expert_dp",),
    ),
    _pair(
        "c8-writes-idle",
        WARNING,
        (f"{_A}c8_enable_reshape_optim", f"{_A}enable_sparse_li_c8"),
        when=lambda s: s[f"{_A}c8_enable_reshape_optim"] and not s[f"{_A}enable_sparse_li_c8"],
        says="c8_enable_reshape_optim does nothing without enable_sparse_li_c8",
        source=f"{_CONFIG}:264",
        what="faster writes to a cache that is not there",
        example=_yaml("c8_enable_reshape_optim: true"),
        removed=(f"{_A}c8_enable_reshape_optim",),
    ),
    _pair(
        "kv-nz-elsewhere",
        ERROR,
        (f"{_A}enable_kv_nz", _ROLE),
        when=lambda s: s[f"{_A}enable_kv_nz"] and s[_ROLE] not in ("kv_consumer", "kv_both"),
        says="enable_kv_nz is for a kv_consumer",
        source=f"{_CONFIG}:257",
        what="the NZ layout of KV outside of decode instances",
        example=_yaml("enable_kv_nz: true"),
        put=_off(f"{_A}enable_kv_nz"),
    ),
    _pair(
        "mixed-placement",
        ERROR,
        (f"{_A}mix_placement", f"{_A}multistream_overlap_shared_expert", f"{_A}enable_fused_mc2"),
        when=lambda s: (
            s[f"{_A}mix_placement"] and s[f"{_A}multistream_overlap_shared_expert"] and s[f"{_A}enable_fused_mc2"] != 1
        ),
        says="mix_placement and multistream_overlap_shared_expert exclude each other",
        source=f"{_CONFIG}:449",
        what="mixed placement beside overlap of the shared expert",
        example=_yaml("mix_placement: true", "multistream_overlap_shared_expert: true"),
        put=_off(f"{_A}multistream_overlap_shared_expert"),
    ),
    _pair(
        "two-dumps",
        ERROR,
        (f"{_A}dump_config_path", f"{_A}dump_config"),
        when=lambda s: s.says(f"{_A}dump_config_path") and s.says(f"{_A}dump_config"),
        says="dump_config_path and dump_config exclude each other",
        source=f"{_CONFIG}:466",
        what="two configurations of the dump",
        example=_yaml("dump_config_path: /etc/dump.json", "dump_config:", "  task: statistics"),
        removed=(f"{_A}dump_config_path",),
    ),
    _pair(
        "reduced-sampling-and-head",
        ERROR,
        (f"{_A}enable_reduce_sample", f"{_F}lmhead_tensor_parallel_size"),
        when=lambda s: s[f"{_A}enable_reduce_sample"] and s[f"{_F}lmhead_tensor_parallel_size"] > 0,
        says="enable_reduce_sample and lmhead_tensor_parallel_size exclude each other",
        source=f"{_CONFIG}:301",
        what="reduced sampling beside a divided head",
        example=_yaml("enable_reduce_sample: true", "finegrained_tp_config:", "  lmhead_tensor_parallel_size: 1"),
        put=_off(f"{_A}enable_reduce_sample"),
    ),
    _pair(
        "reduced-sampling-on-prefill",
        ERROR,
        (f"{_A}enable_reduce_sample", _ROLE),
        when=lambda s: s[f"{_A}enable_reduce_sample"] and s[_ROLE] == "kv_producer",
        says="enable_reduce_sample is not for a kv_producer",
        source=f"{_CONFIG}:309",
        what="reduced sampling on a prefill instance",
        example=_yaml("enable_reduce_sample: true", before="kv_transfer_config:\n  kv_role: kv_producer\n"),
        put=_off(f"{_A}enable_reduce_sample"),
    ),
    _pair(
        "fine-tp-does-not-divide",
        ERROR,
        (*(f"{_F}{part}_tensor_parallel_size" for part in ("lmhead", "mlp")), "data_parallel_size"),
        when=lambda s: any(
            size > 0 and (s["data_parallel_size"] or 1) % size
            for size in (s[f"{_F}{part}_tensor_parallel_size"] for part in ("lmhead", "mlp"))
        ),
        says="sizes in finegrained_tp_config have to divide data_parallel_size",
        source=f"{_CONFIG}:709",
        what="module parallelism that does not divide data parallelism",
        example=_yaml("finegrained_tp_config:", "  mlp_tensor_parallel_size: 2"),
        put={f"{_F}mlp_tensor_parallel_size": 0, f"{_F}lmhead_tensor_parallel_size": 0},
    ),
    _pair(
        "fine-tp-without-recompute",
        ERROR,
        (f"{_F}oproj_tensor_parallel_size", f"{_F}embedding_tensor_parallel_size", f"{_S}recompute_scheduler_enable"),
        when=lambda s: (
            (s[f"{_F}oproj_tensor_parallel_size"] > 0 or s[f"{_F}embedding_tensor_parallel_size"] > 0)
            and not s[f"{_S}recompute_scheduler_enable"]
        ),
        says="oproj_tensor_parallel_size and embedding_tensor_parallel_size need recompute_scheduler_enable, which "
        "keeps ranks at the same number of tokens",
        source=f"{_CONFIG}:146",
        what="module parallelism whose ranks may differ in tokens",
        example=_yaml("finegrained_tp_config:", "  embedding_tensor_parallel_size: 1"),
        put={f"{_F}oproj_tensor_parallel_size": 0, f"{_F}embedding_tensor_parallel_size": 0},
    ),
    _pair(
        "fine-oproj-tp",
        ERROR,
        (f"{_F}oproj_tensor_parallel_size", "tensor_parallel_size", "enforce_eager", f"{_S}recompute_scheduler_enable"),
        when=lambda s: (
            s[f"{_F}oproj_tensor_parallel_size"] > 0
            and s[f"{_S}recompute_scheduler_enable"]
            and (_more(s["tensor_parallel_size"], 1) or s["enforce_eager"])
        ),
        says="oproj_tensor_parallel_size needs tensor_parallel_size 1, and graphs",
        source=f"{_CONFIG}:663",
        what="a divided output projection beside tensor parallelism, or eagerly",
        example=_yaml(
            "finegrained_tp_config:",
            "  oproj_tensor_parallel_size: 1",
            "scheduler_config:",
            "  recompute_scheduler_enable: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\ntensor_parallel_size: 2\n",
        ),
        put={f"{_F}oproj_tensor_parallel_size": 0},
    ),
    _pair(
        "cleanup-moved",
        ERROR,
        (),
        when=lambda s: s.says(f"{_A}enable_sleep_mode_extra_cleanup"),
        says="enable_sleep_mode_extra_cleanup is rl_config.sleep_mode_extra_cleanup now",
        source=f"{_CONFIG}:38",
        what="an option that was moved to rl_config",
        example=_yaml("enable_sleep_mode_extra_cleanup: true"),
        put=lambda s: {
            f"{_A}rl_config.sleep_mode_extra_cleanup": bool(
                s.config.entries[f"{_A}enable_sleep_mode_extra_cleanup"].value
            )
        },
        removed=(f"{_A}enable_sleep_mode_extra_cleanup",),
    ),
    _pair(
        "flashcomm-is-gone",
        WARNING,
        (),
        when=lambda s: s.says(f"{_A}enable_flashcomm1"),
        says="enable_flashcomm1 is no option any more: sequence parallelism is vLLM's own",
        source=f"{_CONFIG}:44",
        what="an option that was taken out",
        example=_yaml("enable_flashcomm1: true"),
        removed=(f"{_A}enable_flashcomm1",),
    ),
)


def _legacy(settings: Settings) -> Iterator[Found]:
    for key in LEGACY:
        old, new = f"{_A}{key}", f"{_S}{key}"
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
            yield Found(says, (name,), Repair(removed=(name,)), f"{_PLATFORM}:{line}")


_VLLM = (
    Rule(
        id="reset-on-npu",
        kind=Kind.VLLM,
        severity=WARNING,
        what="an argument that does nothing on an NPU",
        source=f"{_PLATFORM}:520",
        finds=_reset,
        example=f"{_BASE}enable_dbo: true",
    ),
    Rule(
        id="moved-to-scheduler",
        kind=Kind.VLLM,
        severity=WARNING,
        what="an option outside of scheduler_config",
        source=f"{_CONFIG}:1226",
        finds=_legacy,
        example=_yaml("short_request_first_config:", "  enabled: true"),
    ),
    _pair(
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
        source="vllm@0.27.1 vllm/config/scheduler.py (SchedulerConfig)",
        what="a step smaller than its sequences",
        example="max_num_seqs: 64\nmax_num_batched_tokens: 32",
        put=lambda s: {"max_num_seqs": s["max_num_batched_tokens"]},
    ),
    _pair(
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
        source="vllm@0.27.1 vllm/config/scheduler.py (SchedulerConfig)",
        what="whole prompts that are longer than a step",
        example=f"{_BASE}enable_chunked_prefill: false\nmax_num_batched_tokens: 2048\nmax_model_len: 8192",
        put={"enable_chunked_prefill": True},
    ),
)

RULES = (*_SCHEDULERS, *_OPERATORS, *_VLLM)
