"""Entry point of the `xllm-lab` command, and the only place that exits."""

from __future__ import annotations

import os
import sys

# OpenMP's default lets idle threads spin; on a busy machine a step then takes fifty times as long. It is read when
# torch is first imported, so it is set before anything of ours is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command: 0 done, 1 a check said no, 2 the user can mend it, 130 interrupted."""
    try:
        from xllm_lab.cli import run  # here, so that ctrl-C says the same while modules are read

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("xllm-lab: interrupted\n")
        status = 130
    if status:
        # What stdout could not take, Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
