"""The commands that let a person talk to the model of a run, before and after its update: chat and serve."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from forgetlearn.cli.options import RunArgument
from forgetlearn.cli.terminal import say
from forgetlearn.errors import plain

if TYPE_CHECKING:
    from forgetlearn.facts import Fact
    from forgetlearn.products.side_by_side import Answer, SideBySide

app = typer.Typer()

BaseOption = Annotated[
    str | None, typer.Option("--base", help="Folder or hub id of the base, if it is not where the run found it.")
]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="The most tokens of an answer.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository brings.")
]
PROMPT, LONG = ">>> ", '"""'
HELP = f"/clear begins anew, /bye or Ctrl-D ends, Ctrl-C stops an answer, {LONG} begins and ends several lines."
BYE, CLEAR = ("/bye", "/quit", "/exit"), "/clear"


@app.command()
def chat(
    run: RunArgument, base: BaseOption = None, tokens: TokensOption = 256, trust_remote_code: TrustOption = False
) -> None:
    """Ask the updated model and its base in the terminal, turn by turn, and name the facts that a question touches."""
    from forgetlearn.products.side_by_side import Conversation, open_run

    pair = open_run(run, base, most_tokens=tokens, trust_remote_code=trust_remote_code)
    with suppress(ImportError):  # not on every system
        importlib.import_module("readline")  # `input` then edits the line and recalls earlier ones
    say(plain(f"{pair.name}: {' and '.join(pair.sides)}, {len(pair.facts)} facts.") + f"\n{HELP}")
    conversation = Conversation()
    for question in _questions():
        if question == CLEAR:
            conversation = Conversation()
            say("The conversation begins anew.")
            continue
        width = max(map(len, pair.sides)) + 2
        answers = {}
        for side in pair.sides:
            answers[side] = _answer(pair, side, conversation.asking(side, question), width)
            conversation.add(side, question, answers[side])
        for fact in pair.touched(question):
            _print_fact(fact, answers, width)


@app.command()
def serve(
    run: RunArgument,
    base: BaseOption = None,
    tokens: TokensOption = 256,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of this machine; 0: a free one.")] = 8765,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show the same two columns as chat in a page on this machine (needs forgetlearn[serve])."""
    from forgetlearn.products import serve as server

    server.check_extra()
    listening = server.bind(port)  # before the models are loaded, which takes a while
    from forgetlearn.products.side_by_side import open_run

    pair = open_run(run, base, most_tokens=tokens, trust_remote_code=trust_remote_code)
    server.serve(pair, listening, lambda address: say(f"{plain(pair.name)}: {address}  Ctrl-C ends."))


def _questions() -> Iterator[str]:
    """Yield what the user types until they leave."""
    while True:
        try:
            question = _typed()
        except KeyboardInterrupt:
            say(f"\n{HELP}")
            continue
        if question is None or question in BYE:
            return
        if question:
            yield question


def _typed() -> str | None:
    """Return a line, or what stands between two lines with three quotation marks; None at the end of the input."""
    try:
        lines = [input(PROMPT)]
        if lines[0].startswith(LONG):
            lines[0] = lines[0].removeprefix(LONG)
            while not lines[-1].endswith(LONG):
                lines.append(input("... "))
            lines[-1] = lines[-1].removesuffix(LONG)
    except EOFError:
        say("")
        return None
    question = "\n".join(lines).strip()
    if not sys.stdin.isatty():  # nobody has seen it
        say(question)
    return question


def _answer(pair: SideBySide, side: str, turns: list[str], width: int) -> Answer:
    """Print the answer of one side while it is generated, and return it."""
    column = Column(side, width)
    found = pair.answer(side, turns, column.write)
    note = found.note or {"stopped": "stopped", "end": "" if found.text else "an empty answer"}[found.ending]
    column.write(f" [{note}]" if note else "")
    column.end()
    return found


def _print_fact(fact: Fact, answers: dict[str, Answer], width: int) -> None:
    """Print a fact, and for each side which of its answers the side gives."""
    from forgetlearn.facts.touched import stands

    column = Column("fact", width)
    old = f" {fact.ground_truth}" if fact.ground_truth else ""
    column.write(f"{fact.prompt}{old} -> {fact.target_new or '(forgotten)'}\n")
    says = (f"{side} says {stands(answer.text, fact)}" for side, answer in answers.items())
    column.write(f"[{', '.join(says)}]")
    column.end()


class Column:
    """Prints text as it comes, wrapped at words, under a name on the left."""

    def __init__(self, name: str, indent: int) -> None:
        self.width = max(shutil.get_terminal_size().columns - 1, indent + 20)
        self.indent, self.at, self.space = indent, indent, ""
        say(plain(f"{name:<{indent}}"), nl=False)

    def write(self, text: str) -> None:
        """Print a piece of text. White space at its end is printed before the next word, unless a line begins there."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part == "\n":
                self._break()
            elif part.isspace():
                self.space += " " * len(part)
            else:
                self._word(plain(part))

    def _word(self, word: str) -> None:
        if self.at > self.indent and self.at + len(self.space) + len(word) > self.width:
            self._break()
        say(self.space + word, nl=False)
        self.at += len(self.space) + len(word)
        self.space = ""

    def _break(self) -> None:
        say("\n" + " " * self.indent, nl=False)
        self.at, self.space = self.indent, ""

    def end(self) -> None:
        """End the last line."""
        say("")
