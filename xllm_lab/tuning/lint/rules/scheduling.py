"""Rules about xLLM's scheduler: what is mixed, planned ahead, cut into chunks, or weighed by time.

Lines are of 3906f5a91 unless they say otherwise.
"""

from __future__ import annotations

from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import conflict, drafts_on, says_on

ERROR, WARNING, NOTE = Severity
_XLLM = "xllm@3906f5a91 xllm/"
_MODE = f"{_XLLM}core/scheduler/continuous_scheduler.cpp"
_PROFILE = f"{_XLLM}core/scheduler/profile/profile_manager.cpp"
_S1, _S2 = "87e8d6ed6", "3906f5a91"


RULES = (
    conflict(
        "overlap-breaks-graph-warmup",
        ERROR,
        ("enable_schedule_overlap", "enable_graph"),
        when=lambda s: s["enable_schedule_overlap"] and s["enable_graph"],
        says="enable_schedule_overlap and enable_graph together crash while graphs are warmed up: the requests of "
        "the warm-up are made without overlap, which #774 began to check. It was so from 570925079 "
        "(2026-01-23) until #787 (3d90dc121, 2026-01-26) and in no release: take a later build and keep "
        "both, or turn one off until then",
        source="https://github.com/xLLM-AI/xllm/issues/786; xllm@570925079 "
        "xllm/core/framework/request/sequence.cpp:250",
        what="schedule overlap and graphs, in the builds where they crash together",
        example="--enable_schedule_overlap=true\n--enable_graph=true",
        put={"enable_schedule_overlap": False},
        since="570925079",
        until="570925079",
    ),
    conflict(
        "drafts-break-overlap",
        ERROR,
        ("enable_schedule_overlap", "num_speculative_tokens"),
        when=lambda s: s["enable_schedule_overlap"] and drafts_on(s),
        says="num_speculative_tokens={num_speculative_tokens} with enable_schedule_overlap overflows the KV of a "
        "sequence in xLLM {last}: results of a step arrive after the next one was planned, for sequences "
        "that may hold no blocks by then. #792 and #918 are in 0.9.0, the fake tokens of MTP (#1679) and its "
        "data parallelism (#1792) in 0.10.0: upgrade to that, or plan without overlap until then",
        source="https://github.com/xLLM-AI/xllm/issues/1126; xllm@3011eb4c7 "
        "xllm/core/framework/request/sequence_kv_state.cpp:48",
        what="drafts and schedule overlap, in the versions where they overflow the KV",
        example="--enable_schedule_overlap=true\n--num_speculative_tokens=1\n--draft_model=/models/mtp",
        put={"enable_schedule_overlap": False},
        until="0.9.1",
    ),
    conflict(
        "overlap-doubles-drafts",
        NOTE,
        ("enable_schedule_overlap", "num_speculative_tokens"),
        when=lambda s: s["enable_schedule_overlap"] and drafts_on(s),
        says="with enable_schedule_overlap each decode reserves twice its "
        "num_speculative_tokens={num_speculative_tokens}, in max_tokens_per_batch and in KV, as the step "
        "before is not known yet",
        source=f"{_XLLM}core/scheduler/scheduler_policy.cpp:456",
        what="drafts reserve twice their tokens with schedule overlap",
        example="--enable_schedule_overlap=true\n--num_speculative_tokens=1\n--draft_model=/models/mtp",
        since="0.10.0",
    ),
    conflict(
        "drafts-do-not-mix",
        WARNING,
        ("enable_mix_batch", "num_speculative_tokens"),
        when=lambda s: says_on(s, "enable_mix_batch") and drafts_on(s),
        says="enable_mix_batch is turned off by num_speculative_tokens={num_speculative_tokens}: prompts wait for "
        "a step without decodes",
        source=f"{_MODE}:78",
        what="mixed batches asked for beside drafts",
        example="--enable_mix_batch=true\n--num_speculative_tokens=2\n--draft_model=/models/mtp",
        put={"enable_mix_batch": False},
        since=_S2,
    ),
    conflict(
        "context-parallel-does-not-mix",
        WARNING,
        ("enable_mix_batch", "cp_size"),
        when=lambda s: says_on(s, "enable_mix_batch") and s["cp_size"] > 1,
        says="enable_mix_batch is turned off by cp_size={cp_size}",
        source=f"{_MODE}:78",
        what="mixed batches asked for beside context parallelism",
        example="--enable_mix_batch=true\n--cp_size=2\n--nnodes=2",
        put={"enable_mix_batch": False},
        since=_S2,
    ),
    conflict(
        "whole-prompts-do-not-mix",
        WARNING,
        ("enable_mix_batch", "enable_chunked_prefill", "priority_strategy"),
        when=lambda s: (
            says_on(s, "enable_mix_batch")
            and not s["enable_chunked_prefill"]
            and s["priority_strategy"] != "multi_slo_and_prio"
        ),
        says="enable_mix_batch is turned off by enable_chunked_prefill=false",
        source=f"{_MODE}:83",
        what="mixed batches asked for without chunked prefill",
        example="--enable_mix_batch=true\n--enable_chunked_prefill=false",
        put={"enable_mix_batch": False},
        since=_S2,
    ),
    conflict(
        "slo-chunks-anyway",
        WARNING,
        ("enable_chunked_prefill", "priority_strategy"),
        when=lambda s: not s["enable_chunked_prefill"] and s["priority_strategy"] == "multi_slo_and_prio",
        says="enable_chunked_prefill=false is turned on by priority_strategy=multi_slo_and_prio",
        source=f"{_MODE}:73",
        what="whole prompts asked for beside the multi-SLO strategy",
        example="--priority_strategy=multi_slo_and_prio\n--enable_chunked_prefill=false",
        put={"enable_chunked_prefill": True},
        since=_S2,
    ),
    conflict(
        "whole-prompts",
        NOTE,
        ("enable_chunked_prefill", "priority_strategy"),
        when=lambda s: (
            s.says("enable_chunked_prefill")
            and not s["enable_chunked_prefill"]
            and s["priority_strategy"] != "multi_slo_and_prio"
        ),
        says="enable_chunked_prefill=false: every decode waits while a prompt is computed; xLLM's documentation "
        "gives 46 % less TTFT with chunks (Qwen3-8B, TPOT of 50 ms), and they are the default",
        source="xllm@87e8d6ed6 docs/en/features/chunked_scheduler.md",
        what="chunked prefill turned off",
        example="--enable_chunked_prefill=false",
    ),
    conflict(
        "no-overlap",
        NOTE,
        ("enable_schedule_overlap", "num_speculative_tokens", "instance_role"),
        when=lambda s: (
            s.says("enable_schedule_overlap")
            and not s["enable_schedule_overlap"]
            and not drafts_on(s)
            and s["instance_role"] != "PREFILL"
        ),
        says="enable_schedule_overlap=false: the device waits while the host plans; xLLM's documentation gives 17 % "
        "throughput for it (a 1.5B model, TPOT of 50 ms), less for larger ones, and answers of a few tokens lose",
        source="xllm@87e8d6ed6 docs/en/features/async_schedule.md",
        what="schedule overlap turned off",
        example="--enable_schedule_overlap=false",
    ),
    conflict(
        "chunk-above-batch",
        NOTE,
        ("max_tokens_per_chunk_for_prefill", "max_tokens_per_batch"),
        when=lambda s: s["max_tokens_per_chunk_for_prefill"] > s["max_tokens_per_batch"],
        says="max_tokens_per_chunk_for_prefill={max_tokens_per_chunk_for_prefill} never binds: a step has "
        "max_tokens_per_batch={max_tokens_per_batch}",
        source=f"{_XLLM}xllm.cpp:478",
        what="a chunk larger than the step",
        example="--max_tokens_per_chunk_for_prefill=4096\n--max_tokens_per_batch=2048",
        put=lambda s: {"max_tokens_per_chunk_for_prefill": s["max_tokens_per_batch"]},
    ),
    conflict(
        "zero-evict-is-dead",
        WARNING,
        ("use_zero_evict",),
        when=lambda s: s["use_zero_evict"],
        says="use_zero_evict changes nothing: nobody calls the check of its scheduler",
        source=f"{_XLLM}core/scheduler/zero_eviction_scheduler.cpp:347",
        what="the zero-evict scheduler",
        example="--use_zero_evict=true",
        removed=("use_zero_evict", "max_decode_token_per_sequence"),
        since=_S1,
    ),
    conflict(
        "latency-without-times",
        WARNING,
        ("enable_latency_aware_schedule", "enable_profile_step_time"),
        when=lambda s: s["enable_latency_aware_schedule"] and not s["enable_profile_step_time"],
        says="enable_latency_aware_schedule admits by step times that nobody measured: enable_profile_step_time "
        "is off, so each is predicted as 0",
        source=f"{_PROFILE}:98",
        what="latency-aware admission without measured step times",
        example="--enable_latency_aware_schedule=true",
        put={"enable_profile_step_time": True},
        since="0.9.0",
    ),
    conflict(
        "h2d-limit-unused",
        WARNING,
        ("enable_control_h2d_block_num", "enable_latency_aware_schedule", "priority_strategy"),
        when=lambda s: (
            s["enable_control_h2d_block_num"]
            and not (s["enable_latency_aware_schedule"] and s["priority_strategy"] == "multi_slo_and_prio")
        ),
        says="enable_control_h2d_block_num is looked at by priority_strategy=multi_slo_and_prio with "
        "enable_latency_aware_schedule alone",
        source=f"{_XLLM}core/scheduler/unified_policy.cpp:95",
        what="a limit of copies that the scheduler in use never asks for",
        example="--enable_control_h2d_block_num=true",
        removed=("enable_control_h2d_block_num",),
        since=_S2,
    ),
    conflict(
        "ooc-without-pd",
        WARNING,
        ("enable_pd_ooc", "enable_disagg_pd"),
        when=lambda s: s["enable_pd_ooc"] and not s["enable_disagg_pd"],
        says="enable_pd_ooc does nothing without enable_disagg_pd",
        source=f"{_XLLM}core/scheduler/scheduler_factory.cpp:32",
        what="online-offline co-location without disaggregation",
        example="--enable_pd_ooc=true",
        removed=("enable_pd_ooc",),
        since="0.9.0",
    ),
)
