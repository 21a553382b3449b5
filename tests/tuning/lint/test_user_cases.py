"""Four threads of xLLM's users, answered by the linter as its maintainers answered, or would.

Flags are those that the threads give, on the version they give; the rest of each command is ours.
"""

from __future__ import annotations

import json

from tests.tuning.lint.configurations import looked_at, serious
from xllm_lab.tuning.lint.linter import repair

# https://github.com/xLLM-AI/xllm/issues/832: slower than expected, whatever is switched on or off.
SLOW = r"""MODEL_PATH="/models/Qwen3-14B"
/usr/local/bin/xllm \
  --model $MODEL_PATH \
  --devices="npu:0" \
  --port 18000 \
  --nnodes=1 \
  --max_memory_utilization=0.9 \
  --block_size=128 \
  --communication_backend="hccl" \
  --enable_prefix_cache=false \
  --enable_chunked_prefill=false \
  --enable_schedule_overlap=false \
  --enable_multi_stream_parallel=MULTI \
  --enable_shm=true \
  --GRAPH=true
"""
# https://github.com/xLLM-AI/xllm/issues/1126: multi-token prediction with overlap, on MLUs.
OVERFLOW = r"""for ((i = 0; i < NNODES; i++)); do
    DEVICE=$((START + i))
    xllm \
        --model "${MODEL_PATH}" \
        --devices="mlu:${DEVICE}" \
        --draft_model "${MODEL_PATH}" --draft_devices="mlu:${DEVICE}" --num_speculative_tokens 1 \
        --nnodes="${WORLD_SIZE}" \
        --max_memory_utilization=0.84 \
        --max_seqs_per_batch="${SEQS}" \
        --block_size=16 \
        --enable_schedule_overlap=true \
        --enable_graph=false \
        --expert_parallel_degree=2 \
        --dp_size=4 \
        --ep_size=${WORLD_SIZE} \
    > "${LOG_FILE}" 2>&1 &
done
"""
CRASH = "xllm --model /models/m --enable_schedule_overlap=true --enable_graph=true\n"
# https://github.com/xLLM-AI/xllm/issues/376: is disaggregation on, and why does the log say ttft: 0.0ms?
IS_IT_ON = "xllm --model /models/m --enable_disagg_pd=PD --instance_role=DECODE --etcd_addr=127.0.0.1:12379\n"

# What xLLM ships for Qwen3: xllm/auto_config/qwen3.json at 3906f5a.
SHIPPED: dict[str, object] = {
    "nnodes": 1,
    "port": 8010,
    "block_size": 128,
    "max_memory_utilization": 0.9,
    "enable_prefix_cache": True,
}
SHIPPED |= {"max_tokens_per_batch": 8192, "max_seqs_per_batch": 256, "enable_schedule_overlap": True}
SHIPPED |= {"enable_chunked_prefill": True, "max_tokens_per_chunk_for_prefill": 2048, "npu_kernel_backend": "ATB"}
SHIPPED |= {"enable_graph": True, "max_tokens_for_graph_mode": 2048}


def said(text: str, rule: str, **known: object) -> str:
    return next(one.says for one in looked_at(text, **known).findings if one.rule == rule)


def slow(multi: str, graph: str) -> str:
    return SLOW.replace("MULTI", multi).replace("GRAPH", graph)


def test_832_on_the_version_they_had() -> None:
    """Nothing is wrong; what costs is told: no chunks, no overlap."""
    found = looked_at(slow("false", "enable_acl_graph"), version="0.7.2", concurrency=40)
    assert not serious(found)
    assert {one.rule for one in found.findings} == {"whole-prompts", "no-overlap"}


def test_832_two_streams_could_make_no_difference() -> None:
    """On one node, since 0.8.0: off without a word."""
    found = looked_at(slow("true", "enable_graph"), version="0.8.0", concurrency=40)
    assert serious(found) == {"multi-stream-on-one-node"}
    assert "It cannot make a difference" in said(found.config.text, "multi-stream-on-one-node", version="0.8.0")


def test_832_graphs_after_the_limit_of_16() -> None:
    """At a concurrency of 40 the graph they switched on is never replayed; and its flag has another name by then."""
    old = looked_at(slow("false", "enable_acl_graph"), version="v0.9.1".removeprefix("v"), concurrency=40)
    assert serious(old) == {"unknown-flag"}
    after = repair(old)
    assert "--enable_graph=true" in after.config.text
    assert [one.rule for one in after.repaired] == ["unknown-flag", "graph-limit"]
    assert "--acl_graph_decode_batch_size_limit=40" in after.config.text
    assert not serious(after)


def test_832_memory_is_not_the_matter() -> None:
    """The model fits their device, 64 GiB, with room for 40 requests of 1124 tokens."""
    known = {"model": "qwen3-14b", "device": "ascend-910b3", "concurrency": 40, "request_tokens": 1124}
    assert not serious(looked_at(slow("false", "enable_acl_graph"), version="0.7.2", **known))


def test_786_is_a_matter_of_three_days() -> None:
    """The build of 23 January 2026 crashes; no release does."""
    found = looked_at(CRASH, version="570925079")
    assert serious(found) == {"overlap-breaks-graph-warmup"}
    says = said(CRASH, "overlap-breaks-graph-warmup", version="570925079")
    assert "#787" in says
    assert "in no release" in says
    assert "--enable_schedule_overlap=false" in repair(found).config.text
    for version in ("0.7.2", "0.8.0", "0.9.0", "0.10.0", "3906f5a91"):
        assert "overlap-breaks-graph-warmup" not in serious(looked_at(CRASH, version=version))


def test_1126_is_mended_in_0_10_0() -> None:
    """At their commit an error, with the way around; later only what it costs."""
    found = looked_at(OVERFLOW, version="3011eb4c7")
    assert serious(found) == {"drafts-break-overlap"}
    assert "in 0.10.0" in said(OVERFLOW, "drafts-break-overlap", version="3011eb4c7")
    after = repair(found)
    assert not serious(after)
    assert after.config.text == OVERFLOW.replace("--enable_schedule_overlap=true", "--enable_schedule_overlap=false")
    later = looked_at(OVERFLOW, version="0.10.0")
    assert not serious(later)
    assert "overlap-doubles-drafts" in {one.rule for one in later.findings}


def test_376_it_is_on_and_the_zero_is_no_time() -> None:
    """Where TTFT is to be had, and that device IPs are no flag."""
    text = IS_IT_ON.replace("PD", "true")
    for version in ("0.7.0", "3906f5a91"):
        found = looked_at(text, version=version)
        assert not serious(found)
        assert {one.rule for one in found.findings} == {"pd-is-on"}
    says = said(text, "pd-is-on", version="0.7.0")
    assert "ttft: 0.0ms" in says
    assert "hccn.conf" in says


def test_376_a_role_alone_is_not_enough() -> None:
    """Without the switch the instance serves as if there were no roles."""
    assert serious(looked_at(IS_IT_ON.replace("PD", "false"), version="0.7.0")) == {"role-without-pd"}


def test_what_xllm_ships_is_clean() -> None:
    """But for a decode batch above the limit of its graphs, which its concurrency decides."""
    text = json.dumps(SHIPPED)
    assert [one.rule for one in looked_at(text).findings] == ["graph-limit-unsaid"]
    assert looked_at(text, concurrency=16).findings == ()
    assert serious(looked_at(text, concurrency=17)) == {"graph-limit"}
