"""The pages of runs and comparisons in headless Chromium: no request, and search, filters, sorting as they say."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from comparison_folder import NASTY as COMPARED_NASTY
from comparison_folder import make_comparison
from forgetlearn.comparison.grid import CompareSettings
from forgetlearn.comparison.table import write_table
from forgetlearn.config.schema import load_config
from forgetlearn.evaluation import statistics
from forgetlearn.report import run_page
from forgetlearn.storage import disk, run_folder
from written_by_hand import fact_counts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt install chromium)")
DRAWS = True  # looks at plots
NASTY = '<script>document.title = "run"</script> & \'q\' "r"'
PHASES = ("base", "forgotten", "updated")
# said by the updated model, its scores (reliability, generality, locality, residue), what is shown of them
KINDS = {
    "learned": ("new {}", (1.0, 1.0, 1.0, 0.0)),
    "half": ("new {}", (1.0, 0.5, 0.5, 0.5)),
    "old": ("old {}", (0.0, 0.0, 1.0, 1.0)),
    "other": ("something else", (0.0, 0.0, 1.0, 0.0)),
    "errored": (None, (None, None, 1.0, None)),
}


def make_run(path: Path, count: int, *, nasty: bool = True) -> Path:
    """A run folder of `count` facts of all kinds in turn, without a model; the second fact is nasty."""
    run = run_folder.RunFolder.create(path, load_config(None, {"model.name": "base"}).model_dump(mode="json"), {})
    inputs, rows = [], []
    kinds = list(KINDS)
    for number in range(count):
        key = f"{number:016x}"
        fact = {"id": key, "prompt": f"The capital of the country number {number} is called"}
        fact |= {"target_new": f"new {number}", "ground_truth": f"old {number}"}
        if nasty and number == 1:
            fact |= {"prompt": NASTY}
        inputs.append(fact)
        for phase in PHASES:
            said, scores = KINDS["old" if phase != "updated" else kinds[number % len(kinds)]]
            rows += _rows(key, phase, said.format(number) if said else None, scores)
    disk.write_rows(path / "inputs.jsonl", inputs)
    disk.write_rows(path / "facts.jsonl", rows)
    disk.write_json(path / "summary.json", _summary(count))
    (path / "logs").mkdir()
    for stage in ("forget", "learn"):
        losses = [{"step": step, "loss": 4 / step + (step % 7) / 10} for step in range(1, 3 * count // 8 + 2)]
        disk.write_rows(path / "logs" / f"{stage}.jsonl", losses)
    run.finish()
    run_page.write_run(path)
    return path / "report.html"


def _rows(key: str, phase: str, said: str | None, scores: tuple) -> list[dict]:
    reliability, generality, locality, residue = scores
    errors = {} if said else {"reliability": f"too long: {NASTY}"}
    row = {"fact": key, "phase": phase, "errors": {}}
    asked = {"reliability": reliability, "generality": generality, "residue": residue, "errors": errors}
    return [
        row | asked | {"protocol": "token"},
        row | asked | {"protocol": "generate", "said": said},
        row | {"protocol": "agreement", "locality": locality},
    ]


def _summary(count: int) -> dict:
    cell = {"mean": 78.4, "low": 75.1, "high": 81.5, "n": count, "errored": 0, "not_asked": 0}
    scores = {quantity: {"token": cell, "generate": cell} for quantity in ("reliability", "generality", "residue")}
    scores["locality"] = {"agreement": cell}
    head = {"method": "f-ft", "coef": 0.3, "seed": 0, "facts": fact_counts(count), "product": "model"}
    return head | {"phases": dict.fromkeys(PHASES, scores)}


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess:
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    profile = page.parent / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet]
    command += [f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def requests_in(net: Path) -> list[str]:
    """Addresses that Chromium asked for, from its log."""
    return re.findall(r'"url":"((?:https?|wss?|ftp):[^"]*)"', net.read_text(encoding="utf-8"))


# Runs in a copy of the page, whose policy lets it (the original's would not: a test below says so).
HARNESS = """
const errors = [], $ = selector => document.querySelector(selector), result = { errors };
window.onerror = message => errors.push(String(message));
document.addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
const rows = () => Array.from($("#facts").tBodies[0].rows);
const seen = () => rows().filter(row => row.getClientRects().length);
const prompts = () => seen().map(row => row.cells[0].textContent);
const timed = action => {
  const start = performance.now(); action(); document.body.offsetHeight; return performance.now() - start;
};
const type = text => timed(() => {
  $("#search").value = text; $("#search").dispatchEvent(new Event("input", { bubbles: true }));
});
const choose = name => timed(() => $(`input[name=show][value=${name}]`).click());
const head = column => $("#facts").tHead.rows[0].cells[column];
const press = column => timed(() => head(column).querySelector("button").click());
const column = number => seen().map(row => row.cells[number].textContent);
try { STEPS } catch (error) { errors.push(String(error)); }
const out = document.createElement("pre");
out.id = "result"; out.textContent = JSON.stringify(result); document.body.append(out);
"""


def drive(page: Path, steps: str) -> dict:
    """What `steps` (JavaScript, in HARNESS) put into `result`, in a copy of the page."""
    source = page.read_text(encoding="utf-8")
    source, count = re.subn(r"script-src '[^']*'", "script-src 'unsafe-inline'", source, count=1)
    assert count == 1
    watch = "<script>window.early = []; window.onerror = message => early.push(String(message));</script><style>"
    source = source.replace("<style>", watch, 1)
    script = HARNESS.replace("STEPS", "errors.push(...early);" + steps)
    copy = page.parent / "harness.html"
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = chromium(copy, "--dump-dom")
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result.pop("errors") == []
    return result


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", 20)


@needs_chromium
def test_it_runs_without_error_or_request_under_its_own_policy(page):
    source = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in source
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='\"", source)
    assert not re.search(r"\b(src|href|action|srcset)=(?!\"#)", source)
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    net = page.parent / "net.json"
    done = chromium(page, "--dump-dom", "--enable-logging=stderr", "--v=0", f"--log-net-log={net}")
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert '<output class="shown" id="shown">20 of 20 facts</output>' in done.stdout  # the script did run
    assert not [url for url in requests_in(net) if "google" not in url]  # Chromium's own housekeeping aside


@needs_chromium
def test_the_policy_stops_every_other_script(page, tmp_path):
    copy = tmp_path / "copy.html"
    added = '<script>document.title = "ran"</script><img src="x.png" onerror="document.title = 1"></body>'
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", added), encoding="utf-8")
    done = chromium(copy, "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert "<title>run – forgetlearn</title>" in done.stdout
    assert "Content Security Policy" in done.stderr


@needs_chromium
def test_text_of_facts_stays_text(page):
    result = drive(
        page,
        """
        result.prompt = rows()[1].cells[0].textContent;
        result.scripts = $("main").querySelectorAll("script").length;
        result.reason = rows()[4].querySelector(".state").title;
        result.title = document.title;
    """,
    )
    assert result["prompt"] == NASTY
    assert result["scripts"] == 0
    assert result["reason"] == f"too long: {NASTY}"
    assert result["title"] == "run – forgetlearn"


@needs_chromium
def test_search(page):
    result = drive(
        page,
        """
        const ask = text => { type(text); return [seen().length, $("#shown").textContent, $("#none").hidden]; };
        result.all = ask(""); result.number = ask("NUMBER 13"); result.said = ask("something");
        result.any_order = ask("called 13"); result.tag = ask("<script>"); result.nothing = ask("not there");
        $("#search").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        result.escape = seen().length;
    """,
    )
    assert result == {
        "all": [20, "20 of 20 facts", True],
        "number": [1, "1 of 20 facts", True],
        "said": [4, "4 of 20 facts", True],
        "any_order": [1, "1 of 20 facts", True],
        "tag": [1, "1 of 20 facts", True],
        "nothing": [0, "0 of 20 facts", False],
        "escape": 20,
    }


@needs_chromium
def test_filters_show_what_their_counts_say(page):
    result = drive(
        page,
        """
        result.filters = {};
        for (const input of document.querySelectorAll("input[name=show]")) {
          input.click();
          const count = Number(input.parentNode.querySelector("b").textContent);
          const states = new Set(seen().map(row => row.querySelector(".tag").textContent));
          result.filters[input.value] = [count, seen().length, [...states].sort().join(" ")];
        }
        choose("residue"); type("new 1"); result.both = prompts();
    """,
    )
    assert result["filters"] == {
        "all": [20, 20, "errored new old other"],
        "unlearned": [12, 12, "errored old other"],
        "residue": [8, 8, "new old"],
        "broken": [4, 4, "new"],
        "errored": [4, 4, "errored"],
    }
    assert len(result["both"]) == 5  # 1, 11, 12, 16, 17


@needs_chromium
def test_sorting_by_text_number_and_back(page):
    result = drive(
        page,
        """
        const order = () => heads.map(cell => cell.getAttribute("aria-sort"));
        const heads = Array.from($("#facts").tHead.rows[0].cells);
        result.buttons = heads.every(cell => cell.querySelectorAll("button").length === 1);
        result.before = column(2);
        press(2); result.up = column(2); result.up_order = order();
        press(2); result.down = column(2); result.down_order = order();
        press(2); result.back = column(2); result.back_order = order();
        press(8); result.locality = seen().map(row => row.cells[8].dataset.v);
        press(5); result.said = column(5);
        press(6); press(6); result.reliability = seen().map(row => row.cells[6].dataset.v);
    """,
    )
    by_number = [f"new {number}" for number in range(20)]
    assert result["buttons"]
    assert result["before"] == result["up"] == result["back"] == by_number
    assert result["down"] == by_number[::-1]
    assert [result[f"{name}_order"][2] for name in ("up", "down", "back")] == ["ascending", "descending", "none"]
    assert {order for name in ("up", "down") for order in result[f"{name}_order"][3:]} == {"none"}
    assert result["locality"] == ["0.5"] * 4 + ["1"] * 16
    assert result["said"][-4:] == [""] * 4  # what was not said comes last
    assert result["reliability"] == ["1"] * 8 + ["0"] * 8 + [""] * 4


@needs_chromium
def test_marks_say_before_and_now(page):
    result = drive(
        page,
        """
        result.half = Array.from(rows()[1].querySelectorAll(".mark"), cell => [cell.textContent, cell.title]);
        result.turns = Array.from(rows()[1].querySelectorAll(".mark"), cell => cell.className);
        result.errored = rows()[4].cells[6].textContent;
        result.old = rows()[2].querySelector(".state").textContent;
        result.told = [3, 5].map(number => rows()[0].cells[number].className);
    """,
    )
    assert result["half"] == [
        ["○●", "reliability 0 % → 100 %"],
        ["○◐", "generality 0 % → 50 %"],
        ["●◐", "locality 100 % → 50 %"],
        ["●◐", "residue 100 % → 50 %"],
    ]
    assert result["turns"] == ["mark up", "mark up", "mark down", "mark up"]
    assert result["errored"] == "○!"
    assert result["old"] == "old"
    assert result["told"] == ["t-old", "t-new"]


def test_300_facts_are_less_than_a_megabyte(tmp_path):
    size = make_run(tmp_path / "run", 300).stat().st_size
    print(f"300 facts: {size / 1e6:.2f} MB")
    assert size < 1e6


@pytest.mark.slow
@needs_chromium
def test_10000_facts_are_small_and_filtered_at_once(tmp_path):
    page = make_run(tmp_path / "run", 10_000)
    size = page.stat().st_size
    assert size < 15e6
    result = drive(
        page,
        """
        result.type = type("number 99"); result.found = seen().length;
        result.clear = type(""); result.filter = choose("broken"); result.broken = seen().length;
        result.all = choose("all"); result.sort = press(0);
    """,
    )
    took = {name: round(result[name]) for name in ("type", "clear", "filter", "all", "sort")}
    print(f"10,000 facts: {size / 1e6:.1f} MB, milliseconds {took}")
    assert (result["found"], result["broken"]) == (sum("99" in str(number) for number in range(10_000)), 2000)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The page of a comparison of 20 facts: ft and f-ft, two coefficients, two seeds."""
    settings = CompareSettings(methods=("ft", "f-ft"), coefs=(0.3, 1.0), seeds=(0, 1), epochs=(2, 5))
    folder = make_comparison(tmp_path_factory.mktemp("compared") / "out", settings, 20)
    write_table(folder)
    return folder / "report.html"


@needs_chromium
def test_a_comparison_runs_without_error_or_request(compared):
    source = compared.read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href|action|srcset)=(?!\"#)", source)
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    net = compared.parent / "net.json"
    done = chromium(compared, "--dump-dom", "--enable-logging=stderr", "--v=0", f"--log-net-log={net}")
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert '<output class="shown" id="shown">20 of 20 facts</output>' in done.stdout
    assert not [url for url in requests_in(net) if "google" not in url]


@needs_chromium
def test_tables_of_a_comparison_sort(compared):
    result = drive(
        compared,
        """
        const tables = document.querySelectorAll("table.sortable");
        result.names = Array.from(tables, table => table.parentNode.getAttribute("aria-label"));
        const scores = tables[1], column = number => Array.from(scores.tBodies[0].rows, row => row.cells[number]);
        const click = number => scores.tHead.rows[0].cells[number].querySelector("button").click();
        result.before = column(0).map(cell => cell.textContent);
        click(1); result.up = column(1).map(cell => Number(cell.dataset.v));
        click(1); result.down = column(1).map(cell => Number(cell.dataset.v));
        result.moved = column(0).map(cell => cell.textContent);
        click(1); result.back = column(0).map(cell => cell.textContent);
    """,
    )
    assert result["names"] == ["Paired differences", "Scores", "At equal reliability", None]
    assert result["up"] == sorted(result["up"]) == result["down"][::-1]
    assert len(set(result["up"])) == 6
    assert result["before"] == result["back"] != result["moved"]


@needs_chromium
def test_facts_of_a_comparison(compared):
    result = drive(
        compared,
        """
        result.prompt = rows()[1].cells[0].textContent; result.new = rows()[1].cells[2].textContent;
        result.title = document.title;
        type("<script>"); result.found = seen().length; type("");
        result.filters = {};
        for (const input of document.querySelectorAll("input[name=show]")) {
          input.click();
          result.filters[input.value] = [Number(input.parentNode.querySelector("b").textContent), seen().length];
        }
        choose("errored"); result.errored = seen()[0].cells[4].textContent;
        choose("all"); press(4); result.learned = seen().map(row => Number(row.cells[4].dataset.v));
    """,
    )
    assert result["prompt"] == result["new"] == COMPARED_NASTY
    assert result["title"] == "out – forgetlearn"
    assert result["found"] == 1
    assert all(count == shown for count, shown in result["filters"].values())
    assert result["filters"]["all"] == [20, 20]
    assert result["filters"]["gained"][0] > result["filters"]["lost"][0]
    assert result["filters"]["errored"] == [1, 1]
    assert result["errored"] == "!!"
    assert result["learned"] == sorted(result["learned"])
    assert len(set(result["learned"])) == 3


@pytest.mark.parametrize(("count", "limit"), [(300, 1e6), pytest.param(10_000, 15e6, marks=pytest.mark.slow)])
def test_a_comparison_is_small(tmp_path, monkeypatch, count, limit):
    fewer = functools.partial(statistics.paired_difference, resamples=99)  # p-values take their time
    monkeypatch.setattr(statistics, "paired_difference", fewer)
    settings = CompareSettings(coefs=(0.3,), seeds=(0, 1, 2))
    folder = make_comparison(tmp_path / "out", settings, count)
    write_table(folder)
    size = (folder / "report.html").stat().st_size
    print(f"{count} facts, 5 methods, 3 seeds: {size / 1e6:.2f} MB")
    assert size < limit
