"""The control loop of one instance, with all of its policies at work; every host opens it here."""

from __future__ import annotations

from xllm_lab.copies import Copier
from xllm_lab.copy_time import CopyTime
from xllm_lab.draft_time import DraftTime
from xllm_lab.drafting import Proposer, drafting_of
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.of_instance import Policies
from xllm_lab.rebalancing import Mover, rebalancing_of
from xllm_lab.records import Recorder
from xllm_lab.scheduler import Scheduler
from xllm_lab.step_shape import Shapes, shapes_of
from xllm_lab.step_time import StepTime
from xllm_lab.tiering_of import tiering_of
from xllm_lab.virtual_kv import virtual_kv_of


def scheduler_of(
    config: InstanceConfig,
    policies: Policies,
    recorder: Recorder,
    *,
    proposer: Proposer | None,
    copier: Copier | None,
    mover: Mover | None = None,
    step_time: StepTime | None = None,
    draft_time: DraftTime | None = None,
    copy_time: CopyTime | None = None,
    shapes: Shapes | None = None,
    instance: int = 0,
) -> Scheduler:
    """Of an instance that begins.

    Args:
        proposer: the host's, that makes drafts; None: there is none.
        copier: the host's, that copies between tiers; None: it cannot.
        mover: the host's, that copies experts; None: they are not divided among devices.
        step_time, draft_time, copy_time: what policies are told of the machine.
        shapes: the shapes policy at work, where it counts for several instances.

    Raises:
        ConfigError: a policy needs times and has none, or the host cannot do what it decides.
    """
    return Scheduler(
        config,
        policies.batch,
        recorder,
        step_time=step_time,
        shapes=shapes_of(policies.shapes, config) if shapes is None else shapes,
        drafting=drafting_of(policies.draft, proposer, step_time=step_time, draft_time=draft_time),
        tiering=tiering_of(policies.cache, config, copier, step_time=step_time, copy_time=copy_time),
        pages=virtual_kv_of(policies.pages, config),
        experts=rebalancing_of(policies.experts, mover),
        instance=instance,
    )
