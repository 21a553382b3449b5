"""A draft layer on a machine that nobody measured: what it takes, and what it brings."""

from __future__ import annotations

import pytest

from xllm_lab.hardware import hardware
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import PRECISIONS
from xllm_lab.sim.acceptance import GivenAcceptance
from xllm_lab.sim.cost import batch_of
from xllm_lab.sim.cost.mtp import draft_spec, drafting_us, mtp_draft_time
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.machine import Deployment, roofline_machine
from xllm_lab.step_time import Chunk

DEEPSEEK, A3 = known_model("deepseek-v3"), hardware("ascend-910c")
LAYER = RooflineCost(A3, draft_spec(DEEPSEEK), sharding=Sharding(tensor=16, expert=16), precision=PRECISIONS["w8a8"])


def test_a_draft_layer_has_the_published_size() -> None:
    """The report says 14 billion with embedding and head, which are shared: 11.5 billion are its own."""
    draft = draft_spec(DEEPSEEK)
    own = draft.num_params - 2 * draft.embedding_params
    assert own == pytest.approx(11.5e9, rel=0.02)


@pytest.mark.parametrize("num", [1, 8, 40, 100])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_sum_of_terms_is_near_the_layer(num: int, depth: int) -> None:
    """Experts wake up one by one, which no sum of these terms says: a fifth of a thirtieth of a step."""
    fitted = mtp_draft_time(LAYER).us("mtp", num, depth)
    assert fitted == pytest.approx(drafting_us(LAYER, num, depth), rel=0.21)


def test_drafts_pay_if_they_are_kept() -> None:
    """Of few sequences a step with drafts takes little longer: kept never they cost time, kept always they halve it."""
    deployment = Deployment(tensor_parallel=16, expert_parallel=16, precision="w8a8")
    machine = roofline_machine(A3, DEEPSEEK, deployment)
    plain = machine.cost.step(batch_of([Chunk(1, 1000)] * 4, 4)).us
    drafted = machine.cost.step(batch_of([Chunk(2, 1000)] * 4, 8)).us + machine.draft_time.us("mtp", 4, 1)
    never, always = (drafted / GivenAcceptance((frac,)).tokens_per_step(1) for frac in (0.0, 1.0))
    assert always < plain < never == pytest.approx(2 * always)
