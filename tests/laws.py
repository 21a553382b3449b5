"""What every run must obey, whoever served it and under which policy: plain functions of its records.

    conservation    every request has one record; every token is accounted for
    causality       nothing of a request happens before its arrival, after its end, or without its tokens' blocks
    time            steps are numbered without gaps and never overlap
    capacity        tokens, sequences and KV blocks of every step stay within the configuration
    catching up     step by step, computed tokens catch up with known ones; after a preemption from a cached prefix
    experts         each has a slot at any time; a change is decided, copied, and only then holds
    speculation     of a request's drafts as many are computed as there are, and what is not kept leaves no trace

`obey_the_laws` runs them all. Each raises AssertionError with a sentence.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from xllm_lab.copies import CopyRecord
from xllm_lab.errors import RequestTooLargeError
from xllm_lab.fleet_config import FleetConfig
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.api import ceil_div
from xllm_lab.rebalancing import ExpertLayout
from xllm_lab.records import FinishReason, Records, RequestRecord, StepRecord
from xllm_lab.workload import Prompt, Request, RequestId, TokenIds, Workload, prompt_token_ids

NEVER = 2**62
VOCAB_SIZE = 1000


def obey_the_laws(
    workload: Workload, config: InstanceConfig, records: Records, *, vocab_size: int = VOCAB_SIZE
) -> None:
    """All laws. `vocab_size` is the one the run's prompts were synthesised with."""
    every_request_has_one_record(workload, records)
    every_request_ends_as_it_should(workload, config, records)
    time_never_turns_back(records)
    every_step_fits(config, records)
    first_steps_are_told(records)
    drafts_are_told_alike(records)
    copies_lose_nothing(records)
    useful = without_wasted_rows(config, records)
    every_token_is_accounted_for(config, useful)
    nothing_comes_before_its_cause(workload, useful)
    computed_catches_up_with_known(config, useful, lost=[_loses(config, s) for s in records.steps])
    prefix_hits_were_computed_before(workload, config, records, vocab_size=vocab_size)  # rows in vain fill blocks, too


def fleet_obeys_the_laws(
    work: Workload, fleet: FleetConfig, config: InstanceConfig, records: Records, *, vocab_size: int = VOCAB_SIZE
) -> None:
    """What `this module` says of one instance, of each; and of all together what outages leave of it."""
    assert Counter(r.id for r in records.requests) == Counter(r.id for r in work.requests), "requests are lost or made"
    every_step_fits(config, records)
    for k in range(fleet.num_instances):
        steps = [s for s in records.steps if s.instance == k]
        assert [s.step for s in steps] == list(range(len(steps))), f"steps of instance {k} are not numbered in order"
        for one, other in pairwise(steps):
            assert one.end_us <= other.start_us, f"steps {one.step} and {other.step} of instance {k} overlap"
        for outage in fleet.outages:
            for step in steps if outage.instance == k else ():
                is_apart = step.end_us <= outage.start_us or step.start_us >= outage.end_us
                assert is_apart, f"instance {k} ran step {step.step} while it was down"
    for record in records.requests:
        times = list(record.token_times_us)
        in_order = sorted(times) if record.num_drafted else sorted(set(times))
        assert times == in_order, f"request {record.id} has tokens out of order"
        assert record.finish_us is not None, f"request {record.id} never ended"
        assert not times or record.arrival_us < times[0] <= times[-1] <= record.finish_us
        if record.finish_reason is FinishReason.LENGTH:
            asked = next(r.output_tokens for r in work.requests if r.id == record.id)
            assert record.output_tokens == asked, f"request {record.id} has {record.output_tokens} of {asked} tokens"
        handed_over_us = record.handed_over_us
        assert (handed_over_us is None) == (record.prefill_instance is None), f"request {record.id} is half handed over"
        if handed_over_us is not None:
            assert times[0] <= handed_over_us <= record.finish_us, f"request {record.id} is handed over out of turn"
            assert len(times) == 1 or handed_over_us < times[1], f"request {record.id} is handed over too late"
    if not fleet.outages:
        work, records = in_parts(work, records, vocab_size=vocab_size)
        for k in range(fleet.num_instances):
            # Without those whose client went away before an instance knew of them.
            computed = {i for s in records.steps for i in s.ids}
            known = [r for r in records.requests if r.id in computed or r.finish_reason != "cancelled"]
            mine = {r.id for r in known if r.instance == k}
            part = tuple(r for r in work.requests if r.id in mine)
            if part:
                own = Records(
                    [r for r in known if r.instance == k],
                    [s for s in records.steps if s.instance == k],
                    [c for c in records.copies if c.instance == k],
                )
                obey_the_laws(replace(work, requests=part), config, own, vocab_size=vocab_size)


def in_parts(work: Workload, records: Records, *, vocab_size: int) -> tuple[Workload, Records]:
    """A request that was handed over as two: one of a single output token; and one that begins with it, of another id.

    What is then left to tell of the second, its steps tell.
    """
    if all(r.handed_over_us is None for r in records.requests):
        return work, records
    sent = {r.id: r for r in work.requests}
    handed_us: dict[int, int] = {r.id: r.handed_over_us for r in records.requests if r.handed_over_us is not None}
    steps = [_with_second_parts(step, handed_us) for step in records.steps]
    requests: list[Request] = []
    parts: list[RequestRecord] = []
    for told in records.requests:
        record = replace(told, output_token_ids=array("i", map(_not_negative, told.output_token_ids)))
        request = sent[record.id].at(record.arrival_us)
        if record.handed_over_us is None:
            requests.append(request)
            parts.append(record)
            continue
        prompt = prompt_token_ids(request, vocab_size=vocab_size, seed=work.seed).tolist()
        first, second = _first_part(record, steps), _second_part(record, steps)
        requests.append(replace(request, prompt=_of(prompt), output_tokens=1, cancel_us=None))
        requests.append(
            replace(
                request,
                id=second.id,
                arrival_us=second.arrival_us,
                prompt=_of([*prompt, first.output_token_ids[0]]),
                output_tokens=request.output_tokens - 1,
                cancel_us=None if request.cancel_us is None else max(request.cancel_us, second.arrival_us),
            )
        )
        parts += [first, second]
    copies = [_with_second_part(copy, handed_us) for copy in records.copies]
    return replace(work, requests=tuple(requests), closed_loop=None), Records(parts, steps, copies)


_OTHER_IDS = 1_000_000


def _of(token_ids: list[int]) -> Prompt:
    return Prompt(num_tokens=len(token_ids), token_ids=tuple(token_ids))


def _not_negative(token: int) -> int:
    """A prompt has no placeholders."""
    return token if token >= 0 else _OTHER_IDS - token


def _with_second_parts(step: StepRecord, handed_us: Mapping[int, int]) -> StepRecord:
    """A row that was planned ahead of the handover is still the first part's, in vain."""
    lists = {
        name: [i + _OTHER_IDS if handed_us.get(i, NEVER) < step.start_us else i for i in getattr(step, name)]
        for name in ("ids", "admitted", "preempted", "draft_ids")
    }
    return replace(step, **lists)  # type: ignore[arg-type]


def _with_second_part(copy: CopyRecord, handed_us: Mapping[int, int]) -> CopyRecord:
    if copy.request is None or handed_us.get(copy.request, NEVER) > copy.asked_us:
        return copy
    return replace(copy, request=RequestId(copy.request + _OTHER_IDS))


def _first_part(record: RequestRecord, steps: Sequence[StepRecord]) -> RequestRecord:
    assert record.prefill_instance is not None
    return replace(
        record,
        instance=record.prefill_instance,
        token_times_us=record.token_times_us[:1],
        output_token_ids=record.output_token_ids[:1],
        num_preemptions=sum(record.id in s.preempted for s in steps),
        finish_us=record.token_times_us[0],
        finish_reason=FinishReason.LENGTH,
        num_drafted=array("i"),
        num_accepted=array("i"),
    )


def _second_part(record: RequestRecord, steps: Sequence[StepRecord]) -> RequestRecord:
    assert record.handed_over_us is not None
    part = RequestId(record.id + _OTHER_IDS)
    own = [s for s in steps if part in s.ids]
    return replace(
        record,
        id=part,
        arrival_us=record.handed_over_us + 1,
        prompt_tokens=record.prompt_tokens + 1,
        cached_tokens=own[0].num_computed_tokens[own[0].ids.index(part)] if own else 0,
        first_scheduled_us=own[0].start_us if own else None,
        token_times_us=record.token_times_us[1:],
        output_token_ids=record.output_token_ids[1:],
        num_preemptions=sum(part in s.preempted for s in steps),
    )


def without_wasted_rows(config: InstanceConfig, records: Records) -> Records:
    """The records without rows of requests that had ended when their step began.

    Only who plans ahead has any, and of each request at most one.
    """
    if config.async_scheduling == "off":
        return records
    ended_us: dict[int, int] = {r.id: r.finish_us or 0 for r in records.requests}
    wasted: Counter[int] = Counter()
    steps: list[StepRecord] = []
    for step in records.steps:
        rows = [c for c in _chunks(step) if ended_us[c[0]] > step.start_us]
        if len(rows) == len(step.ids):
            steps.append(step)
            continue
        kept = [c[0] for c in rows]
        wasted.update(set(step.ids) - set(kept))
        steps.append(
            replace(
                step,
                ids=kept,
                num_tokens=[c[1] for c in rows],
                num_computed_tokens=[c[2] for c in rows],
                admitted=[i for i in step.admitted if i in kept],
                num_logits=-1,
            )
        )
    assert max(wasted.values(), default=0) <= 1, f"requests have rows in vain: {wasted}"
    return Records(records.requests, steps, records.copies)


def drafts_are_told_alike(records: Records) -> None:
    """Speculation: steps and requests tell of the same drafts, and none is kept that was not there."""
    drafted: dict[int, Counter[int]] = {r.id: Counter() for r in records.requests}
    accepted: dict[int, Counter[int]] = {r.id: Counter() for r in records.requests}
    ended_us: dict[int, int] = {r.id: r.finish_us or 0 for r in records.requests}
    for step in records.steps:
        computed = {i: n for i, n, _ in _chunks(step)}
        for i, asked, num_drafted, num_accepted in zip(
            step.draft_ids, step.num_asked, step.num_drafted, step.num_accepted, strict=True
        ):
            counts = f"step {step.step}, request {i}: {num_accepted} of {num_drafted} drafts, asked for {asked}"
            assert 0 <= num_accepted <= num_drafted <= asked, counts
            assert computed[i] == 1 + num_drafted, f"{counts}, computes {computed[i]}"
            if ended_us[i] >= step.end_us:
                drafted[i].update(range(num_drafted))
                accepted[i].update(range(num_accepted))
    for record in records.requests:
        for told, steps in ((record.num_drafted, drafted), (record.num_accepted, accepted)):
            counted = [steps[record.id][k] for k in range(len(told))]
            assert list(told) == counted, f"request {record.id} says {list(told)} drafts, its steps {counted}"


def first_steps_are_told(records: Records) -> None:
    """Conservation: a request was first scheduled when the first step that computes some of it started."""
    first_us: dict[int, int] = {}
    for step in records.steps:
        for request_id in step.ids:
            first_us.setdefault(request_id, step.start_us)
    for record in records.requests:
        told, begun = record.first_scheduled_us, first_us.get(record.id)
        # A step that was planned ahead may start after its request's client went away.
        is_late = told is None and record.finish_reason is FinishReason.CANCELLED
        assert told == begun or is_late, f"request {record.id} was first scheduled at {told}, its first step at {begun}"


def every_request_has_one_record(workload: Workload, records: Records) -> None:
    """Conservation: no request is lost, invented or changed on the way into its record."""
    counts = Counter(r.id for r in records.requests)
    for request in workload.requests:
        assert counts[request.id] == 1, f"request {request.id} has {counts[request.id]} records"
    sent: dict[int, Request] = {r.id: r for r in workload.requests}
    for record in records.requests:
        assert record.id in sent, f"request {record.id} has a record and was never sent"
        request = sent[record.id]
        told = (record.prompt_tokens, record.priority, record.ttft_slo_us, record.tpot_slo_us, record.e2e_slo_us)
        slo = request.slo
        asked = (request.prompt.num_tokens, request.priority, slo.ttft_us, slo.tpot_us, slo.e2e_us)
        assert told == asked, f"request {record.id} asked for {asked}, its record says {told}"


def every_request_ends_as_it_should(workload: Workload, config: InstanceConfig, records: Records) -> None:
    """Conservation: served requests have their tokens, and the others a reason to have fewer."""
    for request, record in _pairs(workload, records):
        got, asked = record.output_tokens, request.output_tokens
        name = f"request {record.id}, {record.finish_reason},"
        assert record.finish_us is not None, f"{name} never ended"
        assert len(record.output_token_ids) == got, f"{name} has {len(record.output_token_ids)} tokens and {got} times"
        match record.finish_reason:
            case FinishReason.LENGTH:
                assert got == asked, f"{name} produced {got} of {asked} tokens"
            case FinishReason.STOP:
                assert 1 <= got <= asked, f"{name} produced {got} tokens, asked for at most {asked}"
            case FinishReason.CANCELLED:
                assert request.cancel_us is not None, f"{name} has a patient client"
                assert got < asked, f"{name} had all its {asked} tokens already"
                patience_us = request.cancel_us - request.arrival_us
                left_us = record.arrival_us + patience_us
                assert record.finish_us >= left_us, f"{name} ended at {record.finish_us}, its client left at {left_us}"
            case _:
                assert got == 0, f"{name} produced {got} tokens"
                assert record.first_scheduled_us is None, f"{name} was scheduled"
        too_large = _is_too_large(config, request)
        is_rejected = record.finish_reason is FinishReason.REJECTED
        assert too_large == is_rejected, f"{name} {'can never' if too_large else 'can'} run here"


def every_token_is_accounted_for(config: InstanceConfig, records: Records) -> None:
    """Conservation: steps and requests tell of the same tokens, preemptions, and first steps."""
    computed: Counter[int] = Counter()
    preempted: Counter[int] = Counter()
    num_rejected = 0
    for step in records.steps:
        preempted.update(step.preempted)
        rejected = _rejected(step)
        num_rejected += sum(rejected.values())
        for request_id, num_tokens in zip(step.ids, step.num_tokens, strict=True):
            computed[request_id] += num_tokens - rejected.get(request_id, 0)
    for record in records.requests:
        name = f"request {record.id}"
        counts = (record.num_preemptions, preempted[record.id])
        assert counts[0] == counts[1], f"{name} lost its KV {counts[0]} times, in {counts[1]} steps"
        if record.finish_reason in (FinishReason.LENGTH, FinishReason.STOP) and not record.num_preemptions:
            missing = record.prompt_tokens - record.cached_tokens + record.output_tokens - 1
            assert computed[record.id] == missing, f"{name} needed {missing} tokens, got {computed[record.id]}"
    if any(s.num_logits < 0 for s in records.steps):
        return  # it had wasted rows
    drawn = sum(r.output_tokens for r in records.requests)
    rows = sum(s.num_logits for s in records.steps) - num_rejected
    most = 1 + max((n for s in records.steps for n in s.num_accepted), default=0)
    discarded = sum(most for r in records.requests if r.finish_reason is FinishReason.CANCELLED)
    if config.async_scheduling != "off":  # a token under way may be lost with its KV
        discarded += sum(r.num_preemptions for r in records.requests)
    assert drawn <= rows <= drawn + discarded, f"{rows} rows of logits for {drawn} tokens, {discarded} cancelled"


def time_never_turns_back(records: Records) -> None:
    """Time: steps count 0, 1, 2, ..., each lasts, and none starts before the one before it ended."""
    for index, step in enumerate(records.steps):
        assert step.step == index, f"step {index} is numbered {step.step}"
        assert step.start_us < step.end_us, f"step {index} starts at {step.start_us} and ends at {step.end_us}"
    for before, after in pairwise(records.steps):
        assert before.end_us <= after.start_us, f"steps {before.step} and {after.step} overlap"


def nothing_comes_before_its_cause(workload: Workload, records: Records) -> None:
    """Causality: arrival <= first scheduled < first token < ... < last token <= finish, and no work outside."""
    for request, record in _pairs(workload, records):
        name, times, finish_us = f"request {record.id}", record.token_times_us, record.finish_us
        assert finish_us is not None
        if workload.closed_loop is None:
            assert record.arrival_us == request.arrival_us, f"{name} arrived at {record.arrival_us}, was sent otherwise"
        assert record.arrival_us <= finish_us, f"{name} ended before it arrived"
        if record.first_scheduled_us is not None:
            assert record.arrival_us <= record.first_scheduled_us, f"{name} was scheduled before it arrived"
        for before, after in pairwise(times):
            is_later = before <= after if record.num_drafted else before < after
            assert is_later, f"{name} has tokens at {before} and then at {after}"
        if times:
            assert record.first_scheduled_us is not None, f"{name} has tokens and was never scheduled"
            assert record.first_scheduled_us < times[0], f"{name} has a token before its first step ended"
            assert times[-1] <= finish_us, f"{name} has a token after its end"
    lives: dict[int, RequestRecord] = {r.id: r for r in records.requests}
    for step in records.steps:
        for request_id in step.ids:
            record = lives[request_id]
            assert record.arrival_us <= step.start_us, f"step {step.step} computes request {request_id} before it came"
            assert (record.finish_us or 0) > step.start_us, f"step {step.step} computes request {request_id} ended"


def every_step_fits(config: InstanceConfig, records: Records) -> None:
    """Capacity: no step takes more tokens, sequences or KV blocks than the instance has."""
    for step in records.steps:
        name = f"step {step.step}"
        tokens, sequences = sum(step.num_tokens), len(step.ids)
        assert step.ids, f"{name} is empty"
        assert len(set(step.ids)) == sequences, f"{name} schedules a request twice: {step.ids}"
        assert tokens <= config.max_tokens_per_batch, f"{name} has {tokens} of {config.max_tokens_per_batch} tokens"
        assert sequences <= config.max_seqs_per_batch, f"{name} has {sequences} of {config.max_seqs_per_batch} seqs"
        blocks = step.num_used_blocks + step.num_idle_blocks
        assert blocks <= config.num_kv_blocks, f"{name} has {blocks} of {config.num_kv_blocks} KV blocks"
        assert config.enable_prefix_cache or step.num_idle_blocks == 0, f"{name} has cached blocks without a cache"


FILLS, READS = ("offload", "prefetch"), ("restore", "save")


def copies_lose_nothing(records: Records) -> None:
    """Tiers: a block of the host is filled while free, read while full, given up while nobody reads it; copies of one
    kind end in the order in which they are asked for, after they are."""
    filled: dict[int, int] = {}  # block of the host: when the copy there ended
    read_until: Counter[int] = Counter()
    reserved_until: Counter[int] = Counter()  # blocks of the host that a prefetch did not fill
    last_us: Counter[str] = Counter()
    for number, copy in enumerate(records.copies):
        told = f"copy {number} at {copy.asked_us} us"
        assert copy.copy == number, f"{told} says that it is {copy.copy}"
        end_us = NEVER if copy.end_us is None else copy.end_us
        assert end_us > copy.asked_us, f"{told} ends at {end_us}"
        assert end_us >= last_us[copy.kind], f"{told} overtakes another"
        last_us[copy.kind] = end_us
        for slot in copy.evicted:
            assert filled.pop(slot) <= copy.asked_us, f"{told} gives up block {slot}, which is being filled"
            assert read_until[slot] <= copy.asked_us, f"{told} gives up block {slot}, which is being read"
        num_blocks = max(len(copy.blocks), len(copy.slots))
        for ids, has_part in ((copy.blocks, ("offload", "restore", "push")), (copy.slots, (*FILLS, *READS))):
            assert len({*ids}) == len(ids) == (num_blocks if copy.kind in has_part else 0), f"{told} is torn"
        num_moved = num_blocks
        if copy.num_moved_tokens is not None:
            assert copy.end_us is not None, f"{told} moved something and has no end"
            num_moved, rest = divmod(copy.num_moved_tokens * num_blocks, copy.num_tokens)
            assert rest == 0, f"{told} moved a part of a block"
            assert num_moved == num_blocks or copy.kind in ("save", "prefetch", "push"), f"{told} moved {num_moved}"
            assert 0 <= num_moved <= num_blocks, f"{told} moved {num_moved} of {num_blocks} blocks"
        for position, slot in enumerate(copy.slots):
            if copy.kind in FILLS:
                assert slot not in filled, f"{told} fills block {slot}, which is full"
                assert reserved_until[slot] <= copy.asked_us, f"{told} fills block {slot}, which another may fill yet"
                if position < num_moved:
                    filled[slot] = end_us
                else:
                    reserved_until[slot] = end_us
            else:
                assert filled.get(slot, NEVER) <= copy.asked_us, f"{told} reads block {slot}, which is not full yet"
                read_until[slot] = max(read_until[slot], end_us)


@dataclass(slots=True)
class _Live:
    """A request as the steps alone tell it."""

    known: int
    computed: int = 0
    is_running: bool = False
    drawn: int = 0


def computed_catches_up_with_known(config: InstanceConfig, records: Records, *, lost: list[Sequence[int]]) -> None:
    """Catching up: replaying the steps yields every count in them, every token time, and the blocks in use.

    Args:
        lost: of each step, whose token of the step before is drawn anew.
    """
    ends: dict[int, RequestRecord] = {r.id: r for r in records.requests}
    live: dict[int, _Live] = {r.id: _Live(known=r.prompt_tokens) for r in records.requests}
    some_draft = any(r.num_drafted for r in records.requests)
    following = (*lost[1:], ())
    for step, lost_next in zip(records.steps, following, strict=False):
        _lose(live, step)
        for request_id in step.admitted:
            assert request_id in step.ids, f"step {step.step} admits request {request_id} and computes none of it"
            assert not live[request_id].is_running, f"step {step.step} admits request {request_id}, which runs already"
        drafted, rejected = dict(zip(step.draft_ids, step.num_drafted, strict=True)), _rejected(step)
        for request_id, num_tokens, num_computed in _chunks(step):
            one, name = live[request_id], f"step {step.step}, request {request_id}:"
            if request_id in step.admitted:
                _check_start(config, one, ends[request_id], num_computed, name)
                one.is_running, one.computed = True, num_computed
            assert one.is_running, f"{name} computes a request that holds no KV"
            assert num_computed == one.computed, f"{name} starts from {num_computed}, {one.computed} are computed"
            one.computed += num_tokens
            known = one.known + drafted.get(request_id, 0)
            assert one.computed <= known, f"{name} computes {one.computed} tokens, {known} are known or drafted"
        if config.async_scheduling == "off":  # who plans ahead counts blocks of requests that end meanwhile
            holders = [o for i, o in live.items() if o.is_running and (ends[i].finish_us or 0) > step.start_us]
            in_copies = sum(c.num_held_blocks for c in records.copies[: step.num_copies] if _is_under_way(c, step))
            _check_blocks(config, step, [o.computed for o in holders], in_copies)
        for request_id, num_tokens in rejected.items():
            live[request_id].computed -= num_tokens
        # With drafts or copies about, the next one may not be planned before this one is over.
        in_turns = some_draft or any(_is_under_way(c, step) for c in records.copies if c.asked_us <= step.start_us)
        rows = _draw(live, ends, step, lost=lost_next, in_turns=in_turns) + sum(step.num_drafted)
        assert step.num_logits in (rows, -1), f"step {step.step} has {step.num_logits} rows of logits, of {rows}"
    for request_id, one in live.items():
        times = ends[request_id].token_times_us
        assert one.drawn == len(times), f"request {request_id} has {len(times)} tokens, its steps drew {one.drawn}"


def prefix_hits_were_computed_before(
    workload: Workload, config: InstanceConfig, records: Records, *, vocab_size: int
) -> None:
    """Causality: what an admitted request found in KV was computed in an earlier step, for the same tokens."""
    size = config.block_size
    prompts = {
        r.id: prompt_token_ids(r, vocab_size=vocab_size, seed=workload.seed)
        for r in workload.requests
        if config.enable_prefix_cache
    }
    ids: dict[int, TokenIds] = {
        r.id: np.concatenate([prompts[r.id], np.asarray(r.output_token_ids, dtype=np.int32)])
        for r in records.requests
        if r.id in prompts
    }
    # What came from a store somebody computed some time.
    from_store = {c.request for c in records.copies if c.kind == "prefetch" and c.num_moved_tokens}
    computed = {
        ids[r][:end].tobytes() for r in from_store if r is not None for end in range(size, len(ids[r]) + 1, size)
    }
    for step in records.steps if config.enable_prefix_cache else []:
        for request_id, _, num_computed in _chunks(step):
            found = range(size, num_computed + 1, size) if request_id in step.admitted else ()
            for end in found:
                assert ids[request_id][:end].tobytes() in computed, (
                    f"step {step.step}: request {request_id} found {num_computed} tokens in KV, "
                    f"but [0, {end}) were never computed"
                )
        rejected = _rejected(step)
        for request_id, num_rows, num_computed in _chunks(step):
            num_tokens = num_rows - rejected.get(request_id, 0)
            for block in range(num_computed // size, (num_computed + num_tokens) // size):
                computed.add(ids[request_id][: (block + 1) * size].tobytes())


def is_repeatable(run: Callable[[], Records]) -> None:
    """Determinism: two runs leave the same records."""
    first, second = run(), run()
    for before, after in zip(first.steps, second.steps, strict=False):
        assert before == after, f"run twice, step {before.step} was {before} and then {after}"
    assert first == second, "run twice, the records differ"


def _pairs(workload: Workload, records: Records) -> Iterator[tuple[Request, RequestRecord]]:
    by_id: dict[int, RequestRecord] = {r.id: r for r in records.requests}
    return ((r, by_id[r.id]) for r in workload.requests)


def _chunks(step: StepRecord) -> Iterator[tuple[int, int, int]]:
    return zip(step.ids, step.num_tokens, step.num_computed_tokens, strict=True)


def _rejected(step: StepRecord) -> dict[int, int]:
    """Drafts that were computed in vain, by request."""
    drafts = zip(step.draft_ids, step.num_drafted, step.num_accepted, strict=True)
    return {i: drafted - accepted for i, drafted, accepted in drafts}


def _is_too_large(config: InstanceConfig, request: Request) -> bool:
    try:
        config.refuse_if_too_large(request)
    except RequestTooLargeError:
        return True
    return False


def _loses(config: InstanceConfig, step: StepRecord) -> Sequence[int]:
    """Whose token of the step before is drawn anew: who plans ahead takes KV away while that step runs.

    Where an end by length is foreseen that token counts all the same, unless its request is let in again at once.
    """
    match config.async_scheduling:
        case "off":
            return ()
        case "on":
            return step.preempted
    return [i for i in step.preempted if i in step.admitted]


def _lose(live: dict[int, _Live], step: StepRecord) -> None:
    for request_id in step.preempted:
        assert live[request_id].is_running, f"step {step.step} preempts request {request_id}, which holds no KV"
        live[request_id].is_running, live[request_id].computed = False, 0


def _check_start(config: InstanceConfig, one: _Live, record: RequestRecord, num_computed: int, name: str) -> None:
    assert num_computed % config.block_size == 0, f"{name} found {num_computed} tokens in KV, not full blocks"
    assert num_computed < one.known, f"{name} found all its {one.known} tokens in KV, none is left to compute"
    assert num_computed == 0 or config.enable_prefix_cache, f"{name} found tokens in KV without a prefix cache"
    if not one.drawn and record.num_preemptions == 0:
        assert num_computed == record.cached_tokens, f"{name} found {num_computed}, says {record.cached_tokens}"


def _is_under_way(copy: CopyRecord, step: StepRecord) -> bool:
    """When the step is planned, at its start."""
    return copy.end_us is None or copy.end_us > step.start_us


def _check_blocks(config: InstanceConfig, step: StepRecord, computed: list[int], num_in_copies: int) -> None:
    each = [ceil_div(c, config.block_size) for c in computed]
    least = max(each) if config.enable_prefix_cache else sum(each)
    each.append(num_in_copies)  # which tables may share
    told = f"step {step.step} uses {step.num_used_blocks} KV blocks, its requests need"
    assert least <= step.num_used_blocks <= sum(each), f"{told} {least} to {sum(each)}"


def _draw(
    live: dict[int, _Live], ends: dict[int, RequestRecord], step: StepRecord, *, lost: Sequence[int], in_turns: bool
) -> int:
    """Give every request that reached its known tokens its drafts that are kept, and one more; returns how many did.

    Args:
        lost: who lost its KV to the next step, and with it the token, if that step was planned while this one ran.
        in_turns: it may have been planned later.
    """
    rows = 0
    accepted = dict(zip(step.draft_ids, step.num_accepted, strict=True))
    for request_id in step.ids:
        one, record = live[request_id], ends[request_id]
        if one.computed < one.known:
            continue
        rows += 1
        if (record.finish_us or 0) < step.end_us:
            continue  # cancelled while the step ran
        times = record.token_times_us
        is_there = one.drawn < len(times) and times[one.drawn] == step.end_us
        if request_id in lost and not (in_turns and is_there):
            continue
        for _ in range(1 + accepted.get(request_id, 0)):
            who = f"request {request_id}"
            assert one.drawn < record.output_tokens, f"step {step.step} draws a token that {who} never got"
            told = record.token_times_us[one.drawn]
            assert told == step.end_us, f"{who} has a token at {told}, drawn in a step to {step.end_us}"
            one.known, one.drawn = one.known + 1, one.drawn + 1
    return rows


def experts_are_never_lost(records: Records, layout: ExpertLayout, num_redundant_experts: int) -> None:
    """At any time every expert has a slot, every step one placement, and a change comes after its cause."""
    slots = dict(zip(layout.layers, layout.first_slots(num_redundant_experts), strict=True))
    size = len(next(iter(slots.values())))
    starts = {s.step: s.start_us for s in records.steps}
    free_from_us, begun = 0, []
    for number, d in enumerate(records.decisions):
        assert d.decision == number, f"decision {d.decision} comes as number {number}"
        assert d.decided_us >= free_from_us, f"decision {number} was taken while another change was under way"
        assert len(d.slots) == size * len(d.layers), f"decision {number} fills {len(d.slots)} slots"
        after = {layer: tuple(d.slots[k * size : (k + 1) * size]) for k, layer in enumerate(d.layers)}
        moved = sum(a != b for layer, own in after.items() for a, b in zip(slots[layer], own, strict=True))
        assert d.num_moved_slots == moved, f"decision {number} copies {d.num_moved_slots} slots, {moved} change"
        for layer, own in after.items():
            assert set(own) == set(range(layout.num_experts)), f"decision {number} loses an expert of layer {layer}"
            per_device = size // layout.num_devices
            for device in range(layout.num_devices):
                here = own[device * per_device : (device + 1) * per_device]
                assert len(set(here)) == len(here), f"decision {number} doubles an expert on device {device}"
        if d.dropped_us is not None:
            assert (d.ready_us, d.active_step) == (None, None), f"decision {number} was given up and holds"
            free_from_us = d.dropped_us
        if d.active_step is not None:
            assert d.active_us == starts[d.active_step], f"decision {number} does not begin with its step"
            assert d.ready_us is not None, f"decision {number} holds and was never ready"
            assert d.decided_us <= d.ready_us <= d.active_us, f"decision {number} holds before it is ready"
            step = next(s for s in records.steps if s.step == d.active_step)
            assert set(step.num_tokens) == {1}, f"decision {number} begins with a step that computes prompts"
            slots |= after
            free_from_us = d.active_us
            begun.append(d.active_us)
    for load in records.expert_loads:
        num_begun = sum(us < load.end_us for us in begun)
        assert load.placement == num_begun, f"counters until {load.end_us} are of placement {load.placement}"
