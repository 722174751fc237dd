"""The base class of all settings, and functions that read settings from YAML and flags, check and describe them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from forgetlearn.config import safe_yaml
from forgetlearn.errors import ConfigError, did_you_mean

TAGS = ("a number", "one name", "several names", "names and factors")  # of a setting's forms, not parts of its name
MOST_BYTES = 1 << 22  # largest size of a file of settings


class Settings(BaseModel):
    """Immutable settings. An unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _one_meaning(cls, value: object, info: ValidationInfo) -> object:
        """Refuse a boolean where a number is expected, and accept text as a number only if it is a plain decimal."""
        types = _plain_types(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and {int, float} & types:
            raise ValueError("must be a number")
        if {int, float} & types and str not in types:
            return [_number(item) for item in value] if isinstance(value, (list, tuple)) else _number(value)
        return value


def no_repeats(values: tuple[object, ...]) -> tuple[object, ...]:
    """Return the values of a list, for a validator; raise ValueError if one is listed more than once."""
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is listed more than once")
    return values


def _number(value: object) -> object:
    """Convert a text, such as a flag's, to a number. By itself pydantic would also accept `010` and `1_0`."""
    if not isinstance(value, str):
        return value
    found = safe_yaml.number(value.strip())
    if found is None and any(character.isdecimal() for character in value):
        raise ValueError("must be a plain decimal number, such as 16, 0.5 or 1e-4")
    return value if found is None else found


def _plain_types(annotation: object) -> set[object]:
    """Return all types in an annotation."""
    return {annotation}.union(*(_plain_types(part) for part in get_args(annotation)))


S = TypeVar("S", bound=Settings)


def read_yaml(file: Path, given_as: str = "config") -> dict[str, object]:
    """Return the names and values in a YAML file. Messages call the file by `given_as`.

    Raises:
        ConfigError: the file does not exist, is too large, is not YAML in UTF-8, or does not hold names and values.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe or a device might never end
            raise ConfigError(f"{given_as} {file}: is not a regular file. Give an existing YAML file.")
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{given_as} {file}: has more than {MOST_BYTES:,} bytes, so it is not a file of settings."
            )
        data = safe_yaml.load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{given_as} {file}: {error.strerror or error}. Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{given_as} {file}: cannot be read as YAML in UTF-8: {reason}") from None
    if not isinstance(data, dict | None):
        raise ConfigError(f"{given_as} {file}: expected names and values, found a {type(data).__name__}.")
    return _unshared(data or {})


def validate(
    kind: type[S], data: Mapping[str, object], where: str | None = None, elsewhere: frozenset[str] = frozenset()
) -> S:
    """Return `data` as settings of this kind.

    Messages name the file that the data come from (`where`), except for settings that flags gave (`elsewhere`).

    Raises:
        ConfigError: lists all problems, one per line: the setting, its value, what was expected, the nearest name.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        items = error.errors()
        places = [(item, item["loc"]) for item in items]
        # If the items of a list are wrong, pydantic also calls the list empty. Only the items are reported.
        inner = [item for item, loc in places if not any(loc == at[: len(loc)] != at for _item, at in places)]
        raise ConfigError("\n".join(_problem(kind, item, where, elsewhere) for item in inner)) from None


def parse_assignments(assignments: list[str], flag: str = "--set") -> dict[str, object]:
    """Return `["forget.epochs=6"]` as `{"forget.epochs": 6}`; values are read as YAML.

    Raises:
        ConfigError: an assignment has no `=`, or its value is not YAML.
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


def describe(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, default and description of every setting, for help and documentation."""
    for name, field in kind.model_fields.items():
        inner = _inner_settings(field.annotation)
        if inner is not None:
            yield from describe(inner, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
            yield prefix + name, shown.replace("\n...", "").strip(), field.description or ""


def _unshared(data: Mapping[str, object]) -> dict[str, object]:
    """Return a copy in which a YAML anchor and its aliases are separate, so that each can be set alone."""
    return {name: _unshared(value) if isinstance(value, dict) else value for name, value in data.items()}


def _inner_settings(annotation: object) -> type[Settings] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _problem(kind: type[Settings], item: Mapping[str, Any], where: str | None, elsewhere: frozenset[str]) -> str:
    """Describe one of pydantic's errors in one line, with the file unless a flag gave the value."""
    loc = tuple(part for part in item["loc"] if part not in TAGS)
    in_list = bool(loc) and isinstance(loc[-1], int)  # the value shows which item it is
    name = ".".join(str(part) for part in (loc[:-1] if in_list else loc)) or "config"
    is_flag = any(name == given or name.startswith(f"{given}.") for given in elsewhere)
    suffix = f" ({where})" if where and not is_flag else ""
    if item["type"] == "extra_forbidden":
        return f"{name}{suffix}: there is no such setting.{_nearest(kind, loc)}"
    field = locate(kind, loc)[1]
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


def _nearest_choice(item: Mapping[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    return did_you_mean(str(item["input"]), choices)


def _known_items(field: FieldInfo | None) -> str:
    """Name the items that a list can hold, if they are fixed."""
    item, *_ = get_args(field.annotation) if field else (None,)
    names = [name for name in get_args(item) if isinstance(name, str)]
    return f" of {', '.join(names)}" if names else ""


def _nearest(kind: type[Settings], loc: tuple[int | str, ...]) -> str:
    known = [name for name, *_ in describe(kind)]
    siblings = list(locate(kind, loc)[0].model_fields)
    wanted = str(loc[-1])
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == wanted]
    if wanted in kind.model_fields:
        elsewhere = [wanted]
    if elsewhere:
        return f" Did you mean {' or '.join(repr(name) for name in elsewhere)}?"
    hint = did_you_mean(wanted, siblings, "".join(f"{part}." for part in loc[:-1]))
    return hint or f" Known here: {', '.join(siblings)}."


def locate(kind: type[Settings], loc: tuple[int | str, ...]) -> tuple[type[Settings], FieldInfo | None]:
    """Return the innermost settings class on the path `loc`, and the last field on it (None if unknown).

    Names that users choose themselves, such as the name of a variant, are skipped.
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
