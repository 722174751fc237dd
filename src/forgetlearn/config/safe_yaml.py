"""Read YAML from a file or a flag. Tags that create objects, repeated names and endless aliases are errors.

A plain word has one meaning, as in YAML 1.2: a number is a plain decimal (`16`, `0.5`, `1e2`), a boolean is true or
false, and all else is text. PyYAML reads YAML 1.1, where `010` is 8, `1:30` is 90, `no` is false and `1e2` is text.
"""

from __future__ import annotations

import re

import yaml
from yaml.composer import ComposerError

MOST_VALUES = 10_000  # with aliases expanded; a file of settings has fewer than a hundred
INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"
FLOAT = rf"(?:{INTEGER}(?:\.[0-9]*)?|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
PLAIN_NUMBER = re.compile(FLOAT)
# Tag, pattern and first characters of each kind of plain word that is not text.
WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", rf"{FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits: by itself it accepts repeated names and expands any number of aliases."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}  # number of values in each complete node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None or (is_alias and node in self.sizes):
            return node
        if is_alias:
            raise ComposerError(None, None, "an alias refers to a value that contains it", node.start_mark)
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = [name.value for name, _value in pairs if isinstance(name, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ComposerError(None, None, f"'{twice[0]}' is repeated", node.start_mark)
        inner = [part for pair in pairs for part in pair] if pairs else node.value
        self.sizes[node] = 1 + (sum(self.sizes[part] for part in inner) if isinstance(inner, list) else 0)
        if self.sizes[node] > MOST_VALUES:
            raise ComposerError(None, None, f"its aliases expand to more than {MOST_VALUES:,} values", node.start_mark)
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in WORDS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def number(text: str) -> int | float | None:
    """Return a plain decimal as a number; None if the text is anything else."""
    if not PLAIN_NUMBER.fullmatch(text):
        return None
    return int(text) if re.fullmatch(INTEGER, text) else float(text)


def load(text: str) -> object:
    """Return the content of a YAML text, made of plain values only.

    Raises:
        yaml.YAMLError: the text is not YAML, has a tag or a repeated name, or its aliases expand too far.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise yaml.YAMLError(f"{error.problem or error.context}{place}") from error
    except RecursionError as error:
        raise yaml.YAMLError("its brackets are nested too deep") from error
    except (ValueError, OverflowError) as error:  # for example an impossible date
        raise yaml.YAMLError(str(error)) from error
