"""What production reads: xLLM's own flag names and units, and a list of what it has no flag for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.tuning.searches import default
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import flags, make_policy, policies
from xllm_lab.policies.draft import DraftPolicy
from xllm_lab.policies.draft.acceptance_driven import AcceptanceDriven
from xllm_lab.policies.draft.adaptive_pruning import AdaptivePruning
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.load_aware import LoadAware
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.experts.refined import Refined
from xllm_lab.policies.experts.xllm_balanced import XllmBalanced
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.tuning.export import export, targets
from xllm_lab.tuning.export.xllm import XllmConfig

KV_BYTES_PER_TOKEN = 23_040
EXPORTABLE = [name for name, cls in policies("batch").items() if hasattr(cls, "xllm_flags")]


def candidate(policy: str, **values: object) -> Candidate:
    return Candidate(instance=default().instance, policies=Policies(make_policy("batch", policy, values)))


def test_decode_first_as_xllm_reads_it() -> None:
    """Every flag, by xLLM's name; 64 blocks of 16 tokens are 1024 tokens of KV."""
    made = export(
        candidate(
            "decode-first",
            max_tokens_per_chunk=512,
            watermark_frac=0.9,
            order="sjf",
            max_ttft_us=2_000_000,
            max_tpot_us=50_000,
        ),
        "xllm",
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
    )
    assert made.config == {
        "block_size": 16,
        "enable_chunked_prefill": True,
        "enable_eplb": False,
        "enable_graph": False,
        "enable_mix_batch": True,
        "enable_prefix_cache": True,
        "enable_schedule_overlap": False,
        "enable_xtensor": False,
        "max_cache_size": 1024 * KV_BYTES_PER_TOKEN,
        "max_global_tpot_ms": 50,
        "max_global_ttft_ms": 2000,
        "max_seqs_per_batch": 8,
        "max_tokens_per_batch": 10240,
        "max_tokens_per_chunk_for_prefill": 512,
        "prefill_scheduling_memory_usage_threshold": 0.9,
        "priority_strategy": "sjf",
    }


@pytest.mark.parametrize("policy", EXPORTABLE)
def test_an_export_holds_flags_and_nothing_else(policy: str) -> None:
    """Those that are annotated, those that select the scheduler, and the pool's size; all of them plain JSON."""
    made = export(candidate(policy), "xllm", kv_bytes_per_token=KV_BYTES_PER_TOKEN)
    cls = policies("batch")[policy]
    known = {flag.name for part in (InstanceConfig, cls) for flag in flags(part).values()}
    assert set(made.config) <= known | set(cls.xllm_flags) | {"max_cache_size", "enable_graph", "enable_eplb"}
    assert made.config.items() >= dict(cls.xllm_flags).items()
    assert json.loads(json.dumps(made.config)) == made.config


def test_balance_of_experts_is_told_as_xllm_has_it() -> None:
    """Seconds by its flags; a policy of ours that it has not is listed."""
    own = candidate("decode-first")
    balanced = XllmBalanced(interval_us=60_000_000, num_redundant_experts=2, min_peak_gain_frac=0.1)
    made = export(
        replace(own, policies=replace(own.policies, experts=balanced)), "xllm", kv_bytes_per_token=KV_BYTES_PER_TOKEN
    )
    told = {name: value for name, value in made.config.items() if "ep" in name.split("_")[0] or "eplb" in name}
    assert told == {
        "enable_eplb": True,
        "eplb_min_peak_load_improvement": 0.1,
        "eplb_policy_kind": "balanced",
        "eplb_update_interval": 60,
    }
    assert made.config["redundant_experts_num"] == 2
    ours = export(
        replace(own, policies=replace(own.policies, experts=Refined())), "xllm", kv_bytes_per_token=KV_BYTES_PER_TOKEN
    )
    assert ours.left_out["experts"] == "refined"


def test_graphs_are_told_as_xllm_has_them() -> None:
    """Its buckets by its flags; other buckets are no flags of its, and are listed."""
    own = candidate("decode-first")
    buckets = replace(own, policies=replace(own.policies, shapes=XllmBuckets()))
    made = export(buckets, "xllm", kv_bytes_per_token=1)
    assert made.config.items() >= {"enable_graph": True, "acl_graph_decode_batch_size_limit": 16}.items()
    assert "shapes" not in made.left_out
    other = export(replace(own, policies=replace(own.policies, shapes=PowersOfTwo())), "xllm", kv_bytes_per_token=1)
    assert other.left_out["shapes"] == "powers-of-two"
    assert "enable_graph" not in other.config


def drafting(draft: DraftPolicy, batch: str = "prefill-first") -> XllmConfig:
    own = candidate(batch)
    made = export(replace(own, policies=replace(own.policies, draft=draft)), "xllm", kv_bytes_per_token=1)
    assert isinstance(made, XllmConfig)
    return made


def test_drafts_are_told_in_xllms_words() -> None:
    """MTP's weights have a path that only the user knows."""
    mtp, suffix = (drafting(Fixed(method=method, num_speculative_tokens=2)) for method in ("mtp", "suffix"))
    assert mtp.config.items() >= {"speculative_algorithm": "MTP", "num_speculative_tokens": 2}.items()
    assert list(mtp.left_out) == ["draft_model"]
    assert suffix.config.items() >= {"speculative_algorithm": "Suffix", "num_speculative_tokens": 2}.items()
    assert suffix.left_out == {}


def test_adaptive_depth_is_told_with_what_it_needs() -> None:
    """The flags that switch it on; knobs of ours are listed."""
    made = drafting(AdaptivePruning(method="mtp", adaptive_speculative_min_gain=0.02))
    told = {
        "enable_adaptive_speculative_decode": True,
        "enable_profile_step_time": True,
        "speculative_algorithm": "MTP",
    }
    assert made.config.items() >= {**told, "adaptive_speculative_min_gain": 0.02}.items()
    assert set(made.left_out) == {"draft.aim", "draft.explore_frac", "draft.prior_count", "draft_model"}


def test_mixed_steps_are_lost_to_drafts() -> None:
    """xLLM turns them off by itself, which must not go unseen."""
    assert "no prompts beside drafts" in drafting(Fixed(method="suffix"), "decode-first").left_out["enable_mix_batch"]


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        (Fixed(), "fixed, method 'ngram'; xLLM has MTP, Suffix"),
        (Fixed(method="draft_model"), "fixed, method 'draft_model'; xLLM has MTP, Suffix"),
        (AdaptivePruning(), "adaptive-pruning, method 'auto'; xLLM has MTP"),
        (AdaptivePruning(method="suffix"), "adaptive-pruning, method 'suffix'; xLLM has MTP"),
        (AcceptanceDriven(method="draft_model"), "acceptance-driven, method 'draft_model'; xLLM has MTP"),
        (LoadAware(method="suffix"), "load-aware"),
    ],
)
def test_drafts_that_xllm_cannot_make_are_left_out_whole(draft: DraftPolicy, said: str) -> None:
    """A depth without its method would be a depth of MTP's."""
    made = drafting(draft)
    assert made.left_out == {"draft": said}
    assert made.config == drafting(OFF).config


def test_policies_differ_in_what_xllm_is_told() -> None:
    """No two of them select the same scheduler."""
    told = [json.dumps(dict(policies("batch")[name].xllm_flags), sort_keys=True) for name in EXPORTABLE]
    assert len(set(told)) == len(told) > 1


def test_budgets_are_in_milliseconds() -> None:
    """Ours are in microseconds. Less than one is one: with a budget of 0 xLLM schedules nothing."""
    for max_tpot_us, told in ((50_000, 50), (50_999, 50), (1_000, 1), (300, 1)):
        made = export(candidate("decode-first", max_tpot_us=max_tpot_us), "xllm", kv_bytes_per_token=1)
        assert made.config["max_global_tpot_ms"] == told


def test_what_is_not_set_is_not_told() -> None:
    """No budget is no flag, so that xLLM's own default stands."""
    made = export(candidate("decode-first"), "xllm", kv_bytes_per_token=1)
    assert not {name for name in made.config if name.startswith("max_global")}


@pytest.mark.parametrize(
    ("policy", "values", "left_out"),
    [
        ("decode-first", {"footprint_margin": 1.3}, {"footprint_margin": 1.3}),
        ("prefill-first", {}, {}),
        ("unified-slo", {"max_preemptions": 2}, {"max_preemptions": 2}),
    ],
)
def test_what_xllm_has_no_flag_for_is_listed(
    policy: str, values: dict[str, object], left_out: dict[str, object]
) -> None:
    """With its value, so that nobody believes it was handed over."""
    assert export(candidate(policy, **values), "xllm", kv_bytes_per_token=1).left_out == left_out


@pytest.mark.parametrize(
    ("mode", "overlaps", "left_out"),
    [("off", False, {}), ("on", True, {}), ("length_aware", True, {"async_scheduling": "length_aware"})],
)
def test_planning_ahead_is_a_flag_that_foresees_no_end(mode: str, overlaps: bool, left_out: dict[str, str]) -> None:
    """Foreseeing ends is not xLLM's; the nearest it has is handed over, and the difference listed."""
    ahead = replace(default().instance, async_scheduling=mode)
    made = export(replace(candidate("prefill-first"), instance=ahead), "xllm", kv_bytes_per_token=1)
    assert (made.config["enable_schedule_overlap"], made.left_out) == (overlaps, left_out)


def test_virtual_kv_is_xtensor_and_what_that_lacks_is_told() -> None:
    """xLLM shares no prefixes there, and its reserve of pages is fixed."""
    virtual = replace(default().instance, kv_layout="virtual")
    made = export(replace(candidate("prefill-first"), instance=virtual), "xllm", kv_bytes_per_token=1)
    assert made.config["enable_xtensor"] is True
    assert made.left_out.keys() >= {"enable_prefix_cache", "num_reserved_pages"}


def test_a_policy_that_xllm_does_not_have_is_refused() -> None:
    """With those it has."""
    with pytest.raises(
        ConfigError, match="policy fcfs has no equivalent in xLLM; accepted: decode-first, prefill-first"
    ):
        export(candidate("fcfs"), "xllm", kv_bytes_per_token=1)


def test_an_unknown_target_is_refused() -> None:
    """With those there are."""
    assert targets() == ["vllm", "xllm", "xllm_flagfile"]
    with pytest.raises(ConfigError, match="unknown target 'sglang'; accepted: vllm, xllm"):
        export(candidate("decode-first"), "sglang", kv_bytes_per_token=1)
