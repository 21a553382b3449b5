"""Rules about the schedulers of vLLM-Ascend: which of them go together, and where they are of use."""

from __future__ import annotations

from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules.ascend_rows import (
    CONFIG,
    PLATFORM,
    ROLE,
    SCHEDULER,
    at_most_one,
    more,
    off,
    pair,
    written,
)

ERROR, WARNING, NOTE = Severity

RULES = (
    pair(
        "profiled-chunks-need-pipeline",
        ERROR,
        (f"{SCHEDULER}profiling_chunk_config.enabled", "pipeline_parallel_size"),
        when=lambda s: s[f"{SCHEDULER}profiling_chunk_config.enabled"] and at_most_one(s["pipeline_parallel_size"]),
        says="profiling_chunk_config needs pipeline_parallel_size above 1",
        source=f"{CONFIG}:93",
        what="profiled chunks without a pipeline",
        example=written("scheduler_config:", "  profiling_chunk_config:", "    enabled: true"),
        put=off(f"{SCHEDULER}profiling_chunk_config.enabled"),
    ),
    pair(
        "profiled-chunks-and-balance",
        ERROR,
        (f"{SCHEDULER}profiling_chunk_config.enabled", f"{SCHEDULER}enable_balance_scheduling"),
        when=lambda s: s[f"{SCHEDULER}profiling_chunk_config.enabled"] and s[f"{SCHEDULER}enable_balance_scheduling"],
        says="profiling_chunk_config and enable_balance_scheduling exclude each other",
        source=f"{CONFIG}:100",
        what="profiled chunks beside balance scheduling",
        example=written(
            "scheduler_config:",
            "  enable_balance_scheduling: true",
            "  profiling_chunk_config:",
            "    enabled: true",
            before="pipeline_parallel_size: 2\n",
        ),
        put=off(f"{SCHEDULER}enable_balance_scheduling"),
    ),
    pair(
        "balance-and-pd",
        ERROR,
        (f"{SCHEDULER}enable_balance_scheduling", ROLE),
        when=lambda s: s[f"{SCHEDULER}enable_balance_scheduling"] and s[ROLE] in ("kv_producer", "kv_consumer"),
        says="enable_balance_scheduling is for instances that do both prefill and decode",
        source=f"{PLATFORM}:827",
        what="balance scheduling on one side of disaggregation",
        example=written(
            "scheduler_config:",
            "  enable_balance_scheduling: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\n",
        ),
        put=off(f"{SCHEDULER}enable_balance_scheduling"),
    ),
    pair(
        "short-first-needs-fcfs",
        ERROR,
        (f"{SCHEDULER}short_request_first_config.enabled", "scheduling_policy"),
        when=lambda s: (
            s[f"{SCHEDULER}short_request_first_config.enabled"] and s["scheduling_policy"] not in (None, "fcfs")
        ),
        says="short_request_first_config needs scheduling_policy fcfs",
        source=f"{PLATFORM}:841",
        what="short requests first under another policy",
        example=written(
            "scheduler_config:",
            "  short_request_first_config:",
            "    enabled: true",
            before="scheduling_policy: priority\n",
        ),
        put=off(f"{SCHEDULER}short_request_first_config.enabled"),
    ),
    *(
        pair(
            f"short-first-and-{short}",
            ERROR,
            (f"{SCHEDULER}short_request_first_config.enabled", f"{SCHEDULER}{other}.enabled"),
            when=lambda s, other=other: (
                s[f"{SCHEDULER}short_request_first_config.enabled"] and s[f"{SCHEDULER}{other}.enabled"]
            ),
            says=f"short_request_first_config and {other} exclude each other",
            source=f"{PLATFORM}:{line}",
            what=f"short requests first beside {other}",
            example=written(
                "scheduler_config:",
                "  short_request_first_config:",
                "    enabled: true",
                f"  {other}:",
                "    enabled: true",
                before="pipeline_parallel_size: 2\n",
            ),
            put=off(f"{SCHEDULER}short_request_first_config.enabled"),
        )
        for short, other, line in (
            ("batch-jobs", "batch_job_sched_config", 846),
            ("chunks", "profiling_chunk_config", 851),
        )
    ),
    pair(
        "short-first-on-decode",
        ERROR,
        (f"{SCHEDULER}short_request_first_config.enabled", ROLE),
        when=lambda s: s[f"{SCHEDULER}short_request_first_config.enabled"] and s[ROLE] == "kv_consumer",
        says="short_request_first_config orders prompts, which a kv_consumer has none of",
        source=f"{PLATFORM}:856",
        what="short requests first on a decode instance",
        example=written(
            "scheduler_config:",
            "  short_request_first_config:",
            "    enabled: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\n",
        ),
        put=off(f"{SCHEDULER}short_request_first_config.enabled"),
    ),
    pair(
        "dyntra-elsewhere",
        ERROR,
        (f"{SCHEDULER}dyntra_lb_config.enabled", ROLE, "data_parallel_size"),
        when=lambda s: (
            s[f"{SCHEDULER}dyntra_lb_config.enabled"]
            and (s[ROLE] != "kv_consumer" or at_most_one(s["data_parallel_size"]))
        ),
        says="dyntra_lb_config balances a kv_consumer with data_parallel_size above 1",
        source=f"{PLATFORM}:879",
        what="DyntraLB where nothing is to be balanced",
        example=written("scheduler_config:", "  dyntra_lb_config:", "    enabled: true"),
        put=off(f"{SCHEDULER}dyntra_lb_config.enabled"),
    ),
    pair(
        "dyntra-and-chunks",
        ERROR,
        (
            f"{SCHEDULER}dyntra_lb_config.enabled",
            f"{SCHEDULER}profiling_chunk_config.enabled",
            ROLE,
            "data_parallel_size",
        ),
        when=lambda s: (
            s[f"{SCHEDULER}dyntra_lb_config.enabled"]
            and s[f"{SCHEDULER}profiling_chunk_config.enabled"]
            and s[ROLE] == "kv_consumer"
            and more(s["data_parallel_size"], 1)
        ),
        says="dyntra_lb_config and profiling_chunk_config exclude each other",
        source=f"{PLATFORM}:893",
        what="DyntraLB beside profiled chunks",
        example=written(
            "scheduler_config:",
            "  dyntra_lb_config:",
            "    enabled: true",
            "  profiling_chunk_config:",
            "    enabled: true",
            before="kv_transfer_config:\n  kv_role: kv_consumer\ndata_parallel_size: 2\npipeline_parallel_size: 2\n",
        ),
        put=off(f"{SCHEDULER}profiling_chunk_config.enabled"),
    ),
    pair(
        "recompute-on-prefill",
        WARNING,
        (f"{SCHEDULER}recompute_scheduler_enable", ROLE),
        when=lambda s: s[f"{SCHEDULER}recompute_scheduler_enable"] and s[ROLE] == "kv_producer",
        says="recompute_scheduler_enable is turned off on a kv_producer",
        source=f"{PLATFORM}:900",
        what="the recompute scheduler on a prefill instance",
        example=written(
            "scheduler_config:",
            "  recompute_scheduler_enable: true",
            before="kv_transfer_config:\n  kv_role: kv_producer\n",
        ),
        put=off(f"{SCHEDULER}recompute_scheduler_enable"),
    ),
    pair(
        "recompute-elsewhere",
        ERROR,
        (f"{SCHEDULER}recompute_scheduler_enable", ROLE),
        when=lambda s: s[f"{SCHEDULER}recompute_scheduler_enable"] and s[ROLE] not in ("kv_producer", "kv_consumer"),
        says="recompute_scheduler_enable is for a kv_consumer",
        source=f"{PLATFORM}:914",
        what="the recompute scheduler without disaggregation",
        example=written("scheduler_config:", "  recompute_scheduler_enable: true"),
        put=off(f"{SCHEDULER}recompute_scheduler_enable"),
    ),
)
