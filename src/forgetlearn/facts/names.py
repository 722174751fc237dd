"""Match the names of fields and columns: `Ground truth`, `Old answer`, `--columns prompt=Question`."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from forgetlearn.errors import FactError, did_you_mean, some

OPTIONAL = (
    "ground_truth", "subject", "rephrase_prompt", "rephrase_prompts",
    "locality_prompt", "locality_ground_truth", "locality", "probes",
)  # fmt: skip
OWN = frozenset({"id", "case_id", "prompt", "target_new", *OPTIONAL})
NUMBERED = re.compile(r"(rephrase_prompt|locality_prompt|locality_ground_truth)_[1-9][0-9]*")
NUMBERED_FOLDED = re.compile(r"(rephraseprompt|localityprompt|localitygroundtruth|rephrasing)([1-9][0-9]*)")
REPHRASING = re.compile(r"rephrasing_[1-9][0-9]*")  # a synonym, numbered
# Other names for fields of the own form, accepted if the own name is absent.
SYNONYMS = {
    "target_new": ("new_answer", "answer_new", "new_target", "new"),
    "ground_truth": ("old_answer", "answer_old", "old_target", "target_old", "target_true", "old"),
    "prompt": ("question", "query"),
    "rephrase_prompt": ("rephrasing",),
    "rephrase_prompts": ("rephrasings",),
}
# In a table, `answer` is the new answer if one of these stands beside it. (`ground_truth` may be the right answer to a
# wrong one.)
BESIDE_ANSWER = (
    *(name for name in SYNONYMS["ground_truth"] if "old" in name),
    *("rephrase_prompt", "rephrase_prompts", "rephrasing", "rephrasings"),
)
NOT_OWN = ("requested_rewrite", "src", "edit")  # a record with one of these is of another form, whatever else it has


def fold(name: str) -> str:
    """Return a name in lower case, without spaces, underscores and hyphens: `Ground Truth` equals `ground_truth`."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def check_columns(columns: Iterable[str]) -> None:
    """Raise FactError if `--columns` assigns to a name that is not a field of a fact."""
    for own in columns:
        if own not in OWN and not NUMBERED.fullmatch(own):
            hint = did_you_mean(own, sorted(OWN)) or f" Known are {', '.join(sorted(OWN))}."
            raise FactError(f"facts.columns: '{own}' is not a field of a fact.{hint}")


def check_columns_found(columns: Mapping[str, str], source: str, names: Iterable[str]) -> None:
    """Raise FactError if a column in `--columns` is not among `names`, the names of all fields of the source."""
    there = sorted(names)
    for own, column in columns.items():
        if _find(column, there) is None:
            raise FactError(
                f"{source}: facts.columns says {own} = '{column}', which no record has."
                f"{did_you_mean(column, there)} Fields found: {some(there, 12) or 'none'}."
            )


def _find(column: str, names: Iterable[str]) -> str | None:
    """Return the name in the file that a name in `--columns` refers to; None if there is none."""
    return column if column in names else next((name for name in names if fold(name) == fold(column)), None)


@lru_cache(maxsize=64)  # most records of a file have the same fields
def renamed(
    names: tuple[str, ...],
    known: frozenset[str],
    columns: tuple[tuple[str, str], ...],
    *,
    in_table: bool = False,
    old_alone: bool = False,
) -> dict[str, str]:
    """Map the name under which each field is read to its name in the file. `columns` are the pairs of `--columns`.

    All records of a table have the same fields; elsewhere one may lack what another has, so `answer` stays as it is.
    With `old_alone`, the record need not have a new answer.
    Raise FactError if two fields would be read under the same name.
    """
    there = set(names)
    given = {own: name for own, column in columns if (name := _find(column, names)) is not None}
    taken = set(given.values())
    if clash := [own for own in given if own in there and own not in taken]:
        raise FactError(
            f"facts.columns says {clash[0]} = '{given[clash[0]]}', but the field '{clash[0]}' exists too. "
            f"Map that field too, or remove it."
        )
    found = dict(given)
    rest = [name for name in names if name not in taken]
    folded = {fold(name): name for name in known}
    meant = {name: name if name in known else _meant(name, folded) for name in rest}
    counts = Counter(meant.values())
    for name in rest:
        own = meant[name]
        if own != name and (own in there or own in given):
            own = name  # the field of exactly that name is read; this one is reported as ignored
        elif own != name and counts[own] > 1:
            both = [other for other in rest if meant[other] == own]
            raise FactError(f"fields {some(both)} are all read as '{own}'. Keep one, or choose by --columns.")
        found[own] = name
    return _with_synonyms(found, in_table, old_alone)


def _meant(name: str, folded: Mapping[str, str]) -> str:
    """Return the known name that differs only in case, spaces, underscores and hyphens, or else the name itself."""
    plain = fold(name)
    if plain in folded:
        return folded[plain]
    numbered = None if NUMBERED.fullmatch(name) else NUMBERED_FOLDED.fullmatch(plain)
    return f"{folded.get(numbered[1], numbered[1])}_{numbered[2]}" if numbered else name


def _with_synonyms(found: dict[str, str], in_table: bool, old_alone: bool) -> dict[str, str]:
    """Return the mapping with synonyms replaced by the own form's names, if there is a new answer or none is needed."""
    if any(name in found for name in NOT_OWN):
        return found
    by_fold = {fold(name): name for name in found}
    numbered = [name for name in found if REPHRASING.fullmatch(name)]
    if not any(fold(name) in by_fold for name in ("target_new", *SYNONYMS["target_new"])):
        beside = numbered or any(fold(name) in by_fold for name in BESIDE_ANSWER)
        if in_table and "answer" in found and beside:
            found["target_new"] = found.pop("answer")
        elif not old_alone:
            return found
    for own, synonyms in SYNONYMS.items():
        there = [by_fold[fold(name)] for name in synonyms if fold(name) in by_fold]
        if own not in found and len(there) > 1:
            raise FactError(f"fields {some(there)} could all be '{own}'. Choose one: --columns {own}={there[0]}.")
        if own not in found and there:
            found[own] = found.pop(there[0])
    for name in numbered:
        own = name.replace("rephrasing", "rephrase_prompt")
        if own not in found:
            found[own] = found.pop(name)
    return found


@lru_cache(maxsize=64)
def misspelt(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the first name that looks like a misspelt optional field, with the field's name; None if there is none."""
    absent = set(OPTIONAL) - set(names)
    for name in sorted(set(names) - OWN):
        letters = set(name)
        # A record may have tens of thousands of names, and difflib is slow, so most are ruled out first.
        likely = [own for own in OPTIONAL if len(set(own) ^ letters) < 5 and abs(len(own) - len(name)) < 5]
        near = None if NUMBERED.fullmatch(name) else difflib.get_close_matches(name, likely, 1, 0.85)
        if near and near[0] in absent:
            return name, near[0]
    return None
