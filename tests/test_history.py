"""The chain of updates: carried on from product to product, shown, verified; no local path in it."""

import json
import shutil

import pytest

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.errors import RunError
from forgetlearn.products import chain as history
from forgetlearn.report import run_page
from forgetlearn.runs import retention
from forgetlearn.storage import digests, disk, run_folder
from written_by_hand import MEAN, an_update, write_chain


@pytest.fixture(scope="module")
def twice(small_lab, tmp_path_factory):
    """A folder with two runs: `first` from the lab (an adapter, merged too), `second` from first's merged model."""
    root = tmp_path_factory.mktemp("twice")
    lines = (small_lab / "facts.jsonl").read_text().splitlines(keepends=True)
    (root / "early.jsonl").write_text("".join(lines[:3]))
    (root / "late.jsonl").write_text("".join(lines[3:5]))
    config = {"method": "f-lora", "save_merged": True, **QUICK}
    forgetlearn.update(small_lab, root / "early.jsonl", config, output=root / "first")
    config = {
        "method": "f-ft",
        **QUICK,
        "forget": QUICK["forget"] | {"modules": {"mlp": 1, "head": 0.5}, "rows": "answers"},
    }
    forgetlearn.update(root / "first/merged", root / "late.jsonl", config, output=root / "second")
    return root


def test_a_product_tells_of_every_update_that_made_it(twice):
    chain = history.chain_of(twice / "second")
    assert [update.method for update in chain] == ["f-lora", "f-ft"]
    assert [update.facts.used for update in chain] == [3, 2]
    assert [update.facts.source for update in chain] == ["early.jsonl", "late.jsonl"]
    assert chain[0] == history.chain_of(twice / "first/merged")[0]
    summary = disk.read_json(twice / "second/summary.json")
    told = chain[1].scores["reliability"]["token"].as_json()
    assert told == {name: summary["phases"]["updated"]["reliability"]["token"][name] for name in told}
    assert told["n"] == 2
    weights = twice / "second/model/model.safetensors"
    assert chain[1].files["model.safetensors"] == digests.sha256_of(weights)


def test_a_run_knows_its_parent(twice):
    parents = [run_folder.RunFolder.open(twice / name).manifest.parent for name in ("first", "second")]
    assert parents[0].run is None
    assert parents[1].run == str(twice / "first")
    assert history.runs_before(twice / "second/model") == [twice / "second", twice / "first"]


def test_no_local_path_is_in_it(twice, small_lab):
    text = (twice / "second/model/forgetlearn.json").read_text()
    assert str(twice) not in text
    assert small_lab.name not in text


def test_the_chain_is_no_part_of_the_hash_of_a_base(twice, tmp_path):
    copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
    before = digests.sha256_of(copy)
    (copy / "forgetlearn.json").unlink()
    assert digests.sha256_of(copy) == before


def test_log_prints_the_chain(twice, small_lab, capsys):
    assert main(["log", str(twice / "second"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert out.index("f-lora, coef 0.3") < out.index("f-ft, coef 0.3")
    assert "3 from early.jsonl" in out
    assert "weights forget mlp x 1, head x 0.5 (rows of the vocabulary: answers); learn all" in out
    assert "weights forget all; learn down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in out
    assert "(n 2)" in out
    assert "verified" in out
    assert main(["log", str(twice / "first/adapter"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main(["log", str(small_lab)]) == 0
    assert "no update" in capsys.readouterr().out


def test_log_verify_finds_a_changed_file(twice, tmp_path, capsys):
    copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert main(["log", str(copy), "--verify"]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["update", "compare"])
def test_nothing_is_made_from_a_damaged_product(twice, tmp_path, capsys, command):
    copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    words = [command, "--model", str(copy), "--facts", str(twice / "late.jsonl"), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ['{"updates": 3}', '{"updates": [{"when": "x"}]}', "[]", "{"])
def test_a_damaged_chain_is_an_error(tmp_path, text):
    (tmp_path / "forgetlearn.json").write_text(text)
    with pytest.raises(RunError, match=r"forgetlearn\.json"):
        history.chain_of(tmp_path)


def test_the_product_of_what_has_none(twice, tmp_path):
    run = shutil.copytree(twice / "second", tmp_path / "run")
    shutil.rmtree(run / "model")
    with pytest.raises(RunError, match="model/"):
        history.product_of(run)
    disk.write_json(run / "summary.json", disk.read_json(run / "summary.json") | {"product": None})
    with pytest.raises(RunError, match="scores"):
        history.product_of(run)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"updates":[{"when":"x","facts":{}}]}', "updates.0.method"),
        ('{"updates": {}}', "updates"),
        ("null", "JSON object"),
        ('"text"', "JSON object"),
        ("[" * 100_000, "deep"),
        ('{"updates": ' + "[" * 300 + "]" * 300 + "}", "deep"),
        (json.dumps({"updates": [an_update(facts={"used": "3"})]}), "updates.0.facts.used"),
        (json.dumps({"updates": [an_update(seed=True)]}), "updates.0.seed"),
        (json.dumps({"updates": [an_update(coef=10**400)]}), "updates.0.coef"),
        (json.dumps({"updates": [an_update(files={"../../secret.safetensors": "0"})]}), "secret"),
    ],
)
def test_case_23_a_strangers_chain_is_read_or_refused_by_name(twice, tmp_path, capsys, text, field):
    copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
    (copy / "forgetlearn.json").write_text(text)
    facts, out = str(twice / "late.jsonl"), str(tmp_path / "out")
    for words in (
        ["log", copy],
        ["evaluate", "--model", copy, "--facts", facts, "--retention", "--output", out],
        ["update", "--model", copy, "--facts", facts, "--output", out],
    ):
        assert main([*map(str, words)]) == 2
        error = capsys.readouterr().err
        assert "forgetlearn.json" in error
        assert field in error
        assert error.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_an_error(tmp_path):
    with pytest.raises(RunError, match="nothing/at/all"):
        history.chain_of(tmp_path / "nothing/at/all")


def test_facts_are_found_by_their_hash(twice):
    first, second = history.chain_of(twice / "second")
    places = [twice / "second", twice / "first"]
    assert [fact.prompt for fact in history.find_facts(first, places)] == [
        row["prompt"] for row in disk.read_rows(twice / "first/inputs.jsonl")
    ]
    assert history.find_facts(second, [twice / "early.jsonl", twice / "late.jsonl"]).used == 2
    assert history.find_facts(first, [twice / "second", twice / "nowhere"]) is None


class TestRetention:
    def test_the_facts_of_earlier_updates_are_asked_again(self, twice, capsys):
        model, late, output = twice / "second/model", twice / "late.jsonl", twice / "scores"
        words = ["evaluate", "--model", model, "--facts", late, "--retention", "--output", output]
        assert main([*map(str, words), "--set", "evaluate.protocols=[token,generate]"]) == 0
        assert "update 1, early.jsonl: retention of 3 facts: token" in capsys.readouterr().out
        summary = disk.read_json(output / "summary.json")
        (told,) = summary["retention"]
        assert (told["update"], told["facts"], told["superseded"]) == (1, 3, 0)
        overall = summary["phases"]["model"]["retention"]
        assert overall == told["scores"]
        assert {protocol: cell["n"] for protocol, cell in overall.items()} == {"token": 3, "generate": 3, "contains": 3}
        rows = disk.read_rows(output / "retention.jsonl")
        token = [row["retention"] for row in rows if row["protocol"] == "token"]
        assert overall["token"]["mean"] == pytest.approx(100 * sum(token) / 3)
        # the same as the same facts, scored by themselves
        early = forgetlearn.evaluate(model, twice / "early.jsonl", QUICK, output=twice / "early")
        assert disk.read_json(early / "summary.json")["phases"]["model"]["reliability"]["token"] == overall["token"]
        for page in ("report.md", "report.html"):
            assert "Earlier updates" in (output / page).read_text()
            assert "Earlier updates" not in (early / page).read_text()

    def test_the_curve_over_earlier_updates(self, twice, tmp_path):
        output = forgetlearn.evaluate(twice / "second/model", twice / "late.jsonl", QUICK, output=tmp_path / "scores")
        summary = disk.read_json(output / "summary.json")
        cell = MEAN
        told = {"when": "now", "source": "f.jsonl", "facts": 4, "superseded": 0}
        scores = [{"token": cell}, {"token": {**cell, "mean": 100.0, "high": 100.0}}]
        updates = [{**told, "update": number, "scores": one} for number, one in enumerate(scores, 1)]
        for shown in (1, 2):
            disk.write_json(output / "summary.json", {**summary, "retention": updates[:shown]})
            run_folder.RunFolder.open(output).finish()  # notes the hashes of what is there
            run_page.write_run(output)
            text = "retention in percent, 1, 2: token 50.0, 100.0"
            assert (text in (output / "report.html").read_text()) == (shown == 2)

    def test_a_fact_that_was_changed_again_is_not_asked(self, twice, tmp_path):
        copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
        early = forgetlearn.read_facts(twice / "early.jsonl")
        again = forgetlearn.read_facts(twice / "early.jsonl", limit=1)
        (one,) = retention.earlier_updates(copy, again, [twice / "first"])
        assert one.superseded == 1
        assert [fact.prompt for fact in one.facts] == [fact.prompt for fact in early[1:]]

    def test_the_newest_of_three_updates_is_the_one_that_counts(self, tmp_path):
        """Update 1 has a, b, c; update 2 changes b; update 3 changes c and d. Still to hold: a of 1, b of 2."""
        told = []
        for number, prompts in enumerate(("abc", "be", "cd"), 1):
            rows = [{"prompt": f"Where is {p}?", "target_new": f"In {number}."} for p in prompts]
            disk.write_rows(tmp_path / f"{number}.jsonl", rows)
            facts = forgetlearn.read_facts(tmp_path / f"{number}.jsonl")
            counts = {"source": f"{number}.jsonl", "used": facts.used, "sha256": facts.sha256()}
            told.append(an_update(facts=counts))
        write_chain(tmp_path, *told)
        places = [tmp_path / f"{number}.jsonl" for number in (3, 1, 2)]
        one, two = retention.earlier_updates(tmp_path, facts, places)
        assert [[fact.prompt for fact in each.facts] for each in (one, two)] == [
            ["Where is a?"],
            ["Where is b?", "Where is e?"],
        ]
        assert (one.superseded, two.superseded) == (2, 0)
        assert (one.number, two.number) == (1, 2)

    def test_facts_that_stand_in_for_the_last_updates_are_said_to(self, twice, tmp_path, caplog):
        copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
        late, one = (forgetlearn.read_facts(twice / "late.jsonl", limit=limit) for limit in (None, 1))
        retention.earlier_updates(copy, late, [twice / "first"])
        assert "stand in" not in caplog.text
        retention.earlier_updates(copy, one, [twice / "first"])
        assert "the 2 facts of the last update (late.jsonl)" in caplog.text

    def test_facts_that_are_nowhere_are_an_error(self, twice, tmp_path, small_lab, capsys):
        copy = shutil.copytree(twice / "second/model", tmp_path / "copy")
        words = ["evaluate", "--model", copy, "--facts", twice / "late.jsonl", "--output", tmp_path / "out"]
        assert main([*map(str, words), "--retention"]) == 2
        assert "update 1" in capsys.readouterr().err
        assert main([*map(str, words), "--earlier", str(twice / "second")]) == 2
        assert "--earlier" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        with pytest.raises(RunError, match="--retention"):
            retention.earlier_updates(twice / "first/merged", ())
