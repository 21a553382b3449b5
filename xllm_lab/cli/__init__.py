"""The xllm-lab command. Results on stdout, progress and diagnostics on stderr."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from xllm_lab import provenance
from xllm_lab.cli.commands import COMMANDS
from xllm_lab.errors import ConfigError, PolicyError, UserError
from xllm_lab.progress import tell


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns 0; 1 if a check said no; 2 if the user can mend it; 130 if interrupted."""
    try:
        options = _parser().parse_args(arguments)
        return COMMANDS[options.command].run(options)
    except (UserError, PolicyError) as error:
        tell(f"xllm-lab: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        tell("xllm-lab: interrupted; nothing unfinished looks finished")
        return 130
    except OSError as error:
        tell(f"xllm-lab: {error.filename or 'output'}: {error.strerror or error}")
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="xllm-lab", description="Replay, calibrate, simulate, tune and verify an inference engine.")
    version = f"xllm-lab {metadata.version('xllm-lab')} ({provenance.build()})"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(required=True, dest="command", metavar="VERB", parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.what, description=command.what)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        command.options(sub)
    return parser
