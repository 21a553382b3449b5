"""Rules about xLLM's parallel groups, and about prefill and decode on separate instances.

Lines are of 3906f5a91 unless they say otherwise.
"""

from __future__ import annotations

from xllm_lab.tuning.lint.configuration import Form
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import conflict
from xllm_lab.tuning.lint.settings import Platform

ERROR, WARNING, NOTE = Severity
_XLLM = "xllm@3906f5a91 xllm/"
_MASTER = f"{_XLLM}core/distributed_runtime/master.cpp"
_S1, _S2 = "87e8d6ed6", "3906f5a91"
_FLAGS = (Form.FLAGFILE, Form.COMMAND)


_PARALLEL = (
    conflict(
        "rank-table-backend",
        ERROR,
        ("rank_tablefile", "communication_backend"),
        when=lambda s: s["rank_tablefile"] and s.differs("communication_backend"),
        says="rank_tablefile with communication_backend={communication_backend} ends the program",
        source=f"{_MASTER}:332",
        what="a rank table without HCCL",
        example="--rank_tablefile=/etc/ranks.json\n--communication_backend=lccl",
        removed=("communication_backend",),
        since=_S2,
        platforms=(Platform.NPU,),
    ),
    conflict(
        "data-parallel-backend",
        WARNING,
        ("communication_backend", "dp_size"),
        when=lambda s: s.differs("communication_backend") and s["dp_size"] > 1,
        says="communication_backend={communication_backend} with dp_size={dp_size}: data parallelism wants HCCL",
        source=f"{_XLLM}core/framework/config/parallel_config.cpp:63",
        what="data parallelism without HCCL",
        example="--communication_backend=lccl\n--dp_size=2\n--nnodes=2",
        removed=("communication_backend",),
        platforms=(Platform.NPU,),
    ),
    conflict(
        "experts-do-not-divide",
        ERROR,
        ("ep_size", "nnodes", "enable_eplb"),
        when=lambda s: s["nnodes"] % s["ep_size"] and not s["enable_eplb"],
        says="ep_size={ep_size} does not divide nnodes={nnodes}, which ends the program",
        source=f"{_XLLM}core/framework/parallel_state/collective_communicator.cpp:542",
        what="expert parallelism that does not divide the workers",
        example="--ep_size=3\n--nnodes=4",
        put=lambda s: {"ep_size": s["nnodes"]},
        since=_S1,
    ),
    conflict(
        "eplb-everywhere",
        ERROR,
        ("ep_size", "nnodes", "enable_eplb"),
        when=lambda s: s["enable_eplb"] and s["ep_size"] != s["nnodes"],
        says="enable_eplb with ep_size={ep_size} on {nnodes} workers ends the program: experts have to be spread over "
        "all",
        source=f"{_XLLM}core/framework/eplb/eplb_utils.h:32",
        what="expert balancing over some of the workers",
        example="--enable_eplb=true\n--ep_size=2\n--nnodes=4",
        put=lambda s: {"ep_size": s["nnodes"]},
        since=_S2,
    ),
    conflict(
        "context-parallel-divides",
        ERROR,
        ("cp_size", "dp_size", "nnodes"),
        when=lambda s: s["cp_size"] > 1 and s["nnodes"] % (s["dp_size"] * s["cp_size"]),
        says="nnodes={nnodes} is no multiple of dp_size={dp_size} times cp_size={cp_size}, which ends the program",
        source=f"{_MASTER}:264",
        what="context parallelism that does not divide the workers",
        example="--cp_size=4\n--nnodes=2",
        put={"cp_size": 1},
        since=_S2,
        platforms=(Platform.NPU,),
    ),
    conflict(
        "context-parallel-role",
        ERROR,
        ("cp_size", "instance_role", "enable_disagg_pd", "nnodes", "dp_size"),
        when=lambda s: (
            s["cp_size"] > 1
            and s["instance_role"] in ("DECODE", "MIX")
            and not s["nnodes"] % (s["dp_size"] * s["cp_size"])
        ),
        says="cp_size={cp_size} with instance_role={instance_role} ends the program; DEFAULT and PREFILL are accepted",
        source=f"{_MASTER}:201",
        what="context parallelism where there is no prefill",
        example="--cp_size=2\n--nnodes=2\n--enable_disagg_pd=true\n--instance_role=DECODE\n--etcd_addr=127.0.0.1:2379",
        put={"cp_size": 1},
        since=_S2,
        platforms=(Platform.NPU,),
    ),
    conflict(
        "layer-split-alone",
        ERROR,
        ("layerwise_split_size", "host_blocks_factor", "cp_size", "kv_split_size"),
        when=lambda s: (
            s["layerwise_split_size"] > 1
            and (s["host_blocks_factor"] > 1 or s["cp_size"] > 1 or (s["kv_split_size"] or s["cp_size"]) > 1)
        ),
        says="layerwise_split_size={layerwise_split_size} beside host_blocks_factor={host_blocks_factor}, "
        "cp_size={cp_size} or kv_split_size={kv_split_size} ends the program",
        source=f"{_MASTER}:114",
        what="KV split by layers beside other ways to place it",
        example="--layerwise_split_size=2\n--nnodes=2\n--host_blocks_factor=2.0",
        put={"layerwise_split_size": 1},
        since=_S2,
    ),
)


_PD = (
    conflict(
        "role-without-pd",
        WARNING,
        ("instance_role", "enable_disagg_pd"),
        when=lambda s: s.differs("instance_role") and not s["enable_disagg_pd"],
        says="instance_role={instance_role} without enable_disagg_pd: prompts and decodes are not separated, this "
        "instance does both",
        source=f"{_XLLM}core/scheduler/scheduler_factory.cpp:31",
        what="a role without disaggregation",
        example="--instance_role=DECODE",
        forms=_FLAGS,
    ),
    conflict(
        "pd-without-role",
        WARNING,
        ("instance_role", "enable_disagg_pd"),
        when=lambda s: s["enable_disagg_pd"] and s["instance_role"] == "DEFAULT",
        says="enable_disagg_pd with instance_role=DEFAULT is neither side; give PREFILL, DECODE or MIX",
        source=f"{_XLLM}core/common/types.h:129",
        what="disaggregation without a role",
        example="--enable_disagg_pd=true\n--etcd_addr=127.0.0.1:2379",
        forms=_FLAGS,
    ),
    conflict(
        "pd-without-registry",
        ERROR,
        ("etcd_addr", "enable_disagg_pd"),
        when=lambda s: s["enable_disagg_pd"] and not s["etcd_addr"],
        says="enable_disagg_pd without etcd_addr ends the program: instances find each other through etcd and "
        "xllm-service",
        source=f"{_XLLM}core/scheduler/disagg_pd_scheduler.cpp:125",
        what="disaggregation without a registry",
        example="--enable_disagg_pd=true\n--instance_role=DECODE",
        forms=_FLAGS,
    ),
    conflict(
        "pd-is-on",
        NOTE,
        ("enable_disagg_pd", "instance_role", "etcd_addr"),
        when=lambda s: s["enable_disagg_pd"] and s["instance_role"] in ("PREFILL", "DECODE") and s["etcd_addr"],
        says="disaggregation is on, and this instance is the {instance_role} side. The log of a DECODE instance gives "
        "ttft: 0.0ms for every request, as the first token was made elsewhere; take TTFT from xllm-service or the "
        "client. That it works is in its start-up log (instance type, registered to etcd, clusters linked) and in a "
        "PREFILL instance that logs no finished requests. Device IPs (/etc/hccn.conf) are needed for KV between "
        "machines, up to 0.9.1; they are no flag",
        source="https://github.com/xLLM-AI/xllm/issues/376; xllm@0.7.0 docs/en/features/disagg_pd.md:22; #1572",
        what="how to tell that disaggregation works",
        example="--enable_disagg_pd=true\n--instance_role=DECODE\n--etcd_addr=127.0.0.1:2379",
        forms=_FLAGS,
    ),
    conflict(
        "prefill-does-not-overlap",
        WARNING,
        ("enable_schedule_overlap", "enable_disagg_pd", "instance_role"),
        when=lambda s: s["enable_schedule_overlap"] and s["enable_disagg_pd"] and s["instance_role"] == "PREFILL",
        says="enable_schedule_overlap is turned off on a PREFILL instance",
        source=f"{_MASTER}:486",
        what="schedule overlap on a prefill instance",
        example="--enable_schedule_overlap=true\n--enable_disagg_pd=true\n--instance_role=PREFILL\n"
        "--etcd_addr=127.0.0.1:2379",
        put={"enable_schedule_overlap": False},
        since="0.8.0",
    ),
    conflict(
        "slo-routing-unprofiled",
        NOTE,
        ("enable_disagg_pd", "instance_role", "disable_ttft_profiling"),
        when=lambda s: (
            s["enable_disagg_pd"]
            and s["instance_role"] in ("PREFILL", "DECODE")
            and s.says("disable_ttft_profiling")
            and not s["disable_ttft_profiling"]
        ),
        says="disable_ttft_profiling=false profiles nothing: only an instance of role MIX is profiled, so that "
        "xllm-service's SLO_AWARE knows no times of this one and takes the first",
        source=f"{_XLLM}core/scheduler/disagg_pd_scheduler.cpp:87",
        what="profiling asked for on a side that is not profiled",
        example="--disable_ttft_profiling=false\n--enable_disagg_pd=true\n--instance_role=PREFILL\n"
        "--etcd_addr=127.0.0.1:2379",
        since=_S1,
        forms=_FLAGS,
    ),
)


RULES = (*_PARALLEL, *_PD)
