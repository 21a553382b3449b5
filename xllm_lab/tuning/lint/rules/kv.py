"""Rules about where xLLM keeps KV and weights, and in what form. Lines are of 3906f5a91 unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable

from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import conflict, says_on
from xllm_lab.tuning.lint.settings import Platform, Settings

ERROR, WARNING, NOTE = Severity
_XLLM = "xllm@3906f5a91 xllm/"
_ENGINE = f"{_XLLM}core/distributed_runtime/llm_engine.cpp"
_HOST = f"{_XLLM}core/framework/kv_cache/kv_cache_utils.cpp"
_S1, _S2 = "87e8d6ed6", "3906f5a91"
_NOT_NPU = tuple(platform for platform in Platform if platform is not Platform.NPU)


def _is_on(name: str) -> Callable[[Settings], bool]:
    return lambda s: bool(s[name])


RULES = (
    conflict(
        "xtensor-shares-nothing",
        WARNING,
        ("enable_prefix_cache", "enable_xtensor"),
        when=lambda s: says_on(s, "enable_prefix_cache") and s["enable_xtensor"],
        says="enable_prefix_cache is turned off by enable_xtensor",
        source=f"{_ENGINE}:638",
        what="a prefix cache beside xTensor",
        example="--enable_xtensor=true\n--enable_prefix_cache=true",
        put={"enable_prefix_cache": False},
        since=_S2,
        platforms=(Platform.NPU,),
    ),
    conflict(
        "loader-is-needed",
        WARNING,
        ("enable_manual_loader", "enable_xtensor", "enable_rolling_load"),
        when=lambda s: (
            s.says("enable_manual_loader")
            and not s["enable_manual_loader"]
            and (s["enable_xtensor"] or s["enable_rolling_load"])
        ),
        says="enable_manual_loader=false is turned on by enable_xtensor or enable_rolling_load",
        source=f"{_XLLM}xllm.cpp:396",
        what="the manual loader turned off beside what needs it",
        example="--enable_xtensor=true\n--enable_manual_loader=false",
        put={"enable_manual_loader": True},
        since="0.9.0",
        platforms=(Platform.NPU,),
    ),
    conflict(
        "rolling-slots",
        ERROR,
        ("rolling_load_num_rolling_slots", "rolling_load_num_cached_layers", "enable_rolling_load"),
        when=lambda s: (
            s["enable_rolling_load"] and s["rolling_load_num_rolling_slots"] > s["rolling_load_num_cached_layers"]
        ),
        says="rolling_load_num_rolling_slots={rolling_load_num_rolling_slots} is more than "
        "rolling_load_num_cached_layers={rolling_load_num_cached_layers}, which ends the program",
        source=f"{_XLLM}xllm.cpp:412",
        what="more rolling slots than cached layers",
        example="--enable_rolling_load=true\n--rolling_load_num_rolling_slots=4",
        put=lambda s: {"rolling_load_num_rolling_slots": s["rolling_load_num_cached_layers"]},
        since="0.9.0",
        platforms=(Platform.NPU,),
    ),
    *(
        conflict(
            f"{short}-elsewhere",
            ERROR,
            (name,),
            when=_is_on(name),
            says=f"{name} ends the program on anything but an NPU",
            source=f"{_XLLM}xllm.cpp:{line}",
            what=f"{name} on another platform",
            example=f"--{name}=true",
            situation={"platform": "MLU"},
            removed=(name,),
            since="0.9.0",
            platforms=_NOT_NPU,
        )
        for short, name, line in (
            ("xtensor", "enable_xtensor", 417),
            ("manual-loader", "enable_manual_loader", 420),
            ("rolling-load", "enable_rolling_load", 423),
        )
    ),
    conflict(
        "mlu-block-size",
        ERROR,
        ("block_size",),
        when=lambda s: s.says("block_size") and s["block_size"] not in (1, 16),
        says="block_size={block_size} ends the program on an MLU; 16 is accepted",
        source=f"{_XLLM}xllm.cpp:359",
        what="blocks that an MLU does not have",
        example="--block_size=128",
        situation={"platform": "MLU"},
        put={"block_size": 16},
        since="0.9.0",
        platforms=(Platform.MLU,),
    ),
    conflict(
        "kv-int8-elsewhere",
        WARNING,
        ("kv_cache_dtype",),
        when=lambda s: s["kv_cache_dtype"] == "int8",
        says="kv_cache_dtype=int8 is for MLUs only",
        source=f"{_XLLM}core/framework/config/kv_cache_config.cpp:37",
        what="int8 KV on another platform",
        example="--kv_cache_dtype=int8",
        put={"kv_cache_dtype": "auto"},
        since="0.9.0",
        platforms=tuple(platform for platform in Platform if platform is not Platform.MLU),
    ),
    conflict(
        "host-tier-is-off",
        ERROR,
        ("host_blocks_factor", "enable_kvcache_store"),
        when=lambda s: s["host_blocks_factor"] > 1 or s["enable_kvcache_store"],
        says="host_blocks_factor={host_blocks_factor} and enable_kvcache_store={enable_kvcache_store} end the program "
        "at {last}: the host tier was taken out, and came back in August 2026",
        source="xllm@87e8d6ed6 xllm/core/distributed_runtime/llm_engine.cpp:563",
        what="KV on the host where it was taken out",
        example="--host_blocks_factor=2.0",
        put={"host_blocks_factor": 0.0, "enable_kvcache_store": False},
        since=_S1,
        until=_S1,
    ),
    conflict(
        "store-needs-prefixes",
        ERROR,
        ("enable_kvcache_store", "enable_prefix_cache"),
        when=lambda s: s["enable_kvcache_store"] and not s["enable_prefix_cache"],
        says="enable_kvcache_store without enable_prefix_cache ends the program",
        source=f"{_XLLM}xllm.cpp:119",
        what="a KV store without a prefix cache",
        example="--enable_kvcache_store=true\n--host_blocks_factor=0\n--enable_prefix_cache=false",
        put={"enable_prefix_cache": True, "host_blocks_factor": 2.0},
        since=_S2,
    ),
    conflict(
        "store-needs-host",
        ERROR,
        ("enable_kvcache_store", "host_blocks_factor", "enable_prefix_cache"),
        when=lambda s: s["enable_kvcache_store"] and s["enable_prefix_cache"] and s["host_blocks_factor"] <= 1,
        says="enable_kvcache_store with host_blocks_factor={host_blocks_factor} ends the program; more than 1 is "
        "needed, as blocks come and go through the host",
        source=f"{_XLLM}xllm.cpp:121",
        what="a KV store without blocks on the host",
        example="--enable_kvcache_store=true",
        put={"host_blocks_factor": 2.0},
        since=_S2,
    ),
    conflict(
        "host-tier-needs-prefixes",
        ERROR,
        ("host_blocks_factor", "enable_prefix_cache"),
        when=lambda s: s["host_blocks_factor"] > 1 and not s["enable_prefix_cache"],
        says="host_blocks_factor={host_blocks_factor} without enable_prefix_cache ends the program",
        source=f"{_HOST}:534",
        what="KV on the host without a prefix cache",
        example="--host_blocks_factor=2.0\n--enable_prefix_cache=false",
        put={"enable_prefix_cache": True},
        since=_S2,
    ),
    conflict(
        "host-tier-and-ooc",
        ERROR,
        ("host_blocks_factor", "enable_pd_ooc", "enable_disagg_pd"),
        when=lambda s: s["host_blocks_factor"] > 1 and s["enable_pd_ooc"] and s["enable_disagg_pd"],
        says="host_blocks_factor={host_blocks_factor} beside enable_pd_ooc ends the program",
        source=f"{_HOST}:539",
        what="KV on the host beside online-offline co-location",
        example='{"host_blocks_factor": 2.0, "enable_pd_ooc": true, "enable_disagg_pd": true}',
        put={"host_blocks_factor": 0.0},
        since=_S2,
    ),
    conflict(
        "host-tier-kv-dtype",
        ERROR,
        ("host_blocks_factor", "kv_cache_dtype"),
        when=lambda s: s["host_blocks_factor"] > 1 and s["kv_cache_dtype"] not in ("auto", "int8"),
        says="host_blocks_factor={host_blocks_factor} with kv_cache_dtype={kv_cache_dtype} ends the program: scales "
        "are not copied",
        source=f"{_HOST}:551",
        what="quantised KV on the host",
        example="--host_blocks_factor=2.0\n--kv_cache_dtype=fp8_e4m3",
        put={"host_blocks_factor": 0.0},
        since=_S2,
    ),
    conflict(
        "host-factor-too-small",
        WARNING,
        ("host_blocks_factor", "enable_kvcache_store"),
        when=lambda s: 0 < s["host_blocks_factor"] <= 1 and not s["enable_kvcache_store"],
        says="host_blocks_factor={host_blocks_factor} does nothing; more than 1 turns blocks on the host on",
        source=f"{_HOST}:513",
        what="a host tier too small to be turned on",
        example="--host_blocks_factor=0.5",
        removed=("host_blocks_factor",),
        since=_S2,
    ),
)
