"""Rules about xLLM's drafts, and about flags that nothing looks at while another is off.

Lines are of 3906f5a91 unless they say otherwise.
"""

from __future__ import annotations

from xllm_lab.tuning.lint.configuration import Form
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import conflict, drafts_on
from xllm_lab.tuning.lint.rules.switches import SWITCHES
from xllm_lab.tuning.lint.settings import Settings

ERROR, WARNING, NOTE = Severity
_XLLM = "xllm@3906f5a91 xllm/"
_MASTER = f"{_XLLM}core/distributed_runtime/master.cpp"
_PROFILE = f"{_XLLM}core/scheduler/profile/profile_manager.cpp"
_S1, _S2 = "87e8d6ed6", "3906f5a91"
_FLAGS = (Form.FLAGFILE, Form.COMMAND)


def _adapts(s: Settings) -> bool:
    return bool(s["num_speculative_tokens"] >= 2 and s["speculative_algorithm"] not in ("Eagle3", "Suffix"))


_DRAFTS = (
    conflict(
        "draft-model-missing",
        ERROR,
        ("draft_model", "num_speculative_tokens", "speculative_algorithm"),
        when=lambda s: drafts_on(s) and s["speculative_algorithm"] != "Suffix" and not s["draft_model"],
        says="speculative_algorithm={speculative_algorithm} without draft_model ends the program; only Suffix drafts "
        "without one",
        source=f"{_MASTER}:545",
        what="drafts without a model to make them",
        example="--num_speculative_tokens=2",
        since="0.9.1",
        forms=_FLAGS,
    ),
    conflict(
        "draft-model-elsewhere",
        NOTE,
        ("draft_model", "num_speculative_tokens", "speculative_algorithm"),
        when=lambda s: drafts_on(s) and s["speculative_algorithm"] != "Suffix" and not s["draft_model"],
        says="speculative_algorithm={speculative_algorithm} needs --draft_model on the command line",
        source=f"{_MASTER}:545",
        what="drafts whose model the file leaves to the command line",
        example='{"num_speculative_tokens": 2}',
        since="0.10.0",
        forms=(Form.JSON,),
    ),
    conflict(
        "adaptive-drafts-idle",
        WARNING,
        (
            "enable_adaptive_speculative_decode",
            "num_speculative_tokens",
            "enable_profile_step_time",
            "speculative_algorithm",
        ),
        when=lambda s: (
            s["enable_adaptive_speculative_decode"]
            and (
                s["num_speculative_tokens"] < 2
                or s["speculative_algorithm"] in ("Eagle3", "Suffix")
                or not s["enable_profile_step_time"]
            )
        ),
        says="enable_adaptive_speculative_decode does nothing with num_speculative_tokens={num_speculative_tokens}, "
        "speculative_algorithm={speculative_algorithm} and enable_profile_step_time={enable_profile_step_time}: it "
        "shortens 2 drafts or more of MTP, DFlash or DSpark, by times measured at start",
        source=f"{_PROFILE}:487",
        what="adaptive drafts without what they adapt to",
        example="--enable_adaptive_speculative_decode=true",
        put=lambda s: (
            {"enable_profile_step_time": True} if _adapts(s) else {"enable_adaptive_speculative_decode": False}
        ),
        since=_S2,
    ),
)


RULES = (*_DRAFTS, *SWITCHES)
