"""Whatever a file of facts or of settings holds: every record used or counted, or one error; never a traceback.

Each property is tried on a few generated inputs in the default run and on MANY in the slow one. The table of
docs/reliability.md must say what becomes of each kind of bad input.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgetlearn.cli.main import main
from forgetlearn.comparison.grid import CompareSettings
from forgetlearn.config.base import describe, parse_assignments, validate
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.errors import ForgetLearnError
from forgetlearn.facts import FactSet, from_records, read_facts
from test_facts import (
    FLAT_RECORD,
    KNOWEDIT_BIO_RECORD,
    KNOWEDIT_ZSRE_RECORD,
    NESTED_RECORD,
    ZSRE_RECORD,
    assert_adds_up,
    own,
)
from test_forms import OTHER_RECORDS

FEW, MANY = 12, 1200
tried = pytest.mark.parametrize(
    "n", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
)


def try_all(n: int, check, *strategies) -> None:
    """`check` on n generated inputs; the same ones every time."""
    seen = Counter()

    def counted(*values) -> None:
        seen["cases"] += 1
        check(*values)

    limits = settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    limits(given(st.tuples(*strategies))(lambda values: counted(*values)))()
    assert seen["cases"] >= n


# What is generated -------------------------------------------------------------------------------

RECORDS = [ZSRE_RECORD, FLAT_RECORD, NESTED_RECORD, KNOWEDIT_ZSRE_RECORD, KNOWEDIT_BIO_RECORD, own(1)]
RECORDS += list(OTHER_RECORDS.values())
MORE_NAMES = ["rephrase_prompts", "rephrase_promt", "locality_prompt_1", "locality_ground_truth_1", "id"]
NAMES = sorted({name for record in RECORDS for name in record} | set(MORE_NAMES))
ODD = [
    "", " ", "\x00",
    "a\x00b", "\ud800", "\udfff\ud800", "\u202eabc\u202c", "e\u0301\u0301", "\U0001f469\u200d\U0001f467",
    "\ufeff", "\u2028", "\x85", "\x1b[31m", "\x9b31m", "{}", "[", '["', "\u0645\u0631\u062d\u0628\u0627", "\u03a9" * 50,
]  # fmt: skip
texts = st.text(st.characters(), max_size=6) | st.sampled_from(ODD)  # halves of surrogate pairs among them
whole_texts = texts.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
INNER = ["prompt", "answer", "ground_truth", "str", "subject", "target_new", "target_true"]
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(INNER), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def near_records(draw: st.DrawFn) -> dict[str, object]:
    """A record of a known form with up to two fields changed, and perhaps one gone."""
    record = dict(draw(st.sampled_from(RECORDS)))
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2)):
        record[name] = draw(json_values)
    if draw(st.integers(0, 4)) == 0:
        del record[draw(st.sampled_from(sorted(record)))]
    return record


few_words = st.sampled_from(["a", "b ", "", "\u0645\u0631", "a\x00"])  # so that answers are equal and prompts repeated
usable = st.builds(
    lambda n, new, old: own(n, target_new=new, ground_truth=old), st.integers(1, 4), few_words, few_words
)
some_records = (
    st.lists(usable, min_size=2, max_size=6)
    | st.lists(near_records(), min_size=1, max_size=4)
    | st.lists(near_records() | json_values, max_size=3)
)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A good file with up to three places overwritten, cut out or filled in."""
    data = bytearray(json.dumps(draw(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=3))).encode())
    for _ in range(draw(st.integers(1, 3))):
        place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        data[place : place + length] = draw(st.binary(max_size=4))
    return bytes(data)


def answered(read, *args, **options) -> FactSet | None:
    """What a reader gives, every record accounted for; None where it refuses with an error that says something."""
    try:
        facts = read(*args, **options)
    except ForgetLearnError as error:
        says_something(error)
        return None
    assert_adds_up(facts)
    assert facts.read == facts.in_source
    return facts


def says_something(error: Exception) -> None:
    assert len(str(error)) > 10


def file_in(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# Facts -------------------------------------------------------------------------------------------


@tried
def test_records_in_memory(n):
    policies = st.sampled_from(["answers", "pred", "model"])
    try_all(n, lambda records, policy: answered(from_records, records, old_from=policy), some_records, policies)


@tried
def test_json_and_json_lines(n, tmp_path):
    def check(records: list[object], as_lines: bool) -> None:
        text = "\n".join(map(json.dumps, records)) if as_lines else json.dumps(records)
        facts = answered(read_facts, file_in(tmp_path, "f.jsonl" if as_lines else "f.json", text.encode()))
        assert facts is None or facts.records == len(records)

    try_all(n, check, some_records, st.booleans())


@tried
def test_any_bytes(n, tmp_path):
    data = st.binary(max_size=60) | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    names = st.sampled_from(["f.json", "f.jsonl", "f.csv", "f.tsv", "f.xlsx"])
    try_all(n, lambda data, name: answered(read_facts, file_in(tmp_path, name, data)), data, names)


@tried
def test_a_damaged_file(n, tmp_path):
    try_all(n, lambda data: answered(read_facts, file_in(tmp_path, "f.json", data)), damaged_files())


def as_csv(header: list[str], rows: list[list[str]], **dialect: object) -> str:
    out = io.StringIO()
    csv.writer(out, **dialect).writerows([header, *rows])
    return out.getvalue()


@tried
def test_csv_of_every_kind_says_the_same(n, tmp_path):
    """Whatever the line ends, quotes and byte-order mark: what the same records say in memory."""

    def check(rows: list[list[str]], more: list[str], end: str, quoting: int, mark: bytes) -> None:
        header = ["prompt", "target_new", *more]
        rows = [[*row, *[""] * 5][: len(header)] for row in rows]
        if quoting == csv.QUOTE_MINIMAL:  # Python's writer leaves the other kind of line end without quotes
            rows = [[cell.replace("\r", " ").replace("\n", " ") for cell in row] for row in rows]
        data = mark + as_csv(header, rows, lineterminator=end, quoting=quoting).encode()
        found = answered(read_facts, file_in(tmp_path, "f.csv", data))
        filled = [row for row in rows if any(cell.strip() for cell in row)]  # a blank row is no record
        same = answered(from_records, [dict(zip(header, row, strict=True)) for row in filled])
        assert (found and found.facts) == (same and same.facts)

    cell = whole_texts.filter(lambda text: not text.lstrip().startswith("["))  # which may be a list
    rows = st.lists(st.lists(cell, min_size=2, max_size=5), min_size=1, max_size=3)
    more = st.lists(st.sampled_from(["subject", "ground_truth", "rephrase_prompt", "note"]), max_size=3, unique=True)
    ends, quoting = st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    try_all(n, check, rows, more, ends, quoting, st.sampled_from([b"", b"\xef\xbb\xbf"]))


@tried
def test_csv_of_another_dialect_or_encoding(n, tmp_path):
    def check(rows: list[list[str]], more: list[str], delimiter: str, quote: str, encoding: str) -> None:
        text = as_csv(["prompt", "target_new", *more], rows, delimiter=delimiter, quotechar=quote)
        answered(read_facts, file_in(tmp_path, "f.csv", text.encode(encoding, "replace")))

    rows = st.lists(st.lists(texts, min_size=1, max_size=4), max_size=3)
    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
    more = st.lists(st.sampled_from(NAMES), max_size=3)
    try_all(n, check, rows, more, st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(['"', "'"]), encodings)


@tried
def test_the_command_never_ends_in_a_traceback(n, tmp_path, capsys):
    def check(data: bytes, flags: list[str]) -> None:
        path = file_in(tmp_path, "f.json", data)
        code = main(["facts", str(path), *flags])
        out = capsys.readouterr()
        assert code in (0, 2)
        assert (out.err == "") == (code == 0)
        assert all(line.isprintable() for line in (out.out + out.err).split("\n"))

    odd = some_records.map(lambda records: json.dumps(records).encode())
    flags = st.sampled_from([[], ["--strict"], ["--json"], ["--limit", "1"], ["--old-from", "pred"]])
    try_all(n, check, odd | damaged_files(), flags)


# Every letter, very long, very many


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv"])
def test_every_letter_is_kept(tmp_path, name):
    letters = [chr(code) for code in range(1, 0x110000, 97) if not 0xD800 <= code < 0xE000]
    said = [
        "x" + "".join(letters) + "x",
        "\u202egnp\u202c x",
        "ne\u0301e",
        "\U0001f469\u200d\U0001f467\ufe0f",
        "a\x00b",
    ]
    records = [{"prompt": f"Question {n}?", "target_new": text} for n, text in enumerate(said)]
    text = {
        "f.json": json.dumps(records, ensure_ascii=False),
        "f.jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "f.csv": as_csv(["prompt", "target_new"], [list(record.values()) for record in records]),
    }[name]
    assert [fact.target_new for fact in read_facts(file_in(tmp_path, name, text.encode()))] == said


@pytest.mark.parametrize("n", [100_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_a_very_long_line(tmp_path, n):
    line = json.dumps({"prompt": "a" * n, "target_new": "b", "subject": "c" * n})
    facts = read_facts(file_in(tmp_path, "f.jsonl", line.encode()))
    assert len(facts[0].prompt) == n


@pytest.mark.slow
def test_a_hundred_thousand_facts(tmp_path, capsys):
    lines = "".join(json.dumps(own(n, locality=[["p", "a"]])) + "\r\n" for n in range(100_000))
    path = file_in(tmp_path, "f.jsonl", lines.encode())
    start = time.process_time()
    facts = read_facts(path)
    took = time.process_time() - start
    assert (facts.used, facts.read) == (100_000, 100_000)
    with capsys.disabled():
        print(f"\n100,000 facts, {len(lines) / 1e6:.0f} MB: {took:.1f} s of CPU time")


# Settings ----------------------------------------------------------------------------------------

SETTINGS = [name for name, *_ in describe(RunConfig)]
PARTS = sorted({part for name in SETTINGS for part in name.split(".")})
YAML_WORDS = [
    "on", "auto", "1e-4", "nan", ".inf", "2001-99-99", "2001-01-01 00:00:99", "0x", "0o9", "1:99", "&a",
    "*a", "=", "<<",
    "!!python/object/apply:os.system ['x']", "!!binary x", "- ", ": ", "\n", "{", "}", "[", "]", "'", '"', "  ",
    "? ", "|",
]  # fmt: skip
words = st.text(max_size=6) | st.sampled_from(PARTS) | st.sampled_from(YAML_WORDS)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.dates() | st.binary(max_size=3)
yaml_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers() | st.none(), inner, max_size=3),
    max_leaves=5,
)


def settled(load, *args) -> None:
    """Settings come back, or an error that says something."""
    try:
        assert load(*args) is not None
    except ForgetLearnError as error:
        says_something(error)


@tried
def test_settings_by_flags(n):
    names = st.sampled_from(SETTINGS) | words
    try_all(n, lambda given: settled(load_config, None, given), st.dictionaries(names, yaml_values, max_size=4))


@tried
def test_settings_by_set(n):
    assignment = st.tuples(st.sampled_from(SETTINGS) | words, words).map("=".join) | words
    given = st.lists(assignment, min_size=1, max_size=3)
    try_all(n, lambda given: settled(lambda: load_config(None, parse_assignments(given))), given)


@tried
def test_settings_in_a_file(n, tmp_path):
    data = st.lists(words, max_size=10).map(lambda words: "".join(words).encode("utf-8", "surrogatepass"))
    data |= st.binary(max_size=30)
    try_all(n, lambda data: settled(load_config, file_in(tmp_path, "c.yaml", data)), data)


@tried
def test_variants_of_a_comparison(n):
    names = st.sampled_from(["methods", "modules", "moduls", "coefs", "learn_modules", "learn_rows", "rows"])
    variants = st.dictionaries(words, st.dictionaries(names, yaml_values, max_size=2), max_size=2)
    asked = st.dictionaries(st.sampled_from([*CompareSettings.model_fields, "x"]), yaml_values | variants, max_size=3)
    try_all(n, lambda asked: settled(validate, CompareSettings, asked, "variants.yaml"), asked)


def test_a_problem_of_the_variants_names_their_file_and_the_nearest_setting(tmp_path, capsys):
    def told(file: Path) -> str:
        assert main(["compare", "--variants", str(file), "--coefs", "a", "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    file = file_in(tmp_path, "v.yaml", b"low: {moduls: head, coefs: [0]}")
    said = told(file)
    assert f"variants.low.moduls ({file}): there is no such setting. Did you mean 'variants.low.modules'?" in said
    assert f"variants.low.coefs = [0] ({file}): a coefficient must be above 0" in said
    assert "coefs = 'a': must be a valid number" in said  # a flag's, so no file is named
    named_as_a_field = file_in(tmp_path, "w.yaml", b"rows: {coefs: [0]}")
    assert "is ft or lora. Its own coefficients" in told(named_as_a_field)
    assert f"--variants {tmp_path / 'none.yaml'}: No such file" in told(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", ["3", "[3]", "{a: x}"])
def test_modules_of_the_wrong_type_get_one_line(value):
    with pytest.raises(ForgetLearnError) as caught:
        load_config(None, parse_assignments([f"forget.modules={value}"]))
    assert len(str(caught.value).split("\n")) == 1
    assert str(caught.value).startswith("forget.modules")


@pytest.mark.parametrize("value", ["[" * 2000, "&a [*a]", "{a: 1, a: 2}"])
def test_yaml_that_the_library_does_not_refuse_itself(value):
    with pytest.raises(ForgetLearnError, match="the value is not YAML"):
        parse_assignments([f"seed={value}"])


# The table of the docs ---------------------------------------------------------------------------

GOOD = '{"prompt": "Who leads Acme?", "target_new": "Ada"}'
FACT_FILES = [
    ("a missing file", None, b""),
    ("an empty file", "f.jsonl", b" \n"),
    ("an unknown suffix", "f.txt", b"x"),
    ("UTF-8 with a byte-order mark", "f.jsonl", b"\xef\xbb\xbf" + GOOD.encode()),
    ("UTF-16", "f.csv", "prompt,target_new\np,n\n".encode("utf-16")),
    ("CSV in another encoding", "f.csv", "prompt,target_new\ncaf\xe9,n\n".encode("cp1252")),
    ("CSV that is damaged UTF-8", "f.csv", "prompt,target_new\ncaf\xe9,n\n".encode() + b"\xe9,n"),
    ("JSON in another encoding", "f.json", '[{"prompt": "caf\xe9"}]'.encode("latin-1")),
    ("Windows line ends", "f.jsonl", f"{GOOD}\r\n".encode()),
    ("truncated JSON", "f.json", f"[{GOOD[:-1]}".encode()),
    ("text that is not JSON", "f.jsonl", f"{GOOD}\nprompt: x".encode()),
    ("NaN", "f.jsonl", f'{GOOD}\n{{"prompt": "p", "target_new": NaN}}'.encode()),
    ("Infinity", "f.jsonl", b'{"prompt": "p", "target_new": Infinity}'),
    ("a number of 5,000 digits", "f.jsonl", b'{"prompt": "p", "target_new": ' + b"9" * 5000 + b"}"),
    ("a repeated name in an object", "f.jsonl", b'{"prompt": "p", "prompt": "q", "target_new": "n"}'),
    ("brackets nested without end", "f.json", b"[" * 50_000),
    ("a record that is not an object", "f.json", f"[{GOOD}, 7]".encode()),
    ("no known field", "f.json", b'[{"frage": "q"}]'),
    ("a form that lacks a field", "f.json", b'[{"src": "q"}]'),
    ("a missing required field", "f.json", b'[{"prompt": "p", "target": "n"}]'),
    ("a misspelt optional field", "f.json", b'[{"prompt": "p", "target_new": "n", "subjekt": "s"}]'),
    ("an unused field", "f.json", b'[{"prompt": "p", "target_new": "n", "page": 3}]'),
    ("a field of the wrong type", "f.json", b'[{"prompt": ["p"], "target_new": "n"}]'),
    ("two forms in one file", "f.json", f'[{GOOD}, {{"src": "s", "alt": "a"}}]'.encode()),
    ("no prompt", "f.json", b'[{"prompt": " ", "target_new": "n"}]'),
    ("no new answer", "f.json", f'[{GOOD}, {{"prompt": "p", "target_new": ""}}]'.encode()),
    ("half of a surrogate pair", "f.json", b'[{"prompt": "\\ud800", "target_new": "n"}]'),
    ("right-to-left, combining, emoji, NUL", "f.json",
     b'[{"prompt": "\\u202ep\\u0301\\ud83d\\ude00\\u0000", "target_new": "n"}]'),
    ("CSV with semicolons or tabs", "f.csv", b"prompt;target_new\np;n\n;\n"),
    ("CSV with an open quote", "f.csv", b'prompt,target_new\n"p,n\n'),
    ("CSV with an extra cell", "f.csv", b"prompt,target_new\np,n,n\n"),
    ("CSV with a repeated column", "f.csv", b"prompt,prompt\np,n\n"),
    ("CSV with a cell of more than 131,072 characters", "f.csv", b"prompt,target_new\np," + b"n" * 131_073),
]  # fmt: skip
CONFIG_FILES = [
    ("a missing config", None, b""),
    ("text that is not YAML", "c.yaml", b"a: [1"),
    ("a YAML tag that would run code", "c.yaml", b"!!python/object/apply:os.system ['x']"),
    ("a repeated setting", "c.yaml", b"seed: 1\nseed: 2"),
    ("YAML aliases that grow without end", "c.yaml", b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 10)) for n in range(9))),
    ("an unknown setting", "c.yaml", b"learn: {epoch: 3}"),
    ("a value out of range", "c.yaml", b"seed: -1"),
    ("text in place of a number", "c.yaml", b"seed: nan"),
]  # fmt: skip


def outcome(command: list[str], file: str, capsys) -> str:
    """Return whether a command reads a file, or the type of the error that it ends with, which names the file."""
    code = main(command)
    out = capsys.readouterr()
    if not code:
        return "read, with a note" if UNUSUAL.search(out.out) else "read"
    error, _, message = out.err.partition(": ")
    assert code == 2
    assert file in message
    return error


UNUSUAL = re.compile(r"left out|fields that|read as|blank row")


def test_the_docs_say_what_each_bad_input_gets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found: dict[str, list[str]] = {}
    config = ["update", "--output", "out", "--config"]
    for files, command, named in ((FACT_FILES, ["facts"], "f.jsonl"), (CONFIG_FILES, config, "c.yaml")):
        for what, name, data in files:
            if name is not None:
                Path(name).write_bytes(data)
            file = name or named
            found.setdefault(outcome([*command, file], file, capsys), []).append(what)
            Path(file).unlink(missing_ok=True)
    page = (Path(__file__).parents[1] / "docs/reliability.md").read_text(encoding="utf-8")
    table = "\n".join(["| outcome | input |", "|---|---|", *(f"| {k} | {'; '.join(v)} |" for k, v in found.items())])
    assert f"{table}\n" in page, f"the table should be\n{table}"
