"""The requests of a profiled server as a trace."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_lab.errors import ProfileError
from xllm_lab.profiles.profile import LeftOut, Profile, RequestRow
from xllm_lab.workload import LONGEST_US, Prompt, Request, RequestId, Workload

_NO_ARRIVAL = "a request whose arrival is not recorded"
_NO_TOKENS = "a request without a prompt or without an output"


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of a profile, in order of arrival.

    Attributes:
        workload: None if no request can be served again.
        left_out: requests that cannot.
    """

    workload: Workload | None
    left_out: tuple[LeftOut, ...]


def trace(profile: Profile, *, checksum: str = "") -> Trace:
    """The requests that tell when they came and how long they were; the first arrives at 0.

    Prompts are of unique tokens: no profiler tells which ones began alike.

    Args:
        checksum: of the profile's files.

    Raises:
        ProfileError: requests that are more than 30 years apart.
    """
    served: list[tuple[int, RequestRow]] = []
    counts: dict[str, list[float]] = {}
    for request in profile.requests:
        if request.arrival_us is not None and request.prompt_tokens and request.output_tokens:
            served.append((request.arrival_us, request))
        else:
            counts.setdefault(_NO_ARRIVAL if request.arrival_us is None else _NO_TOKENS, []).append(request.e2e_us)
    name = profile.path.resolve().name
    left_out = tuple(LeftOut(name, why, len(us), sum(us)) for why, us in sorted(counts.items()))
    if not served:
        return Trace(None, left_out)
    # By time alone: of equal times, the rows' order stays.
    served.sort(key=lambda pair: pair[0])
    start_us, end_us = served[0][0], served[-1][0]
    if end_us - start_us > LONGEST_US:
        span = f"requests arrive over {(end_us - start_us) / 1e6:g} s"
        raise ProfileError(f"{profile.path}: {span}; at most {LONGEST_US / 1e6:g} s are accepted")
    requests = tuple(
        Request(
            id=RequestId(number),
            arrival_us=arrival_us - start_us,
            prompt=Prompt(num_tokens=request.prompt_tokens),
            output_tokens=request.output_tokens,
        )
        for number, (arrival_us, request) in enumerate(served)
    )
    return Trace(Workload(requests=requests, source=f"{name} ({profile.source})", checksum=checksum), left_out)
