"""tests/messages.txt lists every message of the package, so that they can be read and reviewed as one text.

After a change to a message: `python tests/test_messages.py --write`, then read the difference in messages.txt.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import forgetlearn.errors

SOURCE = Path(forgetlearn.errors.__file__).parent
LIST = Path(__file__).with_name("messages.txt")
ERRORS = {
    name
    for name, value in vars(forgetlearn.errors).items()
    if isinstance(value, type) and issubclass(value, forgetlearn.errors.ForgetLearnError)
} | {"ValueError", "missing_extra", "check_installed", "PydanticCustomError"}
LEVELS = {"warning", "info"}


def expression(node: ast.expr) -> str:
    """Return `{the expression}`, the same for every version of Python."""
    return "{" + ast.unparse(node).replace('"', "'") + "}"


def text(node: ast.expr) -> str:
    """Return a message as written, with `{expression}` for what is filled in."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(expression(v.value) if isinstance(v, ast.FormattedValue) else text(v) for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text(left) + text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"[{text(body)}] or [{text(orelse)}]"
    return expression(node)


def filled(call: ast.Call) -> str:
    """Return the message of a call to a logger, each `%s` replaced by its argument."""
    message, *shown = [text(argument) for argument in call.args]
    shown = [argument if argument.startswith("{") else f"{{{argument!r}}}" for argument in shown]
    return re.sub(r"%[-.,\d]*[sdrfg]", lambda found: shown.pop(0) if shown else found[0], message)


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """Yield error type or level and message of each call in a file that makes one, in the file's order."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        match call.func:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in ERRORS and call.args:
                shown = [text(argument) for argument in call.args if not isinstance(argument, ast.Starred)]
                yield name, " | ".join(shown)
            case ast.Attribute(value=ast.Name(id="log"), attr=name) if name in LEVELS:
                yield name, filled(call)


@functools.cache
def listing() -> str:
    """Return the text of messages.txt: modules in the order of their names, messages in the order of their lines."""
    parts = []
    for file in sorted(SOURCE.rglob("*.py")):
        lines = [f"{kind}: {message}" for kind, message in messages(file) if re.search(r"\w", message)]
        if lines and file.parent != SOURCE:
            name = file.relative_to(SOURCE).as_posix()
            parts.append("\n".join([f"== {name}", *(line.replace("\n", "\n    ") for line in lines)]))
    return "\n\n".join(parts) + "\n"


def test_the_list_of_messages_is_up_to_date():
    known = LIST.read_text(encoding="utf-8").splitlines()
    now = listing().splitlines()
    gone, new = [line for line in known if line not in now], [line for line in now if line not in known]
    assert known == now, (
        f"messages.txt differs: gone {gone[:5]}, new {new[:5]}. "
        "Read each message as a user would, then run: python tests/test_messages.py --write"
    )


def test_a_message_is_short_and_does_not_end_in_a_blank():
    lines = [line for line in listing().splitlines() if not line.startswith("==")]
    assert len(lines) > 200
    assert [line for line in lines if line != line.rstrip()] == []


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_messages.py --write")
    LIST.write_text(listing(), encoding="utf-8")
