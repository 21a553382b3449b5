"""The YAML that vLLM reads with `--config`, with vLLM-Ascend's options under `additional_config`.

Arguments are those of vLLM 0.27.1 with vLLM-Ascend at 182b75ea; both hosts know its scheduler as the policy `vllm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.policies.batch.vllm import Vllm
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.draft.fixed import Fixed
from xllm_lab.policies.draft.off import OFF
from xllm_lab.policies.of_instance import BESIDE
from xllm_lab.policies.shapes.eager import Eager
from xllm_lab.policies.shapes.vllm_buckets import VllmBuckets
from xllm_lab.tuning.lint.linter import lint
from xllm_lab.tuning.lint.reading import parse_configuration
from xllm_lab.tuning.lint.vllm_table import refuse_unsayable

_NEEDS_MODEL = "the model that drafts, which no run of ours knows"
# Policies that do nothing, and those that are told above.
_SAID = ("shapes", "draft")

SUFFIX = "yaml"


class VllmConfig(NamedTuple):
    """See `Export`."""

    config: dict[str, Any]
    left_out: dict[str, Any]

    @property
    def text(self) -> str:
        return str(yaml.safe_dump(self.config, sort_keys=True))


def export(candidate: Candidate, kv_bytes_per_token: int, version: str | None) -> VllmConfig:
    """Arguments for a configuration.

    Raises:
        ConfigError: another batch policy than vLLM's, a version, or what vLLM would refuse.
    """
    if version is not None:
        raise ConfigError(f"version is {version!r}; one vLLM is known, so none is accepted")
    instance, batch = candidate.instance, candidate.policies.batch
    if not isinstance(batch, Vllm):
        raise ConfigError(f"policy {policy_name(batch)} has no equivalent in vLLM; accepted: vllm")
    config: dict[str, Any] = {
        "max_num_batched_tokens": instance.max_tokens_per_batch,
        "max_num_seqs": instance.max_seqs_per_batch,
        "block_size": instance.block_size,
        "num_gpu_blocks_override": instance.num_kv_blocks,
        "enable_prefix_caching": instance.enable_prefix_cache,
        "enable_chunked_prefill": True,
        "max_model_len": instance.max_model_len,
        "async_scheduling": instance.async_scheduling != "off",
    }
    left_out: dict[str, Any] = {}
    if not batch.reserve_whole_prompt:
        left_out["reserve_whole_prompt"] = False
    if instance.async_scheduling == "on":
        left_out["async_scheduling"] = "on, which foresees no end; vLLM's does"
    if instance.kv_layout != "paged":
        left_out["kv_layout"] = instance.kv_layout
    _tell_graphs(candidate, config, left_out)
    _tell_drafts(candidate, config, left_out)
    default = {decides: policy_name(policy) for decides, policy in type(candidate.policies)(batch)}
    for decides, policy in candidate.policies:
        if decides in BESIDE and decides not in _SAID and policy_name(policy) != default[decides]:
            left_out[decides] = policy_name(policy)
    return _checked(VllmConfig(config, left_out))


def _checked(made: VllmConfig) -> VllmConfig:
    refuse_unsayable(made.config)
    found = lint(parse_configuration(made.text, "the export"))
    if not found.is_clean:
        raise ConfigError(f"{found.findings[0].says} ({found.findings[0].source})")
    return made


def _tell_graphs(candidate: Candidate, config: dict[str, Any], left_out: dict[str, Any]) -> None:
    shapes = candidate.policies.shapes
    config["enforce_eager"] = not isinstance(shapes, VllmBuckets)
    if isinstance(shapes, VllmBuckets):
        told: dict[str, Any] = {"cudagraph_mode": shapes.cudagraph_mode.upper()}
        if shapes.cudagraph_capture_sizes:
            told["cudagraph_capture_sizes"] = [int(size) for size in shapes.cudagraph_capture_sizes.split(",")]
        config["compilation_config"] = told
    elif not isinstance(shapes, Eager):
        left_out["shapes"] = policy_name(shapes)


def _tell_drafts(candidate: Candidate, config: dict[str, Any], left_out: dict[str, Any]) -> None:
    draft = candidate.policies.draft
    if isinstance(draft, Fixed):
        told = {"method": draft.method, "num_speculative_tokens": draft.num_speculative_tokens}
        config["speculative_config"] = told
        if draft.method == "draft_model":
            left_out["speculative_config.model"] = _NEEDS_MODEL
    elif draft != OFF:
        left_out["draft"] = policy_name(draft)
