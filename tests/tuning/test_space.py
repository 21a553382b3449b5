"""The space is read from annotations: a field with a range is a knob, wherever its class comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import optuna
import pytest

from tests.tuning.searches import default
from xllm_lab.candidate import Candidate, num_changes
from xllm_lab.candidate import candidate as candidate_of
from xllm_lab.errors import ConfigError
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies import catalog
from xllm_lab.policies.api import Choice
from xllm_lab.policies.cache.lru import Lru
from xllm_lab.policies.cache.storing import Storing
from xllm_lab.policies.catalog import knobs, make_policy, policies
from xllm_lab.policies.of_instance import DECISIONS, Policies
from xllm_lab.policies.pages.next_page import NextPage
from xllm_lab.policies.pages.on_demand import OnDemand
from xllm_lab.policies.shapes import ShapesPolicy
from xllm_lab.policies.shapes.powers_of_two import PowersOfTwo
from xllm_lab.policies.shapes.xllm_buckets import XllmBuckets
from xllm_lab.tuning import space as space_module
from xllm_lab.tuning.space import Space

NUM_DRAWS = 60


@pytest.fixture
def outside_policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another package is installed, and names a module of policies."""
    own = EntryPoint(name="outside", value="tests.tuning.outside_policy", group=catalog.ENTRY_POINT_GROUP)
    monkeypatch.setattr(catalog, "entry_points", lambda group: [own])
    catalog._modules.cache_clear()
    yield "at-most-so"
    catalog._modules.cache_clear()


def drawn(space: Space) -> list[tuple[dict[str, Any], Candidate]]:
    """Parameters and candidates of a random search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for _ in range(NUM_DRAWS):
        trial = study.ask()
        candidate = space.suggest(trial)
        found.append((trial.params, candidate))
        study.tell(trial, 0.0)
    return found


def with_shapes(shapes: ShapesPolicy) -> Candidate:
    """The default with another shapes policy."""
    return replace(default(), policies=replace(default().policies, shapes=shapes))


def test_a_policy_of_another_package_brings_its_own_space(outside_policy: str) -> None:
    """Nobody listed its knobs, nor its name."""
    space = Space(default(), [outside_policy])
    own = {k: v for k, v in space.describe()["knobs"].items() if k.startswith("at-most-so.")}
    assert own == {
        "at-most-so.appetite": [8, 512, True],
        "at-most-so.patience_frac": [0.25, 0.75, False],
        "at-most-so.mood": ["calm", "eager"],
    }


def test_a_policy_of_another_package_is_drawn_with_its_knobs(outside_policy: str) -> None:
    """Candidates are made of it, of several values each, and a field without a range keeps its default."""
    found = [c.as_dict()["policies"]["batch"] for _, c in drawn(Space(default(), [outside_policy]))]
    own = [values for values in found if values["name"] == outside_policy]
    assert len({values["appetite"] for values in own}) > 5
    assert {values["mood"] for values in own} == {"calm", "eager"}
    assert {values["name_of_the_author"] for values in own} == {"nobody"}


def test_every_annotated_field_of_instance_and_policy_is_searched() -> None:
    """The space is those fields, each under its own name."""
    expected = {*knobs(InstanceConfig), *(f"decode-first.{name}" for name in knobs(type(default().policies.batch)))}
    assert set(Space(default()).describe()["knobs"]) == expected
    assert all(set(params) == expected for params, _ in drawn(Space(default())))


def test_knobs_of_the_shapes_policy_are_searched() -> None:
    """Those of the default's own; eager steps have none."""
    space = Space(with_shapes(XllmBuckets()))
    assert {k for k in space.describe()["knobs"] if k.startswith("shapes.")} == {
        f"shapes.{name}" for name in knobs(XllmBuckets)
    }
    limits = {c.as_dict()["policies"]["shapes"]["acl_graph_decode_batch_size_limit"] for _, c in drawn(space)}
    assert len(limits) > 5
    assert space.suggest(optuna.trial.FixedTrial(space.default_params())) == space.default
    assert candidate_of(space.default.as_dict()) == space.default
    assert num_changes(space.default, default()) == 1
    assert num_changes(space.default, with_shapes(XllmBuckets(max_tokens_for_graph_mode=1))) == 1


def test_the_default_is_a_point_of_its_space() -> None:
    """Its parameters, suggested, are the default again."""
    space = Space(default(), ["fcfs"])
    assert space.suggest(optuna.trial.FixedTrial(space.default_params())) == default()


def test_no_draw_leaves_the_annotated_range() -> None:
    """Both ends included; whole numbers stay whole."""
    for _, candidate in drawn(Space(default())):
        for part in (candidate.instance, *(policy for _, policy in candidate.policies)):
            for name, note in knobs(type(part)).items():
                value = getattr(part, name)
                if isinstance(note, Choice):
                    assert value in note.values
                elif name != "num_kv_blocks":  # which memory cuts
                    assert note.low <= value <= note.high
                    assert type(value) is type(getattr(type(part)(), name))


def test_no_candidate_has_more_kv_memory_than_the_default() -> None:
    """Larger blocks are fewer: what the default was given is what the device has."""
    most = default().instance.num_kv_tokens
    sizes = {c.instance.block_size: c.instance.num_kv_tokens for _, c in drawn(Space(default()))}
    assert set(sizes) == {16, 32, 64, 128}
    assert max(sizes.values()) <= most


def test_memory_is_cut_in_whole_blocks() -> None:
    """60 blocks of 16 are 960 tokens: 7 blocks of 128."""
    space = Space(default(num_kv_blocks=60))
    params = {**space.default_params(), "block_size": 128, "num_kv_blocks": 4096}
    cut = space.suggest(optuna.trial.FixedTrial(params))
    assert cut.instance.num_kv_blocks == 7


def test_fields_without_a_range_keep_the_defaults_values() -> None:
    """The context and the time budgets are promises, not knobs."""
    policy = make_policy("batch", "decode-first", {"max_tpot_us": 30_000})
    start = Candidate(instance=default(max_model_len=777).instance, policies=Policies(policy))
    found = drawn(Space(start))
    assert {c.instance.max_model_len for _, c in found} == {777}
    assert {c.as_dict()["policies"]["batch"]["max_tpot_us"] for _, c in found} == {30_000}


def test_only_the_drawn_policys_knobs_are_drawn() -> None:
    """A conditional space: what another policy would be set to means nothing."""
    found = drawn(Space(default(), ["prefill-first"]))
    assert {params["policy"] for params, _ in found} == {"decode-first", "prefill-first"}
    for params, _ in found:
        owners = {name.partition(".")[0] for name in params if "." in name}
        assert owners == {params["policy"]}


def test_policies_of_any_decision_are_chosen_from() -> None:
    """Each with knobs of its own, as two may have one of the same name; nothing else changes."""
    space = Space(default(), ["powers-of-two", "shapes.xllm-buckets"])
    found = drawn(space)
    assert {params["shapes"] for params, _ in found} == {"eager", "powers-of-two", "xllm-buckets"}
    for params, made in found:
        assert made.as_dict()["policies"]["shapes"]["name"] == params["shapes"]
        owners = {name.split(".")[1] for name in params if name.startswith("shapes.")}
        assert owners == {params["shapes"]} - {"eager"}
    assert space.suggest(optuna.trial.FixedTrial(space.default_params())) == default()
    others = [with_shapes(one).policies for one in (PowersOfTwo(), XllmBuckets())]
    assert list(space.alternatives()) == [default().policies, *others]


def test_a_name_of_several_decisions_must_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell which of them was meant."""
    monkeypatch.setattr(space_module, "policies", lambda decides: {"namesake": PowersOfTwo})
    with pytest.raises(ConfigError) as refused:
        Space(default(), ["namesake"])
    accepted = str(refused.value).partition("policy 'namesake' is ambiguous; accepted: ")[2].split(" or ")
    assert accepted == [f"{decides}.namesake" for decides in DECISIONS]


def test_an_unknown_policy_is_refused() -> None:
    """With the names that are known."""
    with pytest.raises(ConfigError, match=r"'magic'; accepted: batch: decode-first, fcfs.*; shapes: eager"):
        Space(default(), ["magic"])


def test_a_default_outside_its_own_space_is_refused() -> None:
    """It could not be the first trial, and nothing could be compared with it."""
    with pytest.raises(ConfigError, match="num_kv_blocks is 8, the space accepts 32 to 4096"):
        Space(default(num_kv_blocks=8))
    with pytest.raises(ConfigError, match="block_size is 24, the space accepts 16, 32, 64, 128"):
        Space(default(block_size=24))


def test_the_layout_of_kv_is_searched_where_its_pages_have_a_price() -> None:
    """With the knobs of the policy that looks after them, which nobody asks where KV is paged."""
    space = Space(default(), ["pages.next-page"])
    layouts = {candidate.instance.kv_layout for _, candidate in drawn(space)}
    assert layouts == {"paged", "virtual"}
    for params, candidate in drawn(space):
        asked = candidate.instance.kv_layout == "virtual" and params["pages"] == "next-page"
        assert ("pages.next-page.lead_steps" in params) == asked
        assert isinstance(candidate.policies.pages, NextPage if asked else OnDemand)
    unpriced = space.where(layouts=("paged",))
    assert {candidate.instance.kv_layout for _, candidate in drawn(unpriced)} == {"paged"}


def test_knobs_of_a_store_are_searched_where_there_is_one() -> None:
    """As each cache policy marked them; without a store they do nothing, and are not drawn."""
    for name, cls in policies("cache").items():
        marked = {f"cache.{f.name}" for f in dataclasses.fields(Storing) if issubclass(cls, Storing)}
        start = replace(default(), policies=replace(default().policies, cache=make_policy("cache", name)))
        without = set(Space(start).describe()["knobs"])
        space = Space(start).where(num_stores=1)
        assert set(space.describe()["knobs"]) - without == marked
        assert not without & marked
        assert {k for params, _ in drawn(space) for k in params} == without | marked
        assert space.where(layouts=("paged",)).describe()["knobs"].keys() >= marked


def test_without_a_store_its_knobs_keep_the_defaults_values() -> None:
    """A candidate that is not the default may still be given a store by hand."""
    start = replace(default(), policies=replace(default().policies, cache=Lru(prefetch_blocks=7)))
    found = [candidate.policies.cache for _, candidate in drawn(Space(start))]
    assert {cache.prefetch_blocks for cache in found if isinstance(cache, Lru)} == {7}
