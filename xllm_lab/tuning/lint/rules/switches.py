"""One rule about many flags: those that only another flag, which is off, would look at."""

from __future__ import annotations

from collections.abc import Iterator

from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Repair, Severity, told_value
from xllm_lab.tuning.lint.rules import Found, Rule, versions_between
from xllm_lab.tuning.lint.settings import Settings

# A switch and what it switches on, as xLLM's sources at 3906f5a91 read them. Each finding gives the flag's own line.
_SWITCHED = {
    "enable_graph": (
        "acl_graph_decode_batch_size_limit",
        "enable_graph_mode_decode_no_padding",
        "disable_graph_warmup",
        "enable_prefill_piecewise_graph",
    ),
    "enable_prefill_piecewise_graph": ("max_tokens_for_graph_mode",),
    "num_speculative_tokens": (
        "draft_model",
        "speculative_algorithm",
        "adaptive_speculative_min_gain",
        "enable_opt_validate_probs",
        "enable_atb_spec_kernel",
    ),
    "use_zero_evict": ("max_decode_token_per_sequence",),
    "enable_flashcomm1": ("flashcomm1_min_prefill_tokens", "enable_mmrs_fusion"),
    "enable_mmrs_fusion": ("mmrs_comm_mode",),
    "enable_eplb": (
        "eplb_update_interval",
        "eplb_update_threshold",
        "eplb_min_peak_load_improvement",
        "eplb_policy_kind",
        "eplb_use_decode_only_load",
        "eplb_prepare_timeout_seconds",
    ),
    "enable_disagg_pd": ("kv_cache_transfer_mode", "kv_cache_transfer_type", "kv_push_dst_rotate", "disagg_pd_port"),
    "enable_pd_ooc": ("enable_forward_interruption",),
    "enable_kvcache_store": (
        "store_protocol",
        "store_master_server_address",
        "store_metadata_server",
        "store_local_hostname",
        "prefetch_timeout",
        "prefetch_batch_size",
    ),
    "enable_shm": ("input_shm_size", "output_shm_size"),
    "enable_rolling_load": ("rolling_load_num_cached_layers", "rolling_load_num_rolling_slots"),
    "enable_online_profile": ("profile_backend", "profile_dir"),
    "enable_verbose_trace_log": (
        "verbose_trace_log_path",
        "verbose_trace_log_max_size_mb",
        "verbose_trace_log_max_files",
    ),
    "enable_dump_config_json": ("dump_config_json_file",),
}


def _idle(settings: Settings) -> Iterator[Found]:
    for switch, flags in _SWITCHED.items():
        if not settings.is_known(switch) or settings[switch]:
            continue
        for name in flags:
            if settings.differs(name):
                says = f"{name}={told_value(settings[name])} does nothing: {switch} is {told_value(settings[switch])}"
                yield Found(says, (name, switch), Repair(removed=(name,)), settings.table[name].source)


SWITCHES = (
    Rule(
        id="switch-is-off",
        kind=Kind.XLLM,
        severity=Severity.WARNING,
        what="a flag that another one, which is off, would look at",
        source="xllm@3906f5a91 xllm/core/framework/config/",
        finds=_idle,
        example="--eplb_policy_kind=greedy",
        versions=versions_between("0.10.0", ""),
    ),
)
