"""Executed batches as samples that a step-time model can be fitted to.

A step's time depends on how many tokens each sequence has in KV. A profiler may say so, in three ways:

1. every request with its computed tokens (vLLM): exact;
2. requests and their iterations only (MindIE), and request.csv has their prompts: a request in iteration 0 computes
   its prompt, in iteration i > 0 one token after prompt + i - 1 others. Prefix hits are not in it;
3. counts only, and the KV blocks in use: blocks x tokens a block, less half a block a sequence for the last one and
   less what the step itself writes, is shared out evenly among the decodes, and prompts start at nothing. Blocks that
   requests outside the batch hold are counted in. The size of a block is in no file and has to be given.

A batch for which none of these works is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from xllm_lab.errors import ConfigError
from xllm_lab.profiles.profile import BatchRow, LeftOut, Profile, SequencePart
from xllm_lab.step_samples import StepSample
from xllm_lab.step_time import Chunk

EXACT = "lengths as recorded"
FROM_REQUESTS = "lengths from request.csv, prefix hits unknown"
NO_CONTEXT = "prompts alone, taken to start at nothing"
FROM_BLOCKS = "lengths estimated from the KV blocks in use"

_NO_COUNTS = "neither its requests' lengths nor its tokens are recorded"
_NO_BLOCKS = "the KV blocks in use are not recorded"
_NO_BLOCK_SIZE = "its lengths need the tokens of a KV block, which no file tells"


@dataclass(frozen=True, slots=True)
class Steps:
    """Samples of a profile, in order of its batches.

    Attributes:
        bases: what the lengths of each sample rest on.
        left_out: batches that could not be used.
    """

    samples: tuple[StepSample, ...]
    bases: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def num_by_basis(self) -> dict[str, int]:
        """How many samples rest on what."""
        return dict(Counter(self.bases))


def steps(profile: Profile, *, kv_block_tokens: int | None = None) -> Steps:
    """The executed batches of a profile as samples.

    Args:
        kv_block_tokens: tokens of a KV block in the engine that was profiled.

    Raises:
        ConfigError: `kv_block_tokens` below 1.
    """
    if kv_block_tokens is not None and kv_block_tokens < 1:
        raise ConfigError(f"kv_block_tokens is {kv_block_tokens}, at least 1 is accepted")
    prompts = {request.request: request.prompt_tokens for request in profile.requests}
    samples: list[StepSample] = []
    bases: list[str] = []
    left_out: dict[str, tuple[int, float]] = {}
    for batch in profile.batches:
        found = _exact(batch) or _from_requests(batch, prompts) or _from_counts(batch, kv_block_tokens)
        if isinstance(found, str):
            num, us = left_out.get(found, (0, 0.0))
            left_out[found] = num + 1, us + batch.step_us
        else:
            samples.append(StepSample(chunks=found.chunks, num_logits=found.num_logits, step_us=batch.step_us))
            bases.append(found.basis)
    unused = tuple(LeftOut("batch.csv", why, num, us) for why, (num, us) in sorted(left_out.items()))
    return Steps(tuple(samples), tuple(bases), unused)


@dataclass(frozen=True, slots=True)
class _Composition:
    chunks: tuple[Chunk, ...]
    num_logits: int
    basis: str


def _exact(batch: BatchRow) -> _Composition | None:
    chunks = [_chunk(part) for part in batch.parts]
    known = [chunk for chunk in chunks if chunk is not None]
    if not known or len(known) < len(chunks):
        return None
    unfinished = sum(
        part.prompt_tokens is not None and sum(chunk) < part.prompt_tokens
        for part, chunk in zip(batch.parts, known, strict=True)
    )
    return _Composition(tuple(known), len(known) - unfinished, batch.basis or EXACT)


def _chunk(part: SequencePart) -> Chunk | None:
    if not part.num_tokens or part.num_computed_tokens is None:
        return None
    return Chunk(part.num_tokens, part.num_computed_tokens)


def _from_requests(batch: BatchRow, prompts: Mapping[str, int]) -> _Composition | None:
    chunks = []
    for part in batch.parts:
        prompt = prompts.get(part.request)
        # Where tokens are recorded, iterations may be chunks of a prompt.
        if not prompt or part.iteration is None or part.num_tokens is not None:
            return None
        chunks.append(Chunk(prompt, 0) if part.iteration == 0 else Chunk(1, prompt + part.iteration - 1))
    return _Composition(tuple(chunks), len(chunks), FROM_REQUESTS) if chunks else None


def _from_counts(batch: BatchRow, kv_block_tokens: int | None) -> _Composition | str:
    prefills = _shares(batch.prefill_tokens, batch.num_prefills)
    decodes = _shares(batch.decode_tokens, batch.num_decodes)
    if prefills is None or decodes is None or not (prefills or decodes):
        return _NO_COUNTS
    if not decodes:
        return _Composition(tuple(Chunk(n, 0) for n in prefills), len(prefills), NO_CONTEXT)
    if batch.used_blocks is None:
        return _NO_BLOCKS
    if kv_block_tokens is None:
        return _NO_BLOCK_SIZE
    written = sum(prefills) + sum(decodes)
    held = batch.used_blocks * kv_block_tokens - (len(prefills) + len(decodes)) * (kv_block_tokens - 1) / 2 - written
    contexts = _even(max(round(held), 0), len(decodes))
    chunks = [Chunk(n, 0) for n in prefills] + list(map(Chunk, decodes, contexts))
    return _Composition(tuple(chunks), len(chunks), FROM_BLOCKS)


def _shares(tokens: int | None, seqs: int | None) -> list[int] | None:
    """Tokens of each sequence, as even as can be; None if a count is missing or some sequence would have none."""
    if tokens is None or seqs is None or tokens < seqs or (tokens and not seqs):
        return None
    return _even(tokens, seqs)


def _even(total: int, parts: int) -> list[int]:
    """`total` in `parts` numbers that differ by 1 at most."""
    if parts == 0:
        return []
    share, rest = divmod(total, parts)
    return [share + (k < rest) for k in range(parts)]
