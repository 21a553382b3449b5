"""What is counted at once is what trying each size, length and depth by itself would count."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.searches import CALIBRATION, default, workload
from xllm_lab.engine.drafts.ngram import _Index
from xllm_lab.tuning.space import Space
from xllm_lab.tuning.step_screen import StepScreen, screen
from xllm_lab.tuning.trace_facts import (
    MOST_DEPTH,
    MOST_NGRAM,
    kv_fit,
    lookups,
    prompt_keys,
    reuse_curve,
    walk,
)

BLOCK = 16
CHAINS = st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=25)


def found_by_a_cache(prompts: list[list[tuple[int, ...]]], num_blocks: int) -> int:
    """Tokens, by a least-recently-used cache of so many blocks, tried by itself."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    found = 0
    for keys in prompts:
        is_prefix = True
        for key in keys:
            is_prefix = is_prefix and key in cache
            found += BLOCK * is_prefix
            cache.pop(key, None)
            cache[key] = None
            if len(cache) > num_blocks:
                cache.popitem(last=False)
    return found


@given(CHAINS, st.integers(1, 30))
def test_one_pass_knows_every_cache_size(chains: list[list[int]], num_blocks: int) -> None:
    """A block's key names all before it, as a real one does."""
    prompts = [[tuple(chain[: k + 1]) for k in range(len(chain))] for chain in chains]
    curve = reuse_curve(prompts, block_size=BLOCK, num_tokens=1)
    assert curve.hit_frac(num_blocks) == found_by_a_cache(prompts, num_blocks)


def test_a_larger_cache_finds_no_less() -> None:
    keys = prompt_keys(workload(), block_size=BLOCK, vocab_size=1000)
    curve = reuse_curve(keys, block_size=BLOCK, num_tokens=100)
    fracs = [curve.hit_frac(n) for n in range(60)]
    assert fracs == sorted(fracs)


TEXT = st.lists(st.integers(0, 3), min_size=2, max_size=60)


@given(TEXT, st.integers(1, MOST_NGRAM), st.integers(1, MOST_DEPTH), st.data())
def test_every_n_and_depth_is_what_the_engines_lookup_drafts(
    tokens: list[int], n: int, depth: int, data: st.DataObject
) -> None:
    """Step by step, with the engine's own index."""
    num_prompt = data.draw(st.integers(1, len(tokens) - 1))
    steps, known = [], num_prompt + 1
    index = _Index(range(n, 0, -1))
    seen = 0
    while known < len(tokens):
        index.extend(tokens[seen:known])
        seen = known
        most = min(depth, len(tokens) - known - 1)
        draft = index.continuation(most) if most else []
        kept = next((k for k, t in enumerate(draft) if t != tokens[known + k]), len(draft))
        steps.append((len(draft), kept))
        known += kept + 1
    assert list(walk(lookups(tokens[:num_prompt], tokens[num_prompt:])[n - 1], depth)) == steps


def test_room_is_told_in_requests() -> None:
    """The longest of twelve requests needs 20 blocks of 16; a pool of 8 is too small for four of them."""
    fit = kv_fit(workload(), default(num_kv_blocks=8).instance)
    assert fit["longest_request_blocks"] == 20
    assert fit["requests_too_long"] == 4


def step_screen() -> StepScreen:
    keys = prompt_keys(workload(), block_size=BLOCK, vocab_size=1000)
    total = sum(r.prompt.num_tokens for r in workload().requests)
    curve = reuse_curve(keys, block_size=BLOCK, num_tokens=total)
    return StepScreen(workload(), CALIBRATION, curve, always=default())


def test_the_step_model_never_cuts_the_default() -> None:
    """Everything else is judged by it."""
    hopeless = replace(default().instance, max_tokens_per_batch=1, max_seqs_per_batch=1)
    one = replace(default(), instance=hopeless)
    keys = reuse_curve([], block_size=BLOCK, num_tokens=1)
    assert StepScreen(workload(), CALIBRATION, keys)(one) is not None
    assert StepScreen(workload(), CALIBRATION, keys, always=one)(one) is None


def test_what_passes_the_screen_comes_in_order_of_promise_and_differs() -> None:
    found = screen(Space(default()), step_screen(), num_start=4, seed=0, log2_count=6)
    assert found.num_enumerated == 64
    assert 0 < found.num_passed <= 64
    assert len({tuple(sorted(p.items())) for p in found.start}) == len(found.start) == 4


def test_an_enumeration_is_the_same_every_time() -> None:
    one, other = (screen(Space(default()), step_screen(), num_start=4, seed=3, log2_count=5) for _ in range(2))
    assert one == other
