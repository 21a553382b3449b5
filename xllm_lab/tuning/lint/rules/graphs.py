"""Rules about xLLM's graphs and streams. Lines are of 3906f5a91 unless they say otherwise."""

from __future__ import annotations

from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import conflict, drafts_on, says_on
from xllm_lab.tuning.lint.settings import Platform, Settings

ERROR, WARNING, NOTE = Severity
_XLLM = "xllm@3906f5a91 xllm/"
_MASTER = f"{_XLLM}core/distributed_runtime/master.cpp"
_S1, _S2 = "87e8d6ed6", "3906f5a91"


def _decode_batch(s: Settings) -> int:
    """Sequences of a data-parallel group that decode together, at most."""
    at_once = s.situation.concurrency or s["max_concurrent_requests"] or s["max_seqs_per_batch"]
    return int(min(s["max_seqs_per_batch"], -(-at_once // s["dp_size"])))


RULES = (
    conflict(
        "graph-limit",
        WARNING,
        (
            "acl_graph_decode_batch_size_limit",
            "enable_graph",
            "max_seqs_per_batch",
            "dp_size",
            "max_concurrent_requests",
        ),
        when=lambda s: (
            s["enable_graph"]
            and s.situation.concurrency is not None
            and _decode_batch(s) > s["acl_graph_decode_batch_size_limit"]
        ),
        says="at this concurrency decode batches exceed acl_graph_decode_batch_size_limit="
        "{acl_graph_decode_batch_size_limit}, and run without graphs: enable_graph does nothing for them. Graphs of "
        "larger batches take memory of their own; watch num_model_execution_total_eager",
        source=f"{_XLLM}core/runtime/acl_graph_executor_impl.cpp:955",
        what="decode batches above the graphs' limit",
        example="--enable_graph=true",
        situation={"concurrency": 40},
        platforms=(Platform.NPU,),
        put=lambda s: {"acl_graph_decode_batch_size_limit": _decode_batch(s)},
        since="0.9.1",
    ),
    conflict(
        "graph-limit-unsaid",
        NOTE,
        (
            "acl_graph_decode_batch_size_limit",
            "enable_graph",
            "max_seqs_per_batch",
            "dp_size",
            "max_concurrent_requests",
        ),
        when=lambda s: (
            s["enable_graph"]
            and s.situation.concurrency is None
            and _decode_batch(s) > s["acl_graph_decode_batch_size_limit"]
        ),
        says="decode batches above acl_graph_decode_batch_size_limit={acl_graph_decode_batch_size_limit} run without "
        "graphs, and max_seqs_per_batch={max_seqs_per_batch} lets them be larger; `--concurrency` tells whether "
        "yours are",
        source=f"{_XLLM}core/runtime/acl_graph_executor_impl.cpp:955",
        what="decode batches that may exceed the graphs' limit",
        example="--enable_graph=true",
        platforms=(Platform.NPU,),
        since="0.9.1",
    ),
    conflict(
        "drafts-end-double-buffer",
        WARNING,
        ("enable_graph_double_buffer", "num_speculative_tokens"),
        when=lambda s: says_on(s, "enable_graph_double_buffer") and drafts_on(s),
        says="enable_graph_double_buffer is turned off by num_speculative_tokens={num_speculative_tokens}",
        source=f"{_XLLM}xllm.cpp:388",
        what="the graphs' double buffer asked for beside drafts",
        example="--enable_graph_double_buffer=true\n--num_speculative_tokens=2\n--draft_model=/models/mtp",
        put={"enable_graph_double_buffer": False},
        platforms=(Platform.NPU,),
        since=_S2,
    ),
    conflict(
        "multi-stream-on-one-node",
        WARNING,
        ("enable_multi_stream_parallel", "nnodes"),
        when=lambda s: s["enable_multi_stream_parallel"] and s["nnodes"] == 1,
        says="enable_multi_stream_parallel is turned off without a word with nnodes=1, and ends the program with "
        "more: it is being rewritten. It cannot make a difference",
        source=f"{_MASTER}:471",
        what="two streams on one node",
        example="--enable_multi_stream_parallel=true",
        removed=("enable_multi_stream_parallel",),
        since="0.8.0",
    ),
    conflict(
        "multi-stream",
        ERROR,
        ("enable_multi_stream_parallel", "nnodes"),
        when=lambda s: s["enable_multi_stream_parallel"] and s["nnodes"] > 1,
        says="enable_multi_stream_parallel with nnodes={nnodes} ends the program: it is being rewritten",
        source=f"{_MASTER}:474",
        what="two streams on several nodes",
        example="--enable_multi_stream_parallel=true\n--nnodes=2",
        removed=("enable_multi_stream_parallel",),
        since="0.8.0",
    ),
    conflict(
        "micro-batches-are-dead",
        WARNING,
        ("micro_batch_num",),
        when=lambda s: s.differs("micro_batch_num"),
        says="micro_batch_num is defined and never read",
        source=f"{_XLLM}core/framework/config/parallel_config.cpp:75",
        what="the number of micro-batches",
        example="--micro_batch_num=2",
        removed=("micro_batch_num",),
        since="0.8.0",
    ),
    conflict(
        "balance-without-mla",
        WARNING,
        ("enable_dp_balance", "enable_customize_mla_kernel"),
        when=lambda s: s["enable_dp_balance"] and not s["enable_customize_mla_kernel"],
        says="enable_dp_balance sorts for the kernel of enable_customize_mla_kernel, which is off",
        source=f"{_XLLM}core/framework/batch/batch.cpp:312",
        what="balance within a data-parallel batch without its kernel",
        example="--enable_dp_balance=true",
        removed=("enable_dp_balance",),
        since="0.8.0",
    ),
)
