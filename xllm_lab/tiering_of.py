"""Whether an instance has tiers at all, and what is refused of them."""

from __future__ import annotations

from xllm_lab.copies import Copier
from xllm_lab.copy_time import CopyTime
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.cache import CachePolicy
from xllm_lab.policies.cache.device_only import DeviceOnly
from xllm_lab.policies.catalog import policy_name
from xllm_lab.policies.of_instance import Policies
from xllm_lab.step_time import StepTime
from xllm_lab.tiering import Tiering


def num_host_blocks(policy: CachePolicy, config: InstanceConfig) -> int:
    """Blocks that the host has room for."""
    return int(getattr(policy, "host_blocks_factor", 0.0) * config.num_kv_blocks)


def tiering_of(
    policy: CachePolicy,
    config: InstanceConfig,
    copier: Copier | None,
    *,
    step_time: StepTime | None = None,
    copy_time: CopyTime | None = None,
) -> Tiering | None:
    """The policy at work; None where nothing is ever copied.

    Raises:
        ConfigError: the host has room for no block, there is no prefix cache, or a policy has no times that it needs.
    """
    if isinstance(policy, DeviceOnly):
        return None
    name, room = policy_name(policy), num_host_blocks(policy, config)
    if room < 1:
        raise ConfigError(
            f"cache policy {name}: the host has room for no block; accepted: a host_blocks_factor of at least "
            f"{1 / config.num_kv_blocks:.3g}"
        )
    if config.kv_layout == "virtual":
        raise ConfigError(f"cache policy {name}: kv_layout is 'virtual', whose pages are not copied; accepted: 'paged'")
    if not config.enable_prefix_cache:
        raise ConfigError(f"cache policy {name}: enable_prefix_cache is false; accepted: true")
    if getattr(policy, "needs_step_time", False) and step_time is None:
        raise ConfigError(f"cache policy {name} needs step times, none are given; accepted: a machine's calibration")
    if getattr(policy, "needs_copy_time", False) and not copy_time:
        raise ConfigError(
            f"cache policy {name} needs copy times, none are given; accepted: a calibration on runs with copies, or a "
            "link's rate"
        )
    if copier is None:
        raise ConfigError(f"cache policy {name} is not served here; accepted: device-only")
    if copier.has_store and getattr(policy, "needs_copy_time", False) and not (copy_time and copy_time.has_store):
        raise ConfigError(
            f"cache policy {name} needs copy times of the store, none are given; accepted: a calibration on runs with "
            "one, or a store's rate"
        )
    return Tiering(policy, copier, num_host_blocks=room, step_time=step_time, copy_time=copy_time or None)


def refuse_link_without_copies(bytes_per_s: float | None, policies: Policies) -> None:
    """ConfigError for the rate of a link to the host over which nothing is ever copied."""
    if bytes_per_s is not None and isinstance(policies.cache, DeviceOnly):
        raise ConfigError(
            f"a link to the host of {bytes_per_s:g} bytes/s is given, and cache policy device-only copies nothing; "
            "accepted: with another cache policy"
        )
