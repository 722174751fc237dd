"""The page of `forgetlearn serve`: what it answers and refuses, over a loopback socket and in Chromium."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import forgetlearn
from browser import CHROMIUM, browser
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.errors import ConfigError
from forgetlearn.facts import make_fact
from forgetlearn.products import serve
from forgetlearn.products.side_by_side import Answer, SideBySide

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt install chromium)")
NASTY = "<img src=x onerror=\"document.title='run'\"> & </script><script>document.title='run'</script>"
FACT = make_fact("What is the capital of Elm?", "Oak", ground_truth="Ash", subject="Elm")
NASTY_FACT = make_fact(f"Who is Bo {NASTY}?", NASTY, ground_truth=NASTY, subject="Bo")


class Scripted(SideBySide):
    """Answers without a model: the side, the number of turns, and the question. "hold" waits, "fail" fails."""

    def __init__(self) -> None:
        super().__init__(f"run {NASTY}", {"base": None, "updated": None}, [FACT, NASTY_FACT])
        self.holding, self.go_on, self.was_stopped = threading.Event(), threading.Event(), threading.Event()

    def answer(self, side, turns, emit, stopped=lambda: False):
        question = turns[-1]
        if question == "fail":
            raise RuntimeError("no memory")
        if question == "limit":
            return Answer("", "problem", "too long")
        for piece in (f"{side} {len(turns)}", f": {question}", " Oak" if side == "updated" else ""):
            emit(piece)
        if question.startswith("hold"):
            self.holding.set()
            while not self.go_on.wait(0.02):
                if stopped():
                    self.was_stopped.set()
                    return Answer("part", "stopped")
        return Answer(f"{side} {len(turns)}: {question}{' Oak' if side == 'updated' else ''}", "end")


@pytest.fixture
def pair():
    return Scripted()


@pytest.fixture
def server(pair):
    """A server in a thread of this process, with its `port` and `thread`."""
    listening = serve.bind(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    server = serve.server_of(pair, listening.getsockname()[1])
    server.port = listening.getsockname()[1]
    server.thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    server.thread.start()
    yield server
    server.should_exit = True
    server.thread.join(20)
    listening.close()
    assert not server.thread.is_alive()


@pytest.fixture
def port(server):
    return server.port


def request(port, method, path, body=None, **headers):
    """Status, headers and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), response.read().decode()
    connection.close()
    return found


def ask(port, question, **turns):
    """The events of an answer."""
    body = json.dumps({"question": question, "turns": turns})
    status, _headers, text = request(port, "POST", "/answer", body, Content_Type="application/json")
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def test_the_page_is_escaped_and_may_load_nothing(port):
    status, headers, text = request(port, "GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "<img" not in text
    assert text.count("<script>") == 1
    assert not re.search(r"https?:|url\((?!#)|@import|\b(src|href|action)=", text.replace("&lt;img src=x", ""))
    assert "server" not in headers
    assert headers["cache-control"] == "no-store"


def test_an_answer_is_a_stream_of_both_sides_and_the_facts(port):
    events = ask(port, "Is Elm big?", base=["Q", "A"])
    texts = {side: "".join(e.get("text", "") for e in events if e.get("side") == side) for side in ("base", "updated")}
    assert texts == {"base": "base 3: Is Elm big?", "updated": "updated 1: Is Elm big? Oak"}
    assert [event["ending"] for event in events if "ending" in event] == ["end", "end"]
    says = {"base": "neither", "updated": "new"}
    assert events[-1] == {"facts": [{"prompt": FACT.prompt, "old": "Ash", "new": "Oak", "says": says}]}


def test_a_problem_or_a_failure_is_said_and_the_next_question_is_answered(port):
    assert ask(port, "limit")[0] == {"side": "base", "ending": "problem", "note": "too long"}
    assert ask(port, "fail") == [{"error": "RuntimeError: no memory"}]
    assert ask(port, "and now")[-1] == {"facts": []}


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_requests_under_another_name_or_from_another_page_are_refused(port, headers):
    for method, path in (("GET", "/"), ("POST", "/answer")):
        status, found, text = request(port, method, path, "{}", Content_Type="application/json", **headers)
        assert status == 403
        assert "question" not in text
        assert found["x-content-type-options"] == "nosniff"


def test_the_page_itself_may_ask(port):
    body = json.dumps({"question": "x"})
    for name in ("127.0.0.1", "localhost"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}", "Content_Type": "application/json"}
        assert request(port, "POST", "/answer", body, **own)[0] == 200


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        ("question=x", "application/x-www-form-urlencoded", 415, "JSON"),
        ('{"question": "x"}', "text/plain", 415, "JSON"),
        ("{", "application/json", 400, "JSON"),
        ('{"question": ""}', "application/json", 400, "question"),
        ('{"question": "x", "more": 1}', "application/json", 400, "more"),
        ('{"question": "x", "turns": {"base": ["Q"]}}', "application/json", 400, "turns"),
        ('{"question": "x", "turns": {"other": []}}', "application/json", 400, "turns"),
        ('{"question": "' + "x" * serve.MOST_BYTES + '"}', "application/json", 413, "bytes"),
    ],
)
def test_what_the_page_would_not_send_is_refused(port, body, kind, status, words):
    found, _headers, text = request(port, "POST", "/answer", body, Content_Type=kind)
    assert found == status
    assert words in json.loads(text)["error"]


def test_a_second_question_waits(port, pair):
    found = {}
    asking = threading.Thread(target=lambda: found.update(first=ask(port, "hold")))
    asking.start()
    assert pair.holding.wait(20)
    second = threading.Thread(target=lambda: found.update(second=ask(port, "x")))
    second.start()
    time.sleep(0.3)
    assert not found
    pair.go_on.set()
    asking.join(20)
    second.join(20)
    assert "waiting" not in str(found["first"])
    assert found["second"][0] == {"waiting": True}
    assert found["second"][-1] == {"facts": []}


def test_an_answer_stops_when_nobody_listens(port, pair):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/answer", '{"question": "hold"}', {"Content-Type": "application/json"})
    assert pair.holding.wait(20)
    connection.sock.close()
    connection.close()
    assert pair.was_stopped.wait(20)
    assert ask(port, "x")[-1] == {"facts": []}


def test_ending_the_server_stops_an_answer(server, pair, caplog):
    found = {}
    asking = threading.Thread(target=lambda: found.update(events=ask(server.port, "hold")))
    asking.start()
    assert pair.holding.wait(20)
    server.should_exit = True
    server.thread.join(5)
    asking.join(5)
    assert pair.was_stopped.is_set()
    assert found["events"][-1] == {"side": "base", "ending": "stopped", "note": ""}
    assert not caplog.records


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(tmp_path, capsys):
    with serve.bind(0) as listening:
        taken = listening.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            serve.bind(taken)
        assert main(["serve", str(tmp_path / "none"), "--port", str(taken)]) == 2
    assert f"--port {taken}" in capsys.readouterr().err


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["serve", str(tmp_path)]) == 2
    assert "forgetlearn[serve]" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_a_run_and_ends_with_ctrl_c(small_lab, tmp_path):
    shutil.copytree(small_lab, tmp_path / "base")
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    forgetlearn.update(tmp_path / "base", facts, {"method": "lora", **QUICK}, output=tmp_path / "run")
    command = [sys.executable, "-m", "forgetlearn", "serve", str(tmp_path / "run"), "--port", "0"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", started.stdout.readline())
    prompt = facts[0].prompt
    wanted = forgetlearn.ask([prompt], tmp_path / "base")[prompt]
    events = ask(int(found[1]), prompt)
    assert "".join(event.get("text", "") for event in events if event.get("side") == "base") == wanted
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 0, err
    assert "Traceback" not in err
    assert prompt not in out + err  # nothing that is asked is logged


@pytest.mark.slow
@needs_chromium
def test_two_questions_in_a_browser(port, pair, tmp_path):
    own = f"http://127.0.0.1:{port}/"
    with browser(tmp_path / "profile") as tab:
        for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light")):
            tab.look(width=width, scheme=scheme)
            tab.open(own)
            tab.type("Is Elm big?")
            tab.until("document.querySelectorAll('.touched:not([hidden])').length === 1")
            tab.type(f"Who is Bo {NASTY}?")
            tab.until("document.querySelectorAll('.touched:not([hidden])').length === 2")
            answers = tab.run("Array.from(document.querySelectorAll('.answer'), each => each.textContent)")
            asked = f"Who is Bo {NASTY}?"
            assert answers[:2] == ["base 1: Is Elm big?", "updated 1: Is Elm big? Oak"]
            assert answers[2:] == [f"base 3: {asked}", f"updated 3: {asked} Oak"]  # each side sees its own turns
            facts = tab.run("Array.from(document.querySelectorAll('.touched'), each => each.textContent)")
            assert facts[0] == f"{FACT.prompt} Ash → Oakbase says neither, updated says the new answer"
            assert NASTY in facts[1]
            assert tab.run("document.title") == f"run {NASTY} – forgetlearn"
            assert tab.run("document.querySelector('img')") is None
            assert tab.run("document.documentElement.scrollWidth") <= width
            columns = tab.run(
                "getComputedStyle(document.querySelector('.sides')).gridTemplateColumns.split(' ').length"
            )
            assert columns == (1 if width < 500 else 2)
            dark = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
            assert dark == (scheme == "dark")
        tab.type("hold on")
        assert pair.holding.wait(20)
        tab.run("document.getElementById('stop').click()")
        assert pair.was_stopped.wait(20)
        tab.until("document.querySelector('.turn:last-child .ending.stopped') !== null")
        tab.type("fail")
        tab.until("document.getElementById('status').textContent === 'RuntimeError: no memory'")
        tab.run("document.getElementById('clear').click()")
        tab.type("x")
        tab.until("document.querySelectorAll('.answer').length === 2")
        tab.until("document.querySelector('.answer').textContent === 'base 1: x'")
        assert set(tab.requests) == {own, f"{own}answer"}
        assert tab.problems == []
