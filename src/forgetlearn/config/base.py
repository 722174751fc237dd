"""Settings of whatever kind: read from YAML and flags, validated with a word about each that is wrong, described."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from forgetlearn.config import safe_yaml
from forgetlearn.errors import ConfigError

TAGS = ("a number", "one name", "several names", "names and factors")  # forms of one setting: no part of its name


class Settings(BaseModel):
    """What all settings share: they do not change, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _one_meaning(cls, value: object, info: ValidationInfo) -> object:
        """Refuse a boolean for a number, and accept a number in text only as a plain decimal."""
        types = _plain_types(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and {int, float} & types:
            raise ValueError("must be a number")
        if {int, float} & types and str not in types:
            many = isinstance(value, (list, tuple))
            return [_number(item) for item in value] if many else _number(value)  # type: ignore[attr-defined]
        return value


def _number(value: object) -> object:
    """Return the number in a text, say from a flag; pydantic itself would also accept `010` and `1_0`."""
    if not isinstance(value, str):
        return value
    found = safe_yaml.number(value.strip())
    if found is None and any(character.isdecimal() for character in value):
        raise ValueError("must be a plain decimal number, such as 16, 0.5 or 1e-4")
    return value if found is None else found


def _plain_types(annotation: object) -> set[object]:
    """The types that an annotation is made of."""
    return {annotation}.union(*(_plain_types(part) for part in get_args(annotation)))


S = TypeVar("S", bound=Settings)


def read_yaml(file: Path, given_as: str = "config") -> dict[str, Any]:
    """Names and values of a YAML file; `given_as` is what a message calls it.

    Raises:
        ConfigError: it is not there, not YAML in UTF-8, or holds something else.
    """
    try:
        data = safe_yaml.load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{given_as} {file}: {error.strerror or error}. Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{given_as} {file}: cannot be read as YAML in UTF-8: {reason}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{given_as} {file}: expected names and values, found a {type(data).__name__}.")
    separate: dict[str, Any] = _unshared(data)
    return separate


def validate(
    kind: type[S], data: Mapping[str, Any], where: str | None = None, elsewhere: frozenset[str] = frozenset()
) -> S:
    """`data` as settings of this kind; all problems at once. `where` it is from is named, but for names `elsewhere`.

    Raises:
        ConfigError: which setting, its value, what was expected, and the nearest known name.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        items = error.errors()
        places = [item["loc"] for item in items]
        # A list whose items are wrong is also said to be empty: the items are the problem.
        inner = [item for item in items if not any(_is_inside(place, item["loc"]) for place in places)]
        raise ConfigError("\n".join(_problem(kind, item, where, elsewhere) for item in inner)) from None


def parse_assignments(assignments: list[str], flag: str = "--set") -> dict[str, object]:
    """`["forget.epochs=6"]` as `{"forget.epochs": 6}`; values are read as YAML.

    Raises:
        ConfigError: there is no `=`, or the value is not YAML.
    """
    parsed: dict[str, object] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{flag} {assignment}: expected NAME=VALUE, for example --set forget.epochs=6.")
        try:
            parsed[name.strip()] = safe_yaml.load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{flag} {assignment}: the value is not YAML: {reason}") from None
    return parsed


def describe(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Rows of dotted name, type, default and description of every setting, for help and documentation."""
    for name, field in kind.model_fields.items():
        inner = _inner_settings(field.annotation)
        if inner is not None:
            yield from describe(inner, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
            type_name = str(field.annotation).replace("typing.", "")
            if isinstance(field.annotation, type):
                type_name = field.annotation.__name__
            yield prefix + name, type_name, shown.replace("\n...", "").strip(), field.description or ""


def _unshared(data: Any) -> Any:
    """A copy in which a YAML anchor and its aliases are separate, so that one can be set alone."""
    return {name: _unshared(value) for name, value in data.items()} if isinstance(data, dict) else data


def _inner_settings(annotation: object) -> type[Settings] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _is_inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def upgraded(kind: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version recorded, with those that came since at their defaults.

    As they were recorded where this version cannot read them.
    """
    try:
        return validate(kind, recorded).model_dump(mode="json")
    except ConfigError:
        return dict(recorded)


def _problem(kind: type[Settings], item: Any, where: str | None, elsewhere: frozenset[str]) -> str:
    """One line for one of pydantic's errors; the file is named unless a flag gave the value."""
    loc = tuple(part for part in item["loc"] if part not in TAGS)
    in_list = bool(loc) and isinstance(loc[-1], int)  # which item it is, its value says
    name = ".".join(str(part) for part in (loc[:-1] if in_list else loc)) or "config"
    is_flag = any(name == given or name.startswith(f"{given}.") for given in elsewhere)
    suffix = f" ({where})" if where and not is_flag else ""
    if item["type"] == "extra_forbidden":
        return f"{name}{suffix}: there is no such setting.{_nearest(kind, loc)}"
    field = _place(kind, loc)[1]
    description = field.description if field else ""
    message = (
        item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable to parse")[0]
    )
    expected = message if item["type"] == "value_error" else f"must be {message}"
    if item["type"] == "too_short":
        expected = f"must name at least {item['ctx']['min_length']}{_known_items(field)}"
    near = _nearest_choice(item) if item["type"] == "literal_error" else ""
    shown = "" if isinstance(item["input"], Mapping) else f" = {item['input']!r}"
    return f"{name}{shown}{suffix}: {expected}.{near}{' ' + description if description else ''}"


def _nearest_choice(item: Any) -> str:
    choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    near = difflib.get_close_matches(str(item["input"]), choices, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _known_items(field: FieldInfo | None) -> str:
    """What the list there can hold, where that is a choice."""
    item, *_ = get_args(field.annotation) if field else (None,)
    return f" of {', '.join(get_args(item))}" if get_args(item) else ""


def _nearest(kind: type[Settings], loc: tuple[int | str, ...]) -> str:
    known = [name for name, *_ in describe(kind)]
    siblings = list(_place(kind, loc)[0].model_fields)
    wanted = str(loc[-1])
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == wanted]
    if wanted in kind.model_fields:
        elsewhere = [wanted]
    if elsewhere:
        return f" Did you mean {' or '.join(repr(name) for name in elsewhere)}?"
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{'.'.join([*map(str, loc[:-1]), near[0]])}'?"
    return f" Known here: {', '.join(siblings)}."


def _place(kind: type[Settings], loc: tuple[int | str, ...]) -> tuple[type[Settings], FieldInfo | None]:
    """The innermost settings that a place lies in, and the field there that it is or lies in, if there is one.

    Where the settings have names of the user's own, as variants have, the name is passed over.
    """
    field, parts = None, iter(map(str, loc))
    for part in parts:
        field = kind.model_fields.get(part)
        of_dict = get_origin(field.annotation) is dict if field else False
        inner = _inner_settings(get_args(field.annotation)[1] if of_dict else field.annotation) if field else None
        if inner is None:
            break
        kind = inner
        if of_dict:
            next(parts, None)
    return kind, field
