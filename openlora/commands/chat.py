"""Chat in the terminal with the base model, an adapter, or a weighted mix of adapters.

examples:
  openlora chat
  openlora chat --adapter pirate
  openlora chat --mix pirate=0.6 haiku=0.4
  echo "What is the sea?" | openlora chat --adapter pirate

In a chat, /help lists the commands; Ctrl-C stops a running answer, Ctrl-D leaves. With input from
a pipe it is one question: the answer alone goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Any

from openlora.commands.config import (
    ClientConfig,
    add_client_arguments,
    client_config,
    process_environment,
)
from openlora.errors import InvalidRequest, OpenLoRAError, SetupError

HELP = """\
/adapter ID            answer with this adapter; without an ID: the base model
/mix A=0.6 B=0.4       answer with a weighted mix of adapters
/adapters              the adapters there are
/new                   forget the conversation so far
/help                  this list
/quit                  leave (also Ctrl-D)
Ctrl-C stops a running answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora chat``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--adapter", metavar="ID", help="adapter to answer with (default: none)")
    which.add_argument("--mix", nargs="+", metavar="ID=WEIGHT", help="a weighted mix of adapters")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="default 0.7")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed, the same answer")
    add_client_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chat; returns the exit status."""
    config = client_config(args, process_environment())
    params = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.seed is not None:
        params["seed"] = args.seed
    adapters = parse_mix(args.mix) if args.mix else [{"id": args.adapter}] if args.adapter else []
    chat = Chat(config, params, adapters)
    if not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise SetupError("nothing came through the pipe; write a question into it")
        chat.ask(question)
        return 0
    return _interactive(chat)


def parse_mix(words: Sequence[str]) -> list[dict[str, Any]]:
    """``["pirate=0.6", "haiku=0.4"]`` as the frame's ``adapters``.

    Raises:
        InvalidRequest: naming the word that is not ID=WEIGHT.
    """
    mix = []
    for word in words:
        adapter_id, _, weight = word.rpartition("=")
        try:
            mix.append({"id": adapter_id, "weight": float(weight)})
        except ValueError:
            adapter_id = ""
        if not adapter_id:
            raise InvalidRequest(f"{word!r} is not ID=WEIGHT, for example pirate=0.6")
    if not mix:
        raise InvalidRequest("name at least one adapter, for example /mix pirate=0.6 haiku=0.4")
    return mix


class Chat:
    """A conversation: its history, and what answers it."""

    def __init__(
        self, config: ClientConfig, params: dict[str, Any], adapters: list[dict[str, Any]]
    ) -> None:
        self.config = config
        self.adapters = adapters
        self._params = params
        self._history: list[dict[str, str]] = []

    @property
    def voice(self) -> str:
        """Who answers, for the prompt line."""
        if not self.adapters:
            return "base"
        return "+".join(
            f"{a['weight']:g}·{a['id']}" if "weight" in a else a["id"] for a in self.adapters
        )

    def forget(self) -> None:
        """Start a new conversation."""
        self._history.clear()

    def ask(self, question: str) -> None:
        """Stream the answer to standard output; Ctrl-C cancels it at the worker.

        A failed question leaves the history as it was. Raises OpenLoRAError.
        """
        messages = [*self._history, {"role": "user", "content": question}]
        answer = asyncio.run(self._stream(messages))
        self._history = [*messages, {"role": "assistant", "content": answer}]

    async def _stream(self, messages: list[dict[str, str]]) -> str:
        from openlora.commands.chat_stream import AnswerStream

        stream = AnswerStream(
            self.config,
            on_text=_write,
            on_restart=lambda: _write("\n[the answer starts again]\n"),
        )
        loop = asyncio.get_running_loop()
        cancels: set[asyncio.Task[None]] = set()

        def on_interrupt() -> None:
            if cancels:  # a second Ctrl-C does not wait for the server
                raise KeyboardInterrupt
            cancels.add(asyncio.create_task(stream.cancel()))

        loop.add_signal_handler(signal.SIGINT, on_interrupt)
        try:
            answer = await stream.run(messages, self._options())
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        if answer.finish_reason == "cancelled":
            _write(" [stopped]")
        _write("\n")
        return answer.text

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"params": self._params}
        if len(self.adapters) == 1 and "weight" not in self.adapters[0]:
            options["adapter"] = self.adapters[0]["id"]
        elif self.adapters:
            options["adapters"] = self.adapters
        return options


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _interactive(chat: Chat) -> int:
    import readline  # noqa: F401 — gives input() its line editing and history

    print("Type a message; /help lists commands, Ctrl-D leaves.")
    while True:
        try:
            line = input(f"[{chat.voice}] > ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("  (Ctrl-D leaves)")
            continue
        if line in ("/quit", "/exit"):
            return 0
        try:
            if line.startswith("/"):
                _command(chat, line.split())
            elif line:
                chat.ask(line)
        except KeyboardInterrupt:
            print()
        except OpenLoRAError as error:
            print(f"{error.message} ({error.code})", file=sys.stderr)


def _command(chat: Chat, words: list[str]) -> None:
    match words:
        case ["/adapter"]:
            chat.adapters = []
        case ["/adapter", adapter_id]:
            chat.adapters = [{"id": adapter_id}]
        case ["/mix", *parts]:
            chat.adapters = parse_mix(parts)
        case ["/adapters"]:
            from openlora.commands.http_client import HttpClient

            for record in HttpClient(chat.config).get("/v1/adapters"):
                print(f"{record['id']:<20} rank {record['rank']}, {', '.join(record['targets'])}")
        case ["/new"]:
            chat.forget()
        case ["/help"]:
            print(HELP)
        case _:
            raise InvalidRequest(f"{' '.join(words)!r} is no command; /help lists them")
