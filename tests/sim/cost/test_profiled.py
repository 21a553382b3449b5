"""The profiled cost model: exact at the table's points, extrapolation told, many steps as one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.sim.cost.cost_laws import batches, check_decode_steps, decode_batches
from tests.sim.cost.profile_bundles import CHUNKS, DECODES, LENGTHS, TOKENS, attention_us, write_bundle
from xllm_lab.errors import ConfigError, ProfileError
from xllm_lab.hardware import Link
from xllm_lab.known_models import known_model
from xllm_lab.sim.cost import Batch
from xllm_lab.sim.cost.collectives import Collectives
from xllm_lab.sim.cost.profile_bundle import ProfileBundle, read_bundle
from xllm_lab.sim.cost.profiled import CALLS_PER_LAYER, ProfiledCost
from xllm_lab.step_time import Chunk

MODEL = known_model("llama-3.1-8b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("plain") / "profile")


@pytest.fixture(scope="module")
def skewed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("skewed") / "profile", skew=True)


@pytest.fixture(scope="module")
def cost(folder: Path) -> ProfiledCost:
    return ProfiledCost(read_bundle(folder), MODEL)


@pytest.fixture(scope="module")
def skewed(skewed_folder: Path) -> ProfiledCost:
    return ProfiledCost(read_bundle(skewed_folder), MODEL)


def links(num_devices: int) -> Collectives:
    link = Link(bytes_per_s=1e12, latency_us=0.0, num_devices=num_devices, frac=1.0)
    return Collectives(num_devices, link, kernel_us=0.0)


def decodes(n: int, kv: int, longest: int | None = None) -> Batch:
    return Batch((), n, n * kv, longest or kv, n)


def other_us(folder: Path, tokens: int, rows: int) -> float:
    """Everything but attention, read off the tables."""
    bundle = read_bundle(folder)
    layers = sum(calls * bundle.dense[name][tokens] for name, calls in CALLS_PER_LAYER.items() if name in bundle.dense)
    once = bundle.dense["embedding"][tokens] + bundle.dense["final_layernorm"][tokens]
    return MODEL.num_layers * layers + once + sum(times[rows] for times in bundle.per_sequence.values())


@given(decode_batches(max_seqs=64))
@settings(max_examples=60)
def test_many_steps_are_priced_as_one_by_one(cost: ProfiledCost, skewed: ProfiledCost, batch: Batch) -> None:
    check_decode_steps(cost, batch, 12)
    check_decode_steps(skewed, batch, 12)


@given(batches())
@settings(max_examples=100)
def test_every_batch_has_a_positive_price(cost: ProfiledCost, skewed: ProfiledCost, batch: Batch) -> None:
    assert cost.step(batch).us > 0
    assert skewed.step(batch).us > 0


def test_at_the_tables_points_a_step_is_their_sum(cost: ProfiledCost, folder: Path) -> None:
    for n in DECODES:
        price = cost.step(decodes(n, LENGTHS[1]))
        expected = other_us(folder, n, n) + MODEL.num_layers * attention_us(0, 0, n, LENGTHS[1])
        assert price.us == pytest.approx(expected, rel=1e-6)
        assert not price.is_extrapolated
    for chunk in CHUNKS:
        price = cost.step(Batch((Chunk(chunk, 64),), 0, 0, 0, 1))
        assert price.us == pytest.approx(
            other_us(folder, chunk, 1) + MODEL.num_layers * attention_us(chunk, 64, 0, 0), rel=1e-6
        )


def test_a_mixed_batch_shares_its_matrix_multiplications(cost: ProfiledCost) -> None:
    both = cost.step(Batch((Chunk(256, 0),), 16, 16 * 256, 256, 17)).us
    apart = cost.step(Batch((Chunk(256, 0),), 0, 0, 0, 1)).us + cost.step(decodes(16, 256)).us
    assert both < 0.8 * apart


def test_time_grows_with_tokens_and_with_context(cost: ProfiledCost) -> None:
    by_tokens = [cost.step(Batch((Chunk(n, 0),), 0, 0, 0, 1)).us for n in range(16, 512, 16)]
    by_context = [cost.step(decodes(8, kv)).us for kv in range(1, 2000, 50)]
    by_decodes = [cost.step(decodes(n, 256)).us for n in range(1, 33)]
    by_chunks = [cost.step(Batch((Chunk(64, 0),) * n, 0, 0, 0, n)).us for n in range(1, 8)]
    for times in (by_tokens, by_context, by_decodes, by_chunks):
        assert times == sorted(times)


def test_the_order_of_chunks_does_not_matter(cost: ProfiledCost) -> None:
    chunks = (Chunk(100, 0), Chunk(64, 128), Chunk(100, 64))
    prices = {cost.step(Batch(p, 4, 400, 100, 7)).us for p in (chunks, chunks[::-1], (chunks[1], *chunks[::2]))}
    assert len(prices) == 1


@pytest.mark.parametrize(
    ("batch", "outside"),
    [
        (decodes(32, 64), False),
        (decodes(33, 64), True),
        (decodes(4, 1024), False),
        (decodes(4, 1025), True),
        (decodes(32, 600), True),  # the longest contexts of the largest batches were not measured
        (Batch((Chunk(496, 0),), 16, 1600, 100, 17), False),
        (Batch((Chunk(512, 0),), 16, 1600, 100, 17), True),  # 528 tokens
        (Batch((Chunk(256, 1024),), 0, 0, 0, 1), False),
        (Batch((Chunk(256, 1025),), 0, 0, 0, 1), True),
        (Batch((Chunk(64, 0),), 17, 1700, 100, 18), True),  # decodes beside a chunk end at 16
        (Batch((Chunk(5, 0),), 1, 3, 3, 2), False),  # less than the smallest is not beyond
    ],
)
def test_what_was_not_measured_is_told(cost: ProfiledCost, batch: Batch, outside: bool) -> None:
    assert cost.step(batch).is_extrapolated is outside


def test_a_length_measured_for_a_chunk_alone_does_not_hide_the_decodes(cost: ProfiledCost) -> None:
    alone = cost.step(Batch((Chunk(496, 500),), 0, 0, 0, 1)).us
    mixed = cost.step(Batch((Chunk(480, 500),), 16, 16 * 1024, 1024, 17)).us
    assert mixed - alone > 0.5 * MODEL.num_layers * (attention_us(0, 0, 16, 1024) - 8)


def test_tokens_are_padded_to_the_graph_but_attention_is_not(folder: Path) -> None:
    cost = ProfiledCost(read_bundle(folder), MODEL)
    expected = other_us(folder, 32, 16) + MODEL.num_layers * attention_us(0, 0, 16, 64)
    assert cost.step(decodes(16, 64)._replace(graph_tokens=32)).us == pytest.approx(expected, rel=1e-6)


def test_matrix_products_compute_whole_tiles(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "profile", attention=lambda *point: 8.0)
    cost = ProfiledCost(read_bundle(folder), MODEL)

    def us(tokens: int) -> float:
        return cost.step(Batch((Chunk(tokens, 0),), 0, 0, 0, 1)).us

    assert us(129) == us(144) < us(145) == us(160)
    measured = other_us(folder, 128, 1) + MODEL.num_layers * 8.0
    assert us(128) == pytest.approx(measured, rel=1e-6)  # a size that was measured is as it was measured


def test_skew_adds_what_the_sweep_says(skewed_folder: Path, folder: Path) -> None:
    cost, plain = ProfiledCost(read_bundle(skewed_folder), MODEL), ProfiledCost(read_bundle(folder), MODEL)
    # Half of 8 decodes have 256 tokens, half 64: 160 on average; the sweep found 0.2 * (1 - 1/2) more.
    batch = Batch((), 8, 8 * 160, 256, 8)
    attention = plain.step(batch).us - other_us(folder, 8, 8)
    assert cost.step(batch).us == pytest.approx(plain.step(batch).us + 0.1 * attention, rel=1e-6)
    mixed = Batch((Chunk(64, 0),), 8, 8 * 160, 256, 9)
    assert cost.step(mixed).us > plain.step(mixed).us
    assert cost.step(decodes(8, 160)).us == plain.step(decodes(8, 160)).us  # equally long: nothing to add


@pytest.mark.parametrize("name", ["qkv_proj", "embedding", "down_proj", "lm_head", "sampler"])
def test_a_missing_operator_is_refused(tmp_path: Path, name: str) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "profile", without=(name,)))
    with pytest.raises(ProfileError, match=f"csv: no rows of {name}, which"):
        ProfiledCost(bundle, MODEL)


def test_an_operator_nobody_knows_is_refused_and_not_dropped(tmp_path: Path) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "profile", more={"swizzle": 3.0}))
    with pytest.raises(ProfileError, match=r"dense.csv: layer 'swizzle' is not known; known are layernorm"):
        ProfiledCost(bundle, MODEL)


def test_normed_queries_need_their_norm(tmp_path: Path) -> None:
    qwen = known_model("qwen3-8b")
    with pytest.raises(ProfileError, match="no rows of qk_norm"):
        ProfiledCost(read_bundle(write_bundle(tmp_path / "without")), qwen)
    ProfiledCost(read_bundle(write_bundle(tmp_path / "with", more={"qk_norm": 3.0})), qwen)


def test_experts_come_from_their_own_table(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "profile", more={"qk_norm": 3.0}, without=("gate_up_proj", "act_fn", "down_proj"))
    model = known_model("qwen3-30b-a3b")
    with pytest.raises(ProfileError, match=r"moe.csv: no such file, and Qwen/Qwen3-30B-A3B has experts"):
        ProfiledCost(read_bundle(folder), model)
    rows = [f"{n},{e},{e * 6.0 + n * 0.5}" for n in TOKENS for e in (8, 32, 128) if e <= 8 * n]
    (folder / "tp1" / "moe.csv").write_text("tokens,activated_experts,time_us\n" + "\n".join(rows) + "\n")
    cost = ProfiledCost(read_bundle(folder), model)
    few, many = (cost.step(decodes(n, 64)).us for n in (1, 16))
    assert model.experts is not None
    # 16 tokens choose 8 of 128 experts each, evenly: about 83 are read instead of 8.
    activated = model.experts.num_activated(16)
    assert many - few > model.num_layers * 6.0 * (activated - 8)


def test_tensor_parallelism_needs_a_link_and_pays_for_it(tmp_path: Path) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "profile", tensor_parallel=2), 2)
    with pytest.raises(ConfigError, match="need the link"):
        ProfiledCost(bundle, MODEL)
    fast, slow = (
        ProfiledCost(bundle, MODEL, links=partial(Collectives, link=link, kernel_us=0.0))
        for link in (
            Link(bytes_per_s=1e12, latency_us=1.0, num_devices=2, frac=1.0),
            Link(bytes_per_s=1e10, latency_us=1.0, num_devices=2, frac=1.0),
        )
    )
    batch = Batch((Chunk(256, 0),), 0, 0, 0, 1)
    num_bytes = 256 * MODEL.hidden_size * 2
    extra_us = 2 * MODEL.num_layers * num_bytes * (1 / 1e10 - 1 / 1e12) * 1e6
    assert slow.step(batch).us - fast.step(batch).us == pytest.approx(extra_us)


@pytest.fixture(scope="module")
def experts_bundle(tmp_path_factory: pytest.TempPathFactory) -> ProfileBundle:
    folder = write_bundle(
        tmp_path_factory.mktemp("experts") / "profile",
        more={"qk_norm": 3.0},
        without=("gate_up_proj", "act_fn", "down_proj"),
    )
    rows = [f"{n},{e},{e * 6.0 + n * 0.5}" for n in TOKENS for e in (8, 32, 128)]
    (folder / "tp1" / "moe.csv").write_text("tokens,activated_experts,time_us\n" + "\n".join(rows) + "\n")
    return read_bundle(folder)


def test_a_group_ends_with_its_slowest_and_pays_for_all_tokens(experts_bundle: ProfileBundle) -> None:
    model = known_model("qwen3-30b-a3b")
    group = ProfiledCost(experts_bundle, model, links=links, data_parallel=2, expert_parallel=2)
    few, many, none = decodes(4, 64), decodes(16, 256), Batch((), 0, 0, 0, 0)
    both = group.together([few, many])
    assert both == group.together([many, few])
    assert both.us > group.together([many]).us > group.together([few]).us
    assert group.together([many, many]).us > both.us
    # Half of the experts are on each device, which is cheaper than all of them on one.
    assert group.together([many, many]).us < ProfiledCost(experts_bundle, model).step(many).us + 1000
    assert group.together([many, none._replace(prefills=(Chunk(256, 0),), num_logits=1)]).us > both.us


def test_a_group_is_padded_to_the_most_tokens_where_a_graph_is_replayed(experts_bundle: ProfileBundle) -> None:
    model = known_model("qwen3-30b-a3b")
    group = ProfiledCost(experts_bundle, model, links=links, data_parallel=2, expert_parallel=2)
    two, thirteen, sixteen = (decodes(n, 64)._replace(graph_tokens=16) for n in (2, 13, 16))
    assert group.together([two, sixteen]) == group.together([thirteen, sixteen])


@pytest.mark.parametrize(("data", "expert"), [(2, 1), (2, 3), (1, 2)])
def test_impossible_groups_are_refused(experts_bundle: ProfileBundle, data: int, expert: int) -> None:
    """Whole experts are spread over all devices or none; and devices are joined by something."""
    with pytest.raises(ConfigError, match=r"expert_parallel is|need the link"):
        ProfiledCost(experts_bundle, known_model("qwen3-30b-a3b"), data_parallel=data, expert_parallel=expert)


def test_one_instance_of_a_group_of_one_steps_alone(experts_bundle: ProfileBundle) -> None:
    cost = ProfiledCost(experts_bundle, known_model("qwen3-30b-a3b"))
    for batch in (decodes(7, 100), Batch((Chunk(100, 3),), 4, 400, 120, 5)):
        assert cost.together([batch]) == cost.step(batch)


def test_alike_instances_step_as_a_group_of_them(experts_bundle: ProfileBundle) -> None:
    group = ProfiledCost(experts_bundle, known_model("qwen3-30b-a3b"), links=links, data_parallel=4, expert_parallel=4)
    for batch in (decodes(7, 100), Batch((Chunk(100, 3),), 4, 400, 120, 5)):
        assert group.together([batch] * 4).us == pytest.approx(group.step(batch).us, rel=1e-12)


def test_a_bundle_of_several_ep_is_read_by_a_devices_rows(tmp_path: Path) -> None:
    """Later profilers count the tokens of all devices: half of a token's rows are on each of two."""
    folder = write_bundle(tmp_path / "profile", model="Qwen/Qwen3-30B-A3B", more={"qk_norm": 3.0})
    rows = [f"{ep},{n},{e},{e * 6.0 + n / ep}" for ep in (1, 2) for n in (8, 64) for e in (8 // ep, 128 // ep)]
    table = folder / "tp1" / "moe.csv"
    table.write_text("ep,tokens,activated_experts,time_us\n" + "\n".join(rows) + "\n")
    assert read_bundle(folder).moe[8.0, 128] == 128 * 6.0 + 8
    assert read_bundle(folder, 1, 2).moe == {(n / 2, e): e * 6.0 + n / 2 for n in (8, 64) for e in (4, 64)}
    assert read_bundle(folder, 1, 4).moe == read_bundle(folder).moe  # a device's rows are a device's rows
    table.write_text("ep,tokens,activated_experts,time_us\n2,8,8,9.0\n")
    with pytest.raises(ProfileError, match="ep is 2; rows of 4 or 1 are expected"):
        read_bundle(folder, 1, 4)
