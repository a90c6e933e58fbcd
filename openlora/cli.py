"""The ``openlora`` command: finds the subcommand's module, imports that alone, and runs it.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int`` (exit status);
its docstring is the text of ``--help``. Errors of the project's tree become one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from openlora import __version__
from openlora.errors import OpenLoRAError

COMMANDS = {
    "up": ("openlora.commands.up", "start everything: brokers, workers, gateway"),
    "gateway": ("openlora.commands.gateway", "run one gateway"),
    "worker": ("openlora.commands.worker", "run one worker"),
    "producer": ("openlora.commands.producer", "run one producer: batches, as a Celery worker"),
    "brokers": ("openlora.commands.brokers", "run the embedded Kafka broker and Redis server"),
    "chat": ("openlora.commands.chat", "chat in the terminal"),
    "adapters": ("openlora.commands.adapters", "add, list, show and remove adapters"),
    "batch": ("openlora.commands.batch", "run a file of requests offline"),
    "topics": ("openlora.commands.topics", "partitions, their owners and lag"),
    "keys": ("openlora.commands.keys", "make API keys"),
    "dead": ("openlora.commands.dead", "jobs that could not be run: why, and once more"),
    "workers": ("openlora.commands.workers", "the live workers and what they do"),
    "bench": (
        "openlora.bench.__main__",
        "measure: decode, pipeline, adapters, bulk, soak, chaos, …",
    ),
    "doctor": ("openlora.commands.doctor", "what is installed, what is missing, how to get it"),
}

OWN_PACKAGES = {"openlora", "gateway", "producer", "workers"}

EPILOG = """\
examples:
  openlora up                                   the demo model with its adapters
  openlora up --model ./llama --adapters ./loras --workers 2
  openlora chat --adapter pirate
  echo "Tell me of the sea" | openlora chat --adapter pirate
  openlora adapters add poet ./poet-lora
  openlora batch submit requests.jsonl --wait

`openlora COMMAND --help` tells more. Commands that talk to a running system find it by --url or
OPENLORA_URL (default http://127.0.0.1:8000).
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; only ``command``'s own arguments are filled in."""
    parser = argparse.ArgumentParser(
        prog="openlora",
        description="Serve thousands of LoRA fine-tunes of one base model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"openlora {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        if name != command:
            subparsers.add_parser(name, help=summary, add_help=False)
            continue
        module = importlib.import_module(module_name)
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(module=module)
    return parser


def _command_of(argv: Sequence[str]) -> str | None:
    """The subcommand named in ``argv``: the first word that is no option, if it is one."""
    first = next((word for word in argv if not word.startswith("-")), None)
    return first if first in COMMANDS else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done. 1: an error, told in one line. 2: a usage error, told by argparse. 130: interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(_command_of(words)).parse_args(words)
        module: ModuleType = args.module
        status = module.run(args)
        sys.stdout.flush()
        return int(status)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in OWN_PACKAGES:
            raise
        print(
            f"openlora: the package '{error.name}' is not installed; "
            "`openlora doctor` says which extra brings it",
            file=sys.stderr,
        )
        return 1
    except OpenLoRAError as error:
        print(f"openlora: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, less) went away; without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
