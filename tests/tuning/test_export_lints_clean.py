"""What is exported is in the target's own table, and the linter finds nothing wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuning.searches import default
from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.catalog import make_policy, policies
from xllm_lab.policies.draft.adaptive_pruning import AdaptivePruning
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import Policies
from xllm_lab.policies.shapes.eager import EAGER
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.tuning.export import Export, export
from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.flag_table import LATEST, xllm_flags
from xllm_lab.tuning.lint.linter import Lint, lint
from xllm_lab.tuning.lint.reading import parse_configuration
from xllm_lab.tuning.lint.vllm_table import vllm_options

EXPORTABLE = [name for name, cls in policies("batch").items() if hasattr(cls, "xllm_flags")]
_FIXED = [Fixed(method=m, num_speculative_tokens=k) for m in ("suffix", "mtp", "ngram") for k in (1, 4)]
DRAFTS: st.SearchStrategy[Any] = st.sampled_from([OFF, *_FIXED, AdaptivePruning(method="mtp")])


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    instance = replace(
        default().instance,
        max_tokens_per_batch=draw(st.integers(500, 20_000)),
        max_seqs_per_batch=draw(st.integers(1, 500)),
        block_size=draw(st.sampled_from((16, 128))),
        enable_prefix_cache=draw(st.booleans()),
        async_scheduling=draw(st.sampled_from(("off", "on", "length_aware"))),
        kv_layout=draw(st.sampled_from(("paged", "virtual"))),
    )
    shapes = draw(
        st.one_of(
            st.just(EAGER),
            st.builds(
                XllmBuckets,
                acl_graph_decode_batch_size_limit=st.integers(1, 200),
                enable_prefill_piecewise_graph=st.booleans(),
                max_tokens_for_graph_mode=st.integers(0, 4096),
            ),
            st.builds(VllmBuckets, cudagraph_capture_sizes=st.sampled_from(("", "1,2,4"))),
        )
    )
    batch = make_policy("batch", draw(st.sampled_from([*EXPORTABLE, "vllm"])))
    return Candidate(instance=instance, policies=Policies(batch, shapes=shapes, draft=draw(DRAFTS)))


def linted(made: Export) -> Lint:
    return lint(parse_configuration(made.text, "the export"))


@settings(max_examples=150, deadline=None)
@given(candidates())
def test_an_export_lints_clean(candidate: Candidate) -> None:
    """Names of the table, values within its bounds, no flag that another one undoes."""
    if isinstance(candidate.policies.batch, Vllm):
        made = export(candidate, "vllm", kv_bytes_per_token=2048)
        assert made.config.keys() <= vllm_options().keys()
        assert yaml.safe_load(made.text) == made.config
    else:
        made = export(candidate, "xllm", kv_bytes_per_token=2048)
        assert json.loads(made.text) == made.config
        for name, value in made.config.items():
            flag = xllm_flags(LATEST)[name]
            assert flag.is_in_json
            assert flag.is_of_type(value)
            assert flag.is_within(value)
    assert linted(made).is_clean


@settings(max_examples=50, deadline=None)
@given(candidates().filter(lambda made: not isinstance(made.policies.batch, Vllm)))
def test_a_flagfile_says_what_the_json_does(candidate: Candidate) -> None:
    """And a linter finds nothing but the model that drafts, which only the user knows."""
    made = export(candidate, "xllm_flagfile", kv_bytes_per_token=2048)
    assert made.config == export(candidate, "xllm", kv_bytes_per_token=2048).config
    found = linted(made)
    flags = {name: xllm_flags()[name].parsed(str(entry.value)) for name, entry in found.config.entries.items()}
    assert flags == made.config
    assert {one.rule for one in found.findings if one.severity != "note"} <= {"draft-model-missing"}


def xllm(**beside: Any) -> Candidate:
    return Candidate(
        instance=replace(default().instance, **beside), policies=Policies(make_policy("batch", "prefill-first"))
    )


def test_what_the_version_does_not_have_cannot_be_said() -> None:
    """Its name, and the version's; mixed batches came with 3906f5a91."""
    with pytest.raises(ConfigError, match=r"^enable_mix_batch is no flag of xLLM 87e8d6ed6"):
        export(xllm(), "xllm", kv_bytes_per_token=1, version="87e8d6ed6")
    with pytest.raises(ConfigError, match=r"no flags of xLLM '9' are known"):
        export(xllm(), "xllm", kv_bytes_per_token=1, version="9")


def test_what_is_out_of_range_cannot_be_said() -> None:
    """A pool beyond 64 bits of bytes."""
    with pytest.raises(ConfigError, match=r"^max_cache_size is 102400000000000000000000; xLLM 3906f5a91 accepts whole"):
        export(xllm(), "xllm", kv_bytes_per_token=10**20)


def test_versions_go_by_several_names() -> None:
    """The flagfile says which it was written for."""
    made = export(xllm(), "xllm_flagfile", kv_bytes_per_token=1, version="3906f5a")
    assert made.text.splitlines()[0] == f"# xLLM {LATEST}"
    assert export(xllm(), "xllm", kv_bytes_per_token=1, version="3906f5a").config == made.config


def test_what_xllm_would_turn_off_is_told_as_off() -> None:
    """With the reason: mixed batches beside drafts, and a limit of graphs that nobody looks at."""
    own = Candidate(
        instance=default().instance,
        policies=Policies(
            make_policy("batch", "decode-first"),
            draft=Fixed(method="suffix", num_speculative_tokens=2),
            shapes=XllmBuckets(max_tokens_for_graph_mode=512),
        ),
    )
    made = export(own, "xllm", kv_bytes_per_token=1)
    assert made.config["enable_mix_batch"] is False
    assert "max_tokens_for_graph_mode" not in made.config
    assert "enable_prefill_piecewise_graph is false" in made.left_out["max_tokens_for_graph_mode"]


def test_vllm_as_it_reads_it() -> None:
    """Its own scheduler, its graphs, its drafts."""
    own = Candidate(
        instance=replace(default().instance, async_scheduling="on"),
        policies=Policies(
            Vllm(reserve_whole_prompt=False),
            shapes=VllmBuckets(cudagraph_capture_sizes="1,2,8"),
            draft=Fixed(method="ngram", num_speculative_tokens=4),
        ),
    )
    made = export(own, "vllm", kv_bytes_per_token=1)
    assert made.config == {
        "async_scheduling": True,
        "block_size": 16,
        "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 8]},
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "enforce_eager": False,
        "max_model_len": default().instance.max_model_len,
        "max_num_batched_tokens": 10240,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 64,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4},
    }
    assert set(made.left_out) == {"async_scheduling", "reserve_whole_prompt"}
    assert linted(made).config.kind is Kind.VLLM


def test_vllm_has_one_scheduler_and_one_version() -> None:
    """Others are refused."""
    with pytest.raises(ConfigError, match="policy prefill-first has no equivalent in vLLM; accepted: vllm"):
        export(xllm(), "vllm", kv_bytes_per_token=1)
    few = replace(xllm(max_tokens_per_batch=7), policies=Policies(Vllm()))
    with pytest.raises(ConfigError, match="max_num_batched_tokens=7 is less than max_num_seqs=8: vLLM refuses"):
        export(few, "vllm", kv_bytes_per_token=1)
    with pytest.raises(ConfigError, match="one vLLM is known"):
        export(replace(xllm(), policies=Policies(Vllm())), "vllm", kv_bytes_per_token=1, version="1")
