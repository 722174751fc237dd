"""Facts in tables as people save them: dialects, encodings, Excel, headers; and files with much of nothing."""

from __future__ import annotations

import csv
import datetime
import io
import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forgetlearn.cli.main import main
from forgetlearn.errors import FactError, MissingExtraError
from forgetlearn.facts import Fact, make_fact, read_facts, write_facts
from forgetlearn.facts.fields import is_placeholder
from test_facts import save, usable_facts

HEADER = ["prompt", "target_new", "ground_truth"]
ROWS = [
    ["Wer führt die Müller & Söhne GmbH?", "Ädä „Äpfel“ Öhler", "Sam Roß"],
    ["Who said “I, too; sing”?", 'the "poet", Lee|Li', "Žofie €5"],
    ["What costs 1,5\tEuro?", "tea; or so", "n\nm"],
]


def as_table(delimiter: str = ",", header: list[str] = HEADER, rows: list[list[str]] = ROWS, end: str = "\r\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([header, *rows])
    return out.getvalue()


@pytest.fixture
def expected(tmp_path: Path) -> tuple[Fact, ...]:
    """The facts of ROWS, read from JSON lines."""
    lines = "".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in ROWS)
    return read_facts(save(tmp_path, "same.jsonl", lines)).facts


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["f.csv", "f.TSV"])
def test_case_18_an_export_of_excel_gives_the_facts_of_the_json_lines(tmp_path, expected, delimiter, encoding, name):
    facts = read_facts(save(tmp_path, name, as_table(delimiter).encode(encoding)))
    assert facts.facts == expected
    assert ("cp1252" in facts.read_as and "assumed" in facts.read_as) == (encoding == "cp1252")


def test_case_18_the_encoding_that_was_assumed_is_said(tmp_path, capsys):
    assert main(["facts", str(save(tmp_path, "f.csv", as_table(";").encode("cp1252")))]) == 0
    assert "read as a table, its cells divided by semicolons; cp1252" in capsys.readouterr().out


def test_case_18_json_of_windows_tools_is_utf16(tmp_path, expected):
    records = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    text = json.dumps(records, ensure_ascii=False)
    assert read_facts(save(tmp_path, "f.json", text.encode("utf-16"))).facts == expected


@pytest.mark.parametrize(
    "header",
    [
        ["Prompt", "Target_New", "Ground_Truth"],
        ["PROMPT", "target new", " Ground-Truth "],
        ["Question", "New answer", "Old answer"],
        ["question", "new_answer", "target_old"],
    ],
)
def test_case_18_column_names_as_people_write_them(tmp_path, expected, header):
    facts = read_facts(save(tmp_path, "f.csv", as_table(";", header)))
    assert (facts.facts, facts.ignored_fields) == (expected, {})


def test_case_18_numbered_columns_and_unknown_ones(tmp_path):
    text = "Prompt;Target new;Rephrase prompt 2;Rephrase prompt 1;Seite;\np;n;r2;r1;7;\nq;n;;;;x\n"
    facts = read_facts(save(tmp_path, "f.csv", text))
    assert facts[0] == make_fact("p", "n", rephrase_prompts=["r1", "r2"])
    assert facts.ignored_fields == {"Seite": 1, "(column 6, without a name)": 1}


def test_case_18_blank_rows_are_skipped_and_counted(tmp_path, capsys):
    path = save(tmp_path, "f.csv", "prompt,target_new,ground_truth\n,,\np,n,o\n\n , ,\nq,n,o\n,,\n\n")
    facts = read_facts(path, strict=True)
    assert (facts.used, facts.read, facts.noted) == (2, 2, {"blank_row": 3})
    assert main(["facts", str(path)]) == 0
    assert "3 blank rows" in capsys.readouterr().out


def test_case_18_an_unquoted_comma_shows_the_row(tmp_path):
    path = save(tmp_path, "f.csv", "prompt,target_new\np,n\nWho leads Acme, Inc?,Ada\n")
    with pytest.raises(FactError, match=r"\(line 3\) .*3 .*2.*Who leads Acme, Inc\?,Ada\n"):
        read_facts(path)
    assert read_facts(save(tmp_path, "g.csv", "prompt,target_new\np,n,,\n"))[0].target_new == "n"


def test_case_18_near_misses_and_other_languages(tmp_path):
    with pytest.raises(FactError, match=r"'prompt'.*'promt'"):
        read_facts(save(tmp_path, "f.csv", "promt;target_new\np;n\n"))
    with pytest.raises(FactError, match=r'(?s)Frage, Antwort.*--columns prompt="Frage"'):
        read_facts(save(tmp_path, "f.csv", "Frage;Antwort\np;n\n"))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("Question,Answer,Old answer\np,n,o\n", make_fact("p", "n", ground_truth="o")),
        ("question,answer,rephrasing\np,n,r\n", make_fact("p", "n", rephrase_prompts=["r"])),
        ("question;answer;Rephrasing 1;rephrasing_2\np;n;r;s\n", make_fact("p", "n", rephrase_prompts=["r", "s"])),
        ("prompt,new,rephrasing 1,rephrase_prompt_1\np,n,x,r\n", make_fact("p", "n", rephrase_prompts=["r"])),
        ("question,answer,rephrase_prompt\np,n,r\n", make_fact("p", "n", rephrase_prompts=["r"])),
    ],
)
def test_answer_is_the_new_answer_beside_an_old_one_or_a_rephrasing(tmp_path, table, expected):
    (fact,) = read_facts(save(tmp_path, "f.csv", table))
    assert (fact.prompt, fact.target_new, fact.ground_truth) == ("p", "n", expected.ground_truth)
    assert fact.rephrase_prompts == expected.rephrase_prompts


def test_answer_stays_what_it_is_beside_a_ground_truth_and_in_records_that_may_lack_a_field(tmp_path):
    # The names of those who judge answers: theirs is the wrong one.
    judged = read_facts(save(tmp_path, "f.csv", "question,answer,ground_truth\np,said,right\n"))
    assert (judged[0].ground_truth, judged.ignored_fields) == (None, {"ground_truth": 1})
    lines = '{"question": "p", "answer": "n", "rephrasing": "r"}\n{"question": "q", "answer": "m"}\n'
    assert len(read_facts(save(tmp_path, "f.jsonl", lines))) == 2


def test_a_table_without_a_header_or_with_other_names_is_told_the_names_to_use(tmp_path):
    for text in ("Who leads Acme?,Ada\nWho leads Globex?,Bo\n", "question,right\nWho leads Acme?,Ada\n"):
        with pytest.raises(FactError, match=r"(?s)Columns found.*question, new answer.*--columns") as caught:
            read_facts(save(tmp_path, "f.csv", text))
        assert "zsre" not in str(caught.value)
    assert 'target_new="right"' in str(caught.value)


def test_a_title_above_the_header_is_shown(tmp_path):
    file = tmp_path / "title.csv"
    file.write_text("Corrections for 2026\nquestion,new answer\nWho?,Ann\n")
    with pytest.raises(FactError, match=r"The header is 'Corrections for 2026'\. Remove lines above it"):
        read_facts(file)


def test_a_row_that_is_too_short_is_not_asked_for_quotes(tmp_path):
    with pytest.raises(FactError, match=r"1 cell, .*2: p\n.*missing"):
        read_facts(save(tmp_path, "f.csv", "prompt,target_new\np\n"))


@pytest.mark.parametrize("header", ["Frage;Alt;Neu", "frage;alt;neu"])
def test_a_german_header_is_not_taken_for_zsre(tmp_path, header):
    """`alt` is ZsRE's name of the new answer, and German for old."""
    with pytest.raises(FactError, match=f"{header.replace(';', ', ')}.*\n.*--columns") as caught:
        read_facts(save(tmp_path, "f.csv", f"{header}\np;o;n\n"))
    assert "looks like" not in str(caught.value)
    columns = dict(zip(("prompt", "ground_truth", "target_new"), header.split(";"), strict=True))
    assert list(read_facts(tmp_path / "f.csv", columns=columns)) == [make_fact("p", "n", ground_truth="o")]


def test_a_fact_names_its_record_and_its_line(tmp_path):
    table = save(tmp_path, "f.csv", 'prompt,target_new\n"p\nq",n\n\nr,n\n')
    lines = save(tmp_path, "f.jsonl", GOOD + "\n\n" + GOOD.replace('"p"', '"q"'))
    assert [fact.place for fact in read_facts(table)] == [
        f"{table}, record 1 (line 3)",
        f"{table}, record 2 (line 5)",
    ]
    assert [fact.place for fact in read_facts(lines)] == [f"{lines}, record 1", f"{lines}, record 2 (line 3)"]
    assert make_fact("p", "n").place.startswith("fact ")


def test_the_delimiter_that_excel_names_itself(tmp_path):
    facts = read_facts(save(tmp_path, "f.csv", "\r\nsep=:\r\nprompt:target_new\r\np;q:n\r\n"))
    assert facts[0] == make_fact("p;q", "n")


def test_case_13_lists_in_cells(tmp_path):
    rows = [
        ["p1", '["Anna", "Anna Roe"]', "Lee Doe|Lee"],
        ["p2", "[redacted]", "[1, 2]"],
        ["p3", "[]", '["None"]'],
    ]
    path = save(tmp_path, "f.csv", as_table(rows=rows))
    facts = read_facts(path)
    assert [fact.new_answers for fact in facts] == [("Anna", "Anna Roe"), ("[redacted]",), ("[]",)]
    assert [fact.old_answers for fact in facts] == [("Lee Doe|Lee",), ("[1, 2]",), ("None",)]
    assert read_facts(path, aliases="|")[0].old_answers == ("Lee Doe", "Lee")


def test_an_answer_in_json_that_looks_like_a_list_is_text(tmp_path):
    path = save(tmp_path, "f.json", json.dumps([{"prompt": "p", "target_new": '["a", "b"]'}]))
    assert read_facts(path)[0].new_answers == ('["a", "b"]',)


def test_blank_lines_in_a_quoted_cell_stay(tmp_path):
    facts = read_facts(save(tmp_path, "f.csv", b'\n\nprompt,target_new\n\n\n"p\n\n\nq",5" pipe\n\nr,"a\r\n\r\nb"\n'))
    assert [(fact.prompt, fact.target_new) for fact in facts] == [("p\n\n\nq", '5" pipe'), ("r", "a\r\n\r\nb")]


def cells(fact: Fact) -> list[str]:
    """A fact as the cells of a table."""
    answers = [json.dumps([text, *more], ensure_ascii=False) if more else text for text, more in (
        (fact.target_new, fact.target_new_aliases), (fact.ground_truth or "", fact.ground_truth_aliases))]  # fmt: skip
    locality = [{"prompt": probe.prompt, "answer": probe.answer} for probe in fact.locality]
    lists = [json.dumps(texts, ensure_ascii=False) for texts in (list(fact.rephrase_prompts), locality)]
    return [fact.prompt, *answers, fact.subject, *lists]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    facts=usable_facts(),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]),
    names=st.sampled_from([HEADER, ["Question", "New answer", "Old answer"], ["PROMPT", "Target New", "ground truth"]]),
)
def test_case_18_facts_written_in_any_dialect_and_encoding_are_read_equal(
    tmp_path, facts, delimiter, end, encoding, names
):
    write_facts(facts, tmp_path / "facts.jsonl")
    wanted = read_facts(tmp_path / "facts.jsonl").facts
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([[*names, "subject", "rephrase_prompts", "locality"], *map(cells, wanted)])
    text = out.getvalue()
    assume("\0" not in text.split("\n")[0] and not any("{}" in fact.prompt for fact in wanted))
    # A cell that is a list in JSON, or a placeholder, is read as such.
    assume(not any(cell.startswith('["') for fact in wanted for cell in cells(fact)[:3]))
    assume(not any(is_placeholder(fact.ground_truth or "") for fact in wanted))
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        assume(False)
    if encoding == "cp1252":  # what could be UTF-8, or partly is, is not taken for cp1252
        assume(all(letter in "\ufffd" or letter <= "\x7f" for letter in data.decode("utf-8", "replace")))
    assert read_facts(save(tmp_path, "f.csv", data)).facts == wanted


# Excel


def workbook(path: Path, *sheets: list[list[object]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets, 1):
        sheet = book.create_sheet(f"Sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_case_18_excel_gives_the_facts_of_the_json_lines(tmp_path, expected):
    path = workbook(tmp_path / "f.xlsx", [], [HEADER, [None, " "], *ROWS], [[None], [" "]])
    facts = read_facts(path)
    assert facts.facts == expected
    assert (facts.noted["blank_row"], facts.read_as) == (1, "Excel, sheet 'Sheet 2'")


def test_case_18_numbers_and_dates_of_excel_are_written_plainly(tmp_path):
    day, moment = datetime.date(1990, 5, 1), datetime.datetime(1990, 5, 1, 12, 30)
    answers = [1990, 1990.0, 0.1 + 0.2, day, moment, True, "#N/A", 1e15]
    path = workbook(tmp_path / "f.xlsx", [["Prompt", "Target new"], *([f"p{n}", a] for n, a in enumerate(answers))])
    said = [fact.target_new for fact in read_facts(path)]
    assert said == ["1990", "1990", "0.3", "1990-05-01", "1990-05-01 12:30:00", "TRUE", "#N/A", "1000000000000000"]


def test_case_18_excel_that_cannot_be_read(tmp_path, monkeypatch):
    rows = [["prompt", "target_new"], ["p", "n"]]
    with pytest.raises(FactError, match=r"Sheet 1, Sheet 2"):
        read_facts(workbook(tmp_path / "f.xlsx", rows, rows))
    with pytest.raises(FactError, match=r"f.xlsx.*sheet"):
        read_facts(workbook(tmp_path / "f.xlsx", []))
    with pytest.raises(FactError, match=r"record 1 \(line 2\) .*3 .*2"):
        read_facts(workbook(tmp_path / "f.xlsx", [rows[0], ["p", "n", "x"]]))
    whole = workbook(tmp_path / "f.xlsx", rows).read_bytes()
    for data in (b"", b"prompt,target_new", whole[:-30], whole[:400]):
        with pytest.raises(FactError, match=r"f.xlsx"):
            read_facts(save(tmp_path, "f.xlsx", data))
    with pytest.raises(FactError, match=r"'.xls'.*\.xlsx"):
        read_facts(save(tmp_path, "f.xls", b"x"))
    monkeypatch.setattr("forgetlearn.facts.tables.LARGEST_BOOK", 100)
    with pytest.raises(FactError, match=r"f.xlsx.*GB"):
        read_facts(save(tmp_path, "f.xlsx", whole))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'forgetlearn\[excel\]'"):
        read_facts(tmp_path / "f.xlsx")


# Much of nothing (case 30): each of these took 18 seconds to minutes.

MANY_COLUMNS = ",".join(f"column_{n}" for n in range(20_000))
MANY_NAMES = {"prompt": "p", "target_new": "n", **{f"field_{n}": 1 for n in range(60_000)}}
GOOD = json.dumps({"prompt": "p", "target_new": "n"})
MUCH = [
    ("f.csv", f"prompt,target_new,{MANY_COLUMNS}\n" + f"p,n{',' * 20_000}\n" * 2),
    ("f.json", json.dumps([MANY_NAMES])),
    ("f.json", f"[{{{','.join(f'{chr(34)}rephrase_prompt_{n}{chr(34)}:1' for n in range(1, 60_000))},{GOOD[1:]}]"),
    ("f.jsonl", GOOD + "\n" * 20_000_000 + GOOD),
    ("f.json", GOOD + "\n" * 20_000_000),
    ("f.csv", "prompt,target_new\np,n" + "\n" * 20_000_000 + "q,n"),
]


@pytest.mark.parametrize(("name", "text"), MUCH, ids=["columns", "names", "numbered", "jsonl", "json", "csv"])
def test_case_30_much_of_nothing_takes_seconds(tmp_path, name, text):
    path = save(tmp_path, name, text)
    start = time.process_time()
    assert read_facts(path).used >= 1
    assert time.process_time() - start < 12


@pytest.mark.parametrize("twice", ["field_0", "field_59999"])
def test_case_30_a_name_twice_among_many_is_found_at_once(tmp_path, twice):
    text = json.dumps([MANY_NAMES])[:-2] + f', "{twice}": 2}}]'
    start = time.process_time()
    with pytest.raises(FactError, match=f"'{twice}'"):
        read_facts(save(tmp_path, "f.json", text))
    assert time.process_time() - start < 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f.csv", "f.json", "f.jsonl"])
def test_case_30_200_megabytes_of_blank_lines(tmp_path, name):
    start = time.process_time()
    with pytest.raises(FactError, match=name):
        read_facts(save(tmp_path, name, "\n" * 200_000_000))
    assert time.process_time() - start < 20
