"""What the tests of the report show on a page, and a reader of pages that refuses broken ones."""

from __future__ import annotations

import dataclasses
from array import array
from html.parser import HTMLParser
from pathlib import Path

from xllm_lab.candidate import Candidate
from xllm_lab.instance_config import InstanceConfig
from xllm_lab.policies.catalog import make_policy
from xllm_lab.policies.of_instance import Policies
from xllm_lab.request_state import placeholder
from xllm_lab.runs import Run, write_json, write_run
from xllm_lab.sim.calibrate import Calibration, Residual
from xllm_lab.step_time import TERMS, StepTime
from xllm_lab.workload import Prompt, Request, RequestId, Slo, Workload

HOSTILE = "<script>alert('a trace')</script>"
# Few enough blocks for preemptions; every field that the page reads differs from its neighbour.
CONFIG = InstanceConfig(block_size=16, num_kv_blocks=24, max_tokens_per_batch=128, enable_prefix_cache=False)
POLICY = make_policy("batch", "prefill-first", {"watermark_frac": 1.0})
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Walks a page: refuses tags that do not nest, and collects what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"{self.open} are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def calibration(factor: float = 1.0, *, highest: float = 1e9) -> Calibration:
    weights = {"eager_us": 3000.0, "token_us": 150.0, "sequence_us": 200.0, "kv_read_us": 0.5}
    return Calibration(
        step_time=StepTime(tuple(factor * weights.get(term, 0.0) for term in TERMS)),
        highest=tuple(0.0 if term == "replay_us" else highest for term in TERMS),
        residual=Residual(mape_frac=0.071, p90_frac=0.154, bias_frac=-0.004, num_steps=4321),
        model={"name": "a-model", "vocab_size": 1000, "kv_bytes_per_token": 64},
        hardware={"cpu": "a cpu", "system": "Linux"},
        runs=("day-one",),
    )


def workload(count: int = 24, source: str = "a-trace.jsonl") -> Workload:
    return Workload(
        requests=tuple(
            Request(
                id=RequestId(k),
                arrival_us=k * 8_000 + (k // 12) * 900_000,
                prompt=Prompt(num_tokens=40 + 13 * (k % 7)),
                output_tokens=8 + k % 9,
                slo=Slo(ttft_us=250_000),
            )
            for k in range(count)
        ),
        source=source,
        checksum="c0ffee",
        seed=5,
    )


def as_engine(run: Run, out: Path) -> Run:
    """The run as an engine would have left it: it drew tokens, and says so."""
    for request in run.records.requests:
        request.output_token_ids = array("i", [placeholder(request.id)] * request.output_tokens)
    timing = {"clock": "wall", "timer": "cpu", "threads": 1}
    return write_run(out, dataclasses.replace(run.manifest, host="engine", timing=timing), run.workload, run.records)


def verification(folder: Path, tuned_per_s: list[float], *, tuned: InstanceConfig | None = None) -> Path:
    """A folder as `verify` leaves it, but for the runs."""
    default = Candidate(instance=CONFIG, policies=Policies(POLICY))
    other = Candidate(instance=tuned or dataclasses.replace(CONFIG, num_kv_blocks=64), policies=Policies(POLICY))
    folder.mkdir(parents=True)
    value = {
        "default": default.as_dict(),
        "tuned": other.as_dict(),
        "gain": {"default_per_s": [9.8, 9.5, 10.2, 9.9], "tuned_per_s": tuned_per_s},
        "model": {"kv_bytes_per_token": 64},
    }
    write_json(folder / "verification.json", value)
    return folder


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
