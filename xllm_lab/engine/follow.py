"""A rank other than 0: it has its part of the model, and runs what rank 0 tells it until there is no more."""

from __future__ import annotations

import signal
import sys

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.engine.expert_mover import obey as obey_on_experts
from xllm_lab.engine.lead import chunks_of, opened
from xllm_lab.engine.rank_place import Place, place_in_environment
from xllm_lab.engine.rank_processes import LOST_STATUS
from xllm_lab.engine.ranks import Ranks, join
from xllm_lab.engine.runner import Runner
from xllm_lab.errors import RankError
from xllm_lab.progress import tell


def follow(place: Place) -> None:
    """Serve rank 0 to its end.

    Raises:
        RankError: rank 0, or another, is gone.
        whatever else ends it; rank 0 is told.
    """
    ranks = join(place)
    try:
        options = EngineOptions(**ranks.receive())
        ranks.timeout_s = options.rank_timeout_s
        _obey(Engine(options, ranks=ranks), ranks)
    except RankError:
        raise
    except BaseException as error:
        ranks.fail(" ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        ranks.leave()


def _obey(engine: Engine, ranks: Ranks) -> None:
    runner: Runner | None = None
    while (message := ranks.receive())["do"] != "end":
        if message["do"] == "open":
            runner = None  # its memory goes before the next one's comes
            runner = engine.runner(*opened(message))
            continue
        if message["do"].endswith(" experts"):
            obey_on_experts(message, engine.live_experts(), ranks)
            continue
        assert runner is not None, "a run was opened"
        if message["do"] == "warm":
            assert runner.graphs is not None, "graphs to warm"
            runner.graphs.warm()
        elif message["draws"]:
            runner.follow_draw(chunks_of(message), message["graph_tokens"], tells=message["tells"])
        else:
            runner.run(chunks_of(message), message["graph_tokens"])
        # Rank 0 waits for what it draws; nothing else keeps this rank from writing the next inputs over these.
        engine.device.synchronize()


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for rank 0, which ends the others
    place = place_in_environment()
    assert place is not None, "started without a place"
    try:
        follow(place)
    except RankError as error:
        tell(str(error))
        return LOST_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(_main())
