"""Many updates that share their work give what each gives by itself, once, whoever does it and whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.comparison import grid
from forgetlearn.comparison.cells import Cell, CompareSettings, cell_config, cells_of
from forgetlearn.comparison.grid import fill
from forgetlearn.comparison.table import write_table
from forgetlearn.config.base import validate
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, RunError
from forgetlearn.facts import read_facts
from forgetlearn.runs import pipeline
from forgetlearn.runs.update import update
from forgetlearn.storage import disk, locks, run_folder

METHODS = ("ft", "lora", "f-ft", "f-lora", "f-lora-ft")


@pytest.fixture(scope="module")
def facts(small_lab):
    return read_facts(small_lab / "facts.jsonl", limit=6)


@pytest.fixture(scope="module")
def config(small_lab):
    settings = {"forget.epochs": 2, "learn.epochs": 2, "forget.batch_size": 3, "learn.batch_size": 3}
    return load_config(small_lab / "update.yaml", settings | {"model.name": str(small_lab)})


SETTINGS = CompareSettings(coefs=(0.5, 2.0), seeds=(0, 1), budgets=("equal-epochs", "equal-steps"))


@pytest.fixture(scope="module")
def filled(small_lab, facts, config, tmp_path_factory):
    """A comparison, and how often each piece of work was done for it."""
    done = {"tune_on_old": 0, "score": []}
    own_tune, own_score = pipeline.tune_on_old, pipeline.scoring.score
    with pytest.MonkeyPatch.context() as patch:

        def tune(*args, **options):
            done["tune_on_old"] += 1
            return own_tune(*args, **options)

        def score(*args, **options):
            done["score"].append(options["phase"])
            return own_score(*args, **options)

        patch.setattr(pipeline, "tune_on_old", tune)
        patch.setattr(pipeline.scoring, "score", score)
        output = tmp_path_factory.mktemp("compare") / "out"
        cells = fill(small_lab, facts, SETTINGS, config, output=output)
    return output, cells, done


def rows_of(folder):
    return (folder / "facts.jsonl").read_text()


def test_the_cells_are_methods_by_coefficients_by_seeds():
    config = load_config(None, {"learn.epochs": 3})
    cells = cells_of(SETTINGS, config)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * (2 + 2 + 3 * 2)
    assert Cell("ft", None, 6, 1, "equal-steps") in cells  # 3 of learning and 3 that forgetting costs
    assert Cell("f-lora", 0.5, 3, 0, "equal-epochs") in cells
    assert [cell.name for cell in cells_of(CompareSettings(methods=("f-ft",), coefs=(0.3,), seeds=(4,)), config)] == [
        "f-ft-coef0.3-3epochs-seed4"
    ]
    several = CompareSettings(methods=("ft",), seeds=(0,), epochs=(1, 8))
    assert [cell.epochs for cell in cells_of(several, config)] == [1, 8]


def test_without_a_number_of_epochs_a_cell_learns_until_learned(small_lab, facts, config, tmp_path):
    (cell,) = cells_of(CompareSettings(methods=("lora",), seeds=(0,)), load_config())
    assert cell.name == "lora-until-learned-seed0"
    assert cell_config(load_config(), cell, {}).learn.until == "learned"
    learned = config.model_copy(update={"learn": config.learn.model_copy(update={"until": "learned"})})
    with pytest.raises(ConfigError, match=r"budgets.*--epochs"):
        fill(small_lab, facts, SETTINGS, learned, output=tmp_path / "out")
    several = CompareSettings(methods=("ft",), seeds=(0,), epochs=(1, learned.learn.max_epochs))
    cells = cells_of(several, learned)
    assert {cell_config(learned, cell, {}).learn.until for cell in cells} == {"epochs"}


def test_work_is_shared(filled):
    _output, cells, done = filled
    assert done["tune_on_old"] == 4  # two seeds, all weights and LoRA
    assert done["score"].count("base") == 1
    assert done["score"].count("forgotten") == 8  # two coefficients each; f-lora and f-lora-ft forget alike
    assert done["score"].count("updated") == len(cells)


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_what_update_gives(filled, small_lab, facts, config, tmp_path, method):
    output, _cells, _done = filled
    changes = {"method": method, "seed": 1, "forget": config.forget.model_copy(update={"coef": 2.0})}
    update(small_lab, facts, config.model_copy(update=changes), output=tmp_path / "run")
    coef = "-coef2" if method.startswith("f-") else ""
    assert rows_of(output / "cells" / f"{method}{coef}-2epochs-seed1") == rows_of(tmp_path / "run")


def test_a_cell_is_a_run_folder(filled):
    output, cells, _done = filled
    for cell in cells:
        folder = output / "cells" / cell.name
        assert run_folder.is_finished(folder)
        summary = disk.read_json(folder / "summary.json")
        assert (summary["method"], summary["coef"], summary["seed"]) == (cell.method, cell.coef, cell.seed)
    from forgetlearn.report.run_page import write_run

    write_run(folder)
    assert (folder / "report.html").is_file()


def test_what_is_done_is_not_done_again(filled, small_lab, facts, config, monkeypatch):
    output, cells, _done = filled
    before = {cell.name: (output / "cells" / cell.name / "facts.jsonl").stat().st_mtime_ns for cell in cells}
    monkeypatch.setattr(pipeline, "learn", None)  # called, it fails
    assert fill(small_lab, facts, SETTINGS, config, output=output, resume=True) == cells
    assert before == {cell.name: (output / "cells" / cell.name / "facts.jsonl").stat().st_mtime_ns for cell in cells}


def in_child(job):
    """Process id of a forked child that does the job."""
    child = os.fork()
    if child == 0:
        try:
            job()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_two_processes_do_each_cell_once(small_lab, facts, config, tmp_path):
    settings = CompareSettings(methods=("ft", "f-lora"), coefs=(0.5, 2.0), seeds=(0, 1))
    output = tmp_path / "out"
    fill(small_lab, facts, settings.model_copy(update={"methods": ("ft",)}), config, output=tmp_path / "warm-up")
    run_folder.RunFolder.create(
        output, {"run": config.model_dump(mode="json"), "compare": settings.model_dump(mode="json")}, {}
    )
    log = tmp_path / "log"
    own = grid.Worker._fill

    def noted(self, cell, folder):
        with log.open("a") as file:
            file.write(cell.name + "\n")
        own(self, cell, folder)

    def job():
        grid.Worker._fill = noted
        grid.help_fill(grid.Comparison(output, config, facts, cells_of(settings, config)))

    children = [in_child(job), in_child(job)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(cell.name for cell in cells_of(settings, config))


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    pytest.fail(f"{path} did not come")


def test_the_claim_of_a_killed_process_is_taken_over(small_lab, facts, config, tmp_path):
    settings = CompareSettings(methods=("ft",), seeds=(0,))
    begun, _lm = grid.begin(small_lab, facts, settings, config, output=tmp_path / "out", resume=False, overwrite=False)
    (cell,) = begun.open_cells()
    (begun.path / "cells").mkdir()
    lock = begun.path / "cells" / f".{cell.name}.lock"

    def hold():
        with locks.claimed(lock) as is_ours:
            assert is_ours
            (tmp_path / "held").touch()
            time.sleep(100)

    holder = in_child(hold)
    wait_for(tmp_path / "held")
    waiting = in_child(lambda: grid.help_fill(begun))
    wait_for(begun.path / "shared" / "base")
    time.sleep(3 * grid.POLL_S)
    assert begun.open_cells() == [cell]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert os.waitpid(waiting, 0)[1] == 0
    assert begun.open_cells() == []


def test_killed_at_random_moments_it_ends_with_the_same_rows(filled, small_lab, facts, config, tmp_path):
    whole, cells, _done = filled
    output = tmp_path / "out"
    waits = iter((0.3, 0.9, 1.7, 2.5, 0.6))
    kills = 0
    while True:
        child = in_child(lambda: fill(small_lab, facts, SETTINGS, config, output=output, resume=True))
        wait = next(waits, None)
        if wait is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
    assert kills >= 3
    for cell in cells:
        assert rows_of(output / "cells" / cell.name) == rows_of(whole / "cells" / cell.name)
    assert not list(output.rglob("*.unfinished-*"))


def test_other_settings_facts_or_base_are_named(filled, small_lab, facts, config):
    output, _cells, _done = filled
    with pytest.raises(RunError, match=r"config\.compare\.coefs"):
        fill(small_lab, facts, SETTINGS.model_copy(update={"coefs": (0.1,)}), config, output=output, resume=True)
    fewer = read_facts(small_lab / "facts.jsonl", limit=5)
    with pytest.raises(RunError, match=r"inputs\.facts_sha256"):
        fill(small_lab, fewer, SETTINGS, config, output=output, resume=True)
    with pytest.raises(RunError, match="--resume"):
        fill(small_lab, facts, SETTINGS, config, output=output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["f-magic"]}, "f-lora-ft"),
        ({"seeds": [1, 1]}, "seeds.*1"),
        ({"coefs": [0]}, "coefs"),
        ({"coefs": []}, "coefs"),
        ({"methods": []}, "methods.*f-lora-ft"),
        ({"budgets": ["free"]}, "equal-steps"),
    ],
)
def test_impossible_comparisons_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(CompareSettings, changes)


def test_the_recipe_of_the_paper_is_compared_without_its_teaching(small_lab, facts, tmp_path, caplog):
    recipe = {"recipe": "paper", "model": {"prompt_template": "plain"}, "learn": {"epochs": 3}}
    with caplog.at_level("INFO", "forgetlearn"):
        begun = {"output": tmp_path / "out", "resume": False, "overwrite": False}
        comparison, _lm = grid.begin(small_lab, facts, SETTINGS, recipe, **begun)
    assert (comparison.config.teach.epochs, comparison.config.learn.epochs) == (0, 3)
    assert "without its teaching" in caplog.text


def test_a_base_that_is_to_be_taught_is_refused(small_lab, facts, config, tmp_path):
    taught = config.model_copy(update={"teach": config.teach.model_copy(update={"epochs": 1})})
    with pytest.raises(ConfigError, match=r"teach\.epochs"):
        fill(small_lab, facts, SETTINGS, taught, output=tmp_path / "out")
    assert json.dumps(SETTINGS.model_dump())


def test_the_table_has_a_row_per_group_and_pairs_each_with_its_baselines(filled):
    output, _cells, _done = filled
    rows = {row.label: row for row in write_table(output).rows}
    assert list(rows)[:4] == ["ft-2epochs", "ft-4epochs-equal-steps", "lora-2epochs", "lora-4epochs-equal-steps"]
    assert len(rows) == 2 + 2 + 3 * 2
    assert rows["ft-2epochs"].against == {}
    against = rows["f-lora-coef2-2epochs"].against
    assert {budget: entry.label for budget, entry in against.items()} == {
        "equal-epochs": "lora-2epochs",
        "equal-steps": "lora-4epochs-equal-steps",
    }
    assert rows["f-lora-ft-coef0.5-2epochs"].against["equal-epochs"].label == "ft-2epochs"
    for label, row in rows.items():
        for budget, entry in row.against.items():
            for column, difference in entry.differences.items():
                ours, baseline = row.scores[column], rows[entry.label].scores[column]
                assert difference.mean == pytest.approx(ours.mean - baseline.mean, abs=1e-9), (label, budget)


def test_facts_that_some_seed_did_not_learn_are_counted_once(filled, tmp_path):
    output = shutil.copytree(filled[0], tmp_path / "out")
    for seed, unlearned in ((0, {"a": "p"}), (1, {"a": "p", "b": "q"})):
        cell = run_folder.RunFolder.open(output / "cells" / f"lora-2epochs-seed{seed}")
        summary = disk.read_json(cell.path / "summary.json")
        disk.write_json(cell.path / "summary.json", summary | {"learning": {"epochs": 2, "unlearned": unlearned}})
        cell.finish()
    rows = {row.label: row for row in write_table(output).rows}
    assert (rows["lora-2epochs"].unlearned, rows["ft-2epochs"].unlearned) == (2, 0)


def test_the_means_of_the_table_are_those_of_the_cells(filled):
    output, _cells, _done = filled
    rows = {row.label: row for row in write_table(output).rows}
    means = [
        disk.read_json(output / "cells" / f"f-ft-coef2-2epochs-seed{seed}" / "summary.json")["phases"]["updated"]
        for seed in (0, 1)
    ]
    for quantity, protocol in (("reliability", "token"), ("locality", "agreement"), ("residue", "generate")):
        expected = sum(mean[quantity][protocol]["mean"] for mean in means) / 2
        assert rows["f-ft-coef2-2epochs"].scores[f"{quantity}.{protocol}"].mean == pytest.approx(expected)
    page = (output / "compare.md").read_text()
    assert "| f-ft-coef2-2epochs |" in page
    assert "f-ft-coef2-2epochs | ft-2epochs (equal-epochs)" in page


def test_curves_at_equal_reliability(small_lab, facts, config, tmp_path):
    settings = CompareSettings(methods=("ft", "f-ft"), coefs=(1.0,), seeds=(0, 1), epochs=(1, 20))
    fill(small_lab, facts, settings, config, output=tmp_path / "out")
    (curve,) = write_table(tmp_path / "out").curves
    assert (curve.method, curve.coef, curve.against) == ("f-ft", 1.0, "ft")
    assert curve.at_equal_reliability.low < curve.at_equal_reliability.high
    assert "## At equal reliability" in (tmp_path / "out" / "compare.md").read_text()


def test_a_table_of_unfinished_cells_or_of_no_comparison_is_refused(small_lab, facts, config, tmp_path):
    whole = {"run": config.model_dump(mode="json"), "compare": SETTINGS.model_dump(mode="json")}
    run_folder.RunFolder.create(tmp_path / "begun", whole, {})
    with pytest.raises(RunError, match=r"the cell .* is not finished"):
        write_table(tmp_path / "begun")
    run_folder.RunFolder.create(tmp_path / "run", config.model_dump(mode="json"), {})
    with pytest.raises(RunError, match="does not contain a comparison"):
        write_table(tmp_path / "run")


def test_the_command(small_lab, tmp_path, capsys):
    words = f"compare --model {small_lab} --facts {small_lab}/facts.jsonl --config {small_lab}/update.yaml --limit 4"
    words += f" --methods lora,f-lora --coefs 1 --seeds 0 --epochs 1 --output {tmp_path}/out"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert "f-lora-coef1-1epochs" in shown
    assert (tmp_path / "out" / "compare.json").is_file()
    assert main([*words.split(), "--resume"]) == 0
    assert main([*words.split()]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(words.replace("f-lora ", "f-magic ").replace("/out", "/other").split()) == 2
    assert "'f-magic'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_two_workers_fill_one_table(small_lab, facts, config, tmp_path):
    settings = CompareSettings(methods=("ft", "f-lora"), coefs=(1.0,), seeds=(0, 1))
    fill(small_lab, small_lab / "facts.jsonl", settings, config, output=tmp_path / "out", workers=2)
    assert len(write_table(tmp_path / "out").rows) == 2
    with pytest.raises(ConfigError, match="workers = 2"):
        fill(forgetlearn.load_model(small_lab), facts, settings, output=tmp_path / "other", workers=2)


# It works without a pause, as a stage of fine-tuning does.
CHILD = (
    "import os, pathlib; p = pathlib.Path({path!r}); t = p.with_name('t'); "
    "t.write_text(str(os.getpid())); t.rename(p)\nwhile True: pass"
)


# Case 28
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_case_28_a_helper_ends_with_its_parent_however_that_dies(signum, tmp_path):
    script = (
        "import pickle, signal, sys, time, multiprocessing as m\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup would have it ignored
        "from forgetlearn.runtime.processes import run_tied\n"
        "if __name__ == '__main__':\n"
        f"    write = pickle.dumps((exec, ({CHILD.format(path=str(tmp_path / 'pid'))!r},)))\n"
        "    m.get_context('spawn').Process(target=run_tied, args=(write,)).start()\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")]) as parent:
        wait_for(tmp_path / "pid")
        helper = int((tmp_path / "pid").read_text())
        parent.send_signal(signum)
    assert is_gone(helper)


def is_gone(pid):
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # nobody reaps an orphan in a container without an init
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_case_28_no_worker_of_the_command_stays(small_lab, tmp_path, signum):
    words = f"compare --model {small_lab} --facts {small_lab}/facts.jsonl --config {small_lab}/update.yaml"
    words += f" --set learn.epochs=100000 --methods ft --seeds 0,1,2 --workers 2 --output {tmp_path}/out"
    with subprocess.Popen([sys.executable, "-m", "forgetlearn", *words.split()]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        for _ in range(6000):
            if len(started := children.read_text().split()) >= 2:  # the resource tracker of multiprocessing, a worker
                break
            time.sleep(0.02)
        parent.send_signal(signum)
    assert all(is_gone(int(child)) for child in started)


def test_without_generate_what_is_known_is_probed(small_lab, facts, config, tmp_path):
    scores = config.evaluate.model_copy(update={"protocols": ("token",)})
    settings = CompareSettings(methods=("f-lora",), coefs=(1.0,), seeds=(0,))
    changed = config.model_copy(update={"evaluate": scores})
    (cell,) = fill(small_lab, facts, settings, changed, output=tmp_path / "out")
    counts = disk.read_json(tmp_path / "out" / "cells" / cell.name / "summary.json")["facts"]
    assert counts["known"] == counts["forgotten"] == 6


def test_variants_are_rows_of_their_own_and_share_the_tuned_weights(small_lab, facts, config, tmp_path):
    variants = {"attn": {"modules": ["attention"], "coefs": [2]}, "rows": {"rows": "answers"}}
    settings = validate(
        CompareSettings, {"methods": ["ft", "f-ft"], "coefs": [0.5], "seeds": [0], "variants": variants}
    )
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"protocols": ("token",)})})
    fill(small_lab, facts, settings, config, output=tmp_path / "out")
    rows = write_table(tmp_path / "out").rows
    assert [(row.method, row.variant, row.coef) for row in rows] == [
        ("ft", "", None),
        ("f-ft", "", 0.5),
        ("f-ft", "attn", 2.0),
        ("f-ft", "rows", 0.5),
    ]
    assert [path.name for path in (tmp_path / "out" / "shared").glob("old-*")] == ["old-all-weights-seed0"]
    assert len(list((tmp_path / "out" / "shared").glob("forgotten-*"))) == 3  # each variant has a forgotten model
    for name in ("attn-coef2", "rows-coef0.5"):
        cell = tmp_path / "out" / "cells" / f"f-ft-{name}-2epochs-seed0"
        alone = update(small_lab, facts, load_config(cell / "config.yaml"), output=tmp_path / name)
        assert rows_of(alone.output) == rows_of(cell)
    losses = {path.read_text() for path in (tmp_path / "out" / "cells").glob("*/logs/learn.jsonl")}
    assert len(losses) == len(rows)  # each began to learn from other weights


def test_a_variant_that_learns_otherwise_is_held_against_what_learns_like_it(small_lab, facts, config, tmp_path):
    variants = {
        "held": {"methods": ["ft"], "learn_rows": "facts"},
        "held_attn": {"modules": "attention", "learn_rows": "facts"},
        "mlp": {"learn_modules": "mlp"},
    }
    asked = {"methods": ["ft", "f-ft"], "coefs": [0.5], "seeds": [0], "epochs": [1, 2], "variants": variants}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"protocols": ("token",)})})
    fill(small_lab, facts, validate(CompareSettings, asked), config, output=tmp_path / "out")
    table = write_table(tmp_path / "out")
    against = {(row.method, row.variant): row.against["equal-epochs"].name for row in table.rows if row.against}
    assert against == {
        ("ft", "held"): "ft",
        ("f-ft", ""): "ft",
        ("f-ft", "held_attn"): "ft held",
        ("f-ft", "mlp"): "ft",  # no plain fine-tuning learns like it here
    }
    assert {curve.variant: curve.against for curve in table.curves}["held_attn"] == "ft held"
    for name, learned in (("f-ft-held_attn-coef0.5", ("all", "facts")), ("f-ft-mlp-coef0.5", ("mlp", "all"))):
        own = load_config(tmp_path / "out" / "cells" / f"{name}-1epochs-seed0" / "config.yaml").learn
        assert (own.modules, own.rows) == learned
    assert "ft held" in (tmp_path / "out" / "compare.md").read_text() + (tmp_path / "out" / "report.html").read_text()


def test_a_variant_that_matches_nothing_is_found_at_once(small_lab, facts, config, tmp_path):
    settings = validate(CompareSettings, {"methods": ["f-ft"], "variants": {"x": {"modules": "heads"}}})
    with pytest.raises(ConfigError, match=r"variants\.x: forget\.modules: 'heads'"):
        fill(small_lab, facts, settings, config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="a/b"):
        validate(CompareSettings, {"variants": {"a/b": {}}})
    with pytest.raises(ConfigError, match="rome: fine-tunes nothing"):
        validate(CompareSettings, {"methods": ["rome"], "variants": {"x": {"methods": ["rome"]}}})


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"methods": ["ft", "ft-c"], "variants": {"c": {"methods": ["ft"]}}}, {}, "ft-c-2epochs-seed0"),
        ({"methods": ["f-ft"], "variants": {"x": {"coefs": [2, 2]}}}, {}, "f-ft-x-coef2-2epochs-seed0"),
        ({"methods": ["f-ft"], "coefs": [0.3, 0.30000001]}, {}, "f-ft-coef0.3-2epochs-seed0"),
        ({"methods": ["ft"], "variants": {"x": {}}}, {}, r"variants\.x: .*f-ft"),
        ({"methods": ["lora"]}, {"lora.target_modules": ["nothing"]}, "target_modules"),
    ],
)
def test_what_would_be_left_out_or_fail_later_is_found_at_once(small_lab, facts, tmp_path, settings, more, message):
    config = load_config(small_lab / "update.yaml", {"learn.epochs": 2, "model.name": str(small_lab), **more})
    settings = validate(CompareSettings, {"seeds": [0], **settings})
    with pytest.raises(ConfigError, match=message):
        fill(small_lab, facts, settings, config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_case_14_facts_without_an_old_answer_are_learned_in_every_cell(small_lab, config, tmp_path):
    lines = disk.read_rows(small_lab / "facts.jsonl")[:4]
    for line in lines[2:]:
        del line["ground_truth"]
    disk.write_rows(tmp_path / "f.jsonl", lines)
    settings = CompareSettings(methods=("ft", "f-lora"), coefs=(1.0,), seeds=(0,))
    plain = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"protocols": ("token",)})})
    cells = fill(small_lab, tmp_path / "f.jsonl", settings, plain, output=tmp_path / "out")
    for cell in cells:
        told = disk.read_json(tmp_path / "out" / "cells" / cell.name / "summary.json")["facts"]
        assert (told["used"], told["known"], told["without_old"]) == (4, 2, {"no_old_answer": 2})
        assert told["forgotten"] == (2 if cell.method == "f-lora" else None)
    write_table(tmp_path / "out")
    assert "2 of 4 facts have no old answer" in (tmp_path / "out" / "report.html").read_text()
    asking = load_config(None, {"model.name": str(small_lab), "facts.old_from": "answers,model"})
    with pytest.raises(ConfigError, match="old_from"):
        fill(small_lab, tmp_path / "f.jsonl", settings, asking, output=tmp_path / "other")
