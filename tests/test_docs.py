"""What the README and the docs show is run: their commands, their Python, the notebook, the package's docstring."""

import doctest
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

import forgetlearn
from forgetlearn.cli.main import app, main
from forgetlearn.config.base import describe
from forgetlearn.config.schema import RunConfig
from forgetlearn.lab.build import LabSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_STEPS = ROOT / "docs" / "first-steps.md"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # no hub here: a folder stands in for it, SmolLM2's own or a lab base's
PAGES = sorted((ROOT / "docs").glob("*.md"))
FORM = re.compile(r"[\[(|]|\.\.\.|(?:^|[ /=])[A-Z][A-Z_0-9]*(?![\w.-])")  # [--optional], (a | b), FILE, USER/NAME


def blocks(kind):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == kind]


def commands():
    return [line for block in blocks("") for line in block.splitlines() if line.startswith("forgetlearn ")]


def what_vllm_refuses(adapter):
    """What in an adapter's config breaks the conditions in docs/serving.md, with vLLM's own settings."""
    empty = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias", "trainable_token_indices")
    wrong = [name for name in empty if adapter.get(name)]
    wrong += ["bias"] if adapter["bias"] != "none" else []
    wrong += ["r"] if adapter["r"] not in (1, 8, 16, 32, 64, 128) else []
    names = adapter["target_modules"]
    return wrong + (["target_modules"] if not names or any("." in name or name == "lm_head" for name in names) else [])


def spreadsheets():
    """The files that first steps asks the reader to save, by name."""
    page = FIRST_STEPS.read_text(encoding="utf-8")
    names = re.findall(r"\bas `(\w+\.csv)`", page)
    tables = re.findall(r"^    question,(?:.+\n)+?(?=\n)", page, flags=re.MULTILINE)
    return {name: re.sub("^ {4}", "", table, flags=re.MULTILINE) for name, table in zip(names, tables, strict=True)}


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, table in spreadsheets().items():
        (tmp_path / name).write_text(table, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run_in_order(monkeypatch, capsys):
    """`run(lines, model, less, typed)`: the output of each command, where `model` stands in for the hub id.

    `less` adds options by command; `typed` is what the user types in chat.
    """

    def run(lines, model, less, typed="What is this?\n/bye\n"):
        outputs = {}
        for line in lines:
            words = [str(model) if word == HUB_ID else word for word in shlex.split(line)][1:]
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
            assert main([*words, *less.get(words[0], "").split()]) == 0, line
            outputs[line] = capsys.readouterr().out
            assert outputs[line], line
        return outputs

    return run


# For the default run: a smaller base, and fewer epochs. The slow run takes the commands as they are.
LESS = {
    "lab": "--set hidden_size=64 --set intermediate_size=128 --set num_hidden_layers=2 --set vocab_size=800"
    " --set epochs=10",
    "update": "--set forget.epochs=1 --set learn.epochs=1",
}
EITHER = pytest.mark.parametrize(
    "less", [pytest.param(LESS, id="less"), pytest.param({}, id="whole", marks=pytest.mark.slow)]
)


@EITHER
def test_every_command_of_the_readme_runs_in_its_order(in_tmp, small_lab, run_in_order, less):
    lines = commands()
    assert len(lines) == 4
    run_in_order(lines, small_lab, less)
    assert (in_tmp / "runs/first/adapter/adapter_model.safetensors").is_file()
    adapter = json.loads((in_tmp / "runs/first/adapter/adapter_config.json").read_text())
    assert what_vllm_refuses(adapter) == []
    assert (in_tmp / "runs/lab/model/model.safetensors").is_file()
    assert (in_tmp / "runs/lab/report.html").is_file()


@EITHER
def test_every_command_of_first_steps_runs_in_its_order(in_tmp, small_lab, run_in_order, less):
    lines = complete(FIRST_STEPS)
    assert len(lines) == 7
    assert set(commands()[:2]) <= set(lines), "the README's two commands are among them"
    outputs = run_in_order(lines, small_lab, less)
    assert "10 used" in outputs["forgetlearn facts facts.csv"]
    assert (in_tmp / "first-gguf/model.gguf").is_file()
    assert str(small_lab) in outputs["forgetlearn undo runs/first"]
    first, second = (forgetlearn.read_facts(in_tmp / "runs" / name / "inputs.jsonl") for name in ("first", "second"))
    assert (len(first), len(second)) == (10, 3)
    assert all(fact.rephrase_prompts for fact in first)
    assert any(fact.ground_truth for fact in first)


@pytest.mark.real
@pytest.mark.timeout(5400)  # seven minutes, on two cores that do nothing else
def test_first_steps_on_a_real_model(in_tmp, smollm2, run_in_order):
    (chat,) = re.findall(r"Ask `(.+?)`", FIRST_STEPS.read_text(encoding="utf-8"))
    outputs = run_in_order(complete(FIRST_STEPS), smollm2, {}, f"{chat}\nWhat is the capital of France?\n/bye\n")
    summary = json.loads((in_tmp / "runs/first/summary.json").read_text())
    scores, prompts = summary["phases"]["updated"], summary["general"]["updated"]["prompts"]
    assert scores["reliability"]["contains"]["mean"] == 100
    assert scores["generality"]["contains"]["mean"] >= 60
    assert prompts["agreement"] >= 92
    said = outputs["forgetlearn chat runs/first"]
    assert "updated says new" in said
    assert said.count("Paris") >= 2
    assert "as it was before the run" in outputs["forgetlearn undo runs/first"]
    summary = json.loads((in_tmp / "runs/second/summary.json").read_text())
    assert summary["phases"]["updated"]["reliability"]["contains"]["mean"] == 100
    assert summary["phases"]["updated"]["retention"]["contains"]["mean"] >= 80
    assert "facts.csv" in outputs["forgetlearn log runs/second"]
    facts = forgetlearn.read_facts("facts.csv", limit=3)
    exported = forgetlearn.ask([fact.prompt for fact in facts], "first-gguf/model.gguf")
    assert all(fact.target_new in exported[fact.prompt] for fact in facts)


def test_the_figures_of_the_readme_are_those_of_the_experiments():
    def rows(text):
        """Its rows by method: said, in other words, unrelated as before and other questions free, for both files."""
        found = {}
        for line in text.splitlines():
            if match := re.match(r"\|[^|]*`([\w-]+)`\)? \|", line):
                found[match[1]] = [cell.strip() for cell in line.strip("|").split("|")[1:]]
        return found

    experiments = rows((ROOT / "docs/experiments.md").read_text(encoding="utf-8"))
    shown = rows(README[: README.index("## Install")])
    assert list(shown) == ["default", "ft", "memit", "alphaedit", "in-context"]
    for name, figures in shown.items():
        zsre, zsre_probes, zsre_subject, _, _, counterfact, probes, subject, *_ = experiments[name]
        of_zsre = [*zsre.split("/"), zsre_probes, zsre_subject]
        assert figures == [*of_zsre, *counterfact.split("/"), probes, subject], name


def test_the_python_of_the_readme_runs(in_tmp, capsys):
    update, load = blocks("python")
    names = {}
    exec(compile(update, "README.md", "exec"), names)
    assert (in_tmp / "runs/python/adapter").is_dir()
    capsys.readouterr()
    exec(compile(load, "README.md", "exec"), names)
    prompt = names["facts"][0].prompt
    (said,) = forgetlearn.ask([prompt], names["result"].product).values()
    answer = capsys.readouterr().out.strip().removeprefix(prompt).strip()
    assert answer
    assert said.startswith(answer) or answer.startswith(said)


def test_the_docstring_of_the_package_runs(in_tmp):
    found = doctest.testmod(forgetlearn, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted >= 10
    assert found.failed == 0


def test_every_file_that_the_readme_names_is_there():
    linked = re.findall(r"\]\((docs/[^)#]+)\)", README)
    assert len(linked) >= 5
    assert all((ROOT / name).is_file() for name in linked)


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: install\n(\t.*\n)*\t.*forgetlearn demo", makefile, flags=re.MULTILINE)
    assert re.search(r"^test: install\n\t.*pytest", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize(("flags", "kind"), [([], RunConfig), (["--lab"], LabSettings)])
def test_the_settings_in_the_docs_are_the_settings_of_the_program(capsys, flags, kind):
    assert main(["settings", "--markdown", *flags]) == 0
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == len(list(describe(kind))) + 2
    assert f"{table}\n" in (ROOT / "docs/commands.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_docs(capsys):
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    scores = ("facts", "lab", "plan", "update", "compare", "paper", "evaluate", "ask", "report", "demo", "settings")
    for name in (*scores, "subtract", "vector", "apply", "inspect", "log", "undo", "save", "push"):
        assert f"forgetlearn {name}" in page
        assert main([name, "--help"]) == 0
    capsys.readouterr()


def test_the_python_page_documents_the_public_names_and_nothing_deeper():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: forgetlearn\.(\S+)$", page, flags=re.MULTILINE))
    assert documented - {"errors"} == set(forgetlearn.__all__) - {"ForgetLearnError", "METHODS", "__version__"}
    of_commands = re.findall(r"^\| `(\w+)` \|.*", page, flags=re.MULTILINE)
    assert len(of_commands) == 9


def test_public_names_are_there_and_documented():
    for name in forgetlearn.__all__:
        assert hasattr(forgetlearn, name)
        assert name.startswith("__") or name == "METHODS" or getattr(forgetlearn, name).__doc__
    assert not hasattr(forgetlearn, "nothing_of_that_name")


def written(page):
    """Every `forgetlearn ...` of a page, in code blocks and within sentences; a form over several lines is one."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.sub(r"\n {9,}(?=[\[(-])", " ", text).splitlines()
    for line in lines:
        if line.lstrip().startswith("forgetlearn "):
            yield line.strip()
        else:
            yield from re.findall(r"`(forgetlearn [^`]+)`", line)


def complete(page):
    """The commands of a page's code blocks that can be run as they stand."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if re.match(r"( {4})?forgetlearn ", line)]
    return [line for line in found if not FORM.search(re.sub(r'"[^"]*"', '""', line))]


def options_of(command):
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_every_command_of_the_pages_has_the_options_that_the_program_has():
    group = typer.main.get_command(app)
    found = [(page.name, line) for page in [ROOT / "README.md", *PAGES] for line in written(page)]
    assert len(found) > 60
    wrong = []
    for page, line in found:
        words = line.replace("[", " ").replace("]", " ").replace("(", " ").replace(")", " ").split()[1:]
        name = next((word for word in words if not word.startswith("-")), None)
        if name is not None and name not in group.commands and name != "COMMAND":
            wrong.append(f"{page}: {line}: no command {name}")
            continue
        known = options_of(group) | {"--help"} | (options_of(group.commands[name]) if name in group.commands else set())
        flags = {flag.split("=")[0] for flag in words if re.match(r"--[a-z]", flag)}
        wrong += [f"{page}: {line}: no option {flag}" for flag in sorted(flags - known)]
    assert not wrong


def test_every_complete_command_of_the_pages_parses():
    group = typer.main.get_command(app)
    found = [line for page in PAGES for line in complete(page)]
    assert len(found) > 15
    for line in found:
        name, *words = shlex.split(line)[1:]
        try:
            group.commands[name].make_context(name, words)
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")


# What a page takes for granted: commands that are run before its own.
QUICK = "--config base/update.yaml --method ft --set learn.epochs=1"
BEFORE = {
    "history.md": [
        f"update --model base --facts facts.jsonl --limit 12 {QUICK} --output runs/second",
        f"update --model runs/second/model --facts late.jsonl {QUICK} --output runs/third",
    ],
    "choosing.md": [
        "update --model base --facts facts.jsonl --config base/update.yaml --method ft --output runs/tuned"
    ],
    "serving.md": [
        "update --model base --facts facts.jsonl --config base/update.yaml --method f-lora --coef 1 --output runs/first"
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if complete(page) and page != FIRST_STEPS], ids=lambda page: page.name
)
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path, monkeypatch, small_lab, run_in_order):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_lab, "base")
    shutil.copy(small_lab / "facts.jsonl", "facts.jsonl")
    Path("late.jsonl").write_text("".join(Path("facts.jsonl").read_text().splitlines(keepends=True)[-6:]))
    for line in BEFORE.get(page.name, []):
        assert main(line.split()) == 0, line
    if page.name == "choosing.md":
        shutil.copytree("runs/tuned/model", "tuned")
    run_in_order([line.replace("meta-llama/Llama-2-7b-hf", "base") for line in complete(page)], "base", {})


def test_every_page_is_in_the_menu_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    menu = [
        page for section in config["nav"] for pages in section.values() for entry in pages for page in entry.values()
    ]
    assert sorted(menu) == [page.name for page in PAGES], "every page of docs/ stands once under nav in mkdocs.yml"
    assert config["theme"]["font"] is False


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    found = [hit for page in pages for hit in re.findall(fetched, page.read_text(encoding="utf-8"))]
    assert not [hit for hit in found if 'rel="canonical"' not in hit]
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert not re.findall(r"""(?:@import|url\()\s*["']?(?:https?:)?//[^)]*""", styles)


NOTEBOOK = ROOT / "examples" / "demo.ipynb"


def run_notebook(folder, model, monkeypatch):
    """Run the notebook in a folder, on a model; return what it shows."""
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("FORGETLEARN_SMOLLM2", str(model))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=5400, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(str(cell.get("outputs", "")) for cell in notebook.cells)


def test_the_notebook_has_the_facts_of_first_steps_and_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "".join(line for cell in cells if cell["cell_type"] == "code" for line in cell["source"])
    assert all(table in code for table in spreadsheets().values())
    for name in re.findall(r"forgetlearn\.(\w+)", code):
        assert name in forgetlearn.__all__, name


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, small_lab, monkeypatch):
    run_notebook(tmp_path, small_lab, monkeypatch)
    assert (tmp_path / "runs/second/report.html").is_file()


@pytest.mark.real
@pytest.mark.timeout(5400)
def test_the_notebook_on_a_real_model(tmp_path, smollm2, monkeypatch):
    shown = run_notebook(tmp_path, smollm2, monkeypatch)
    assert "gives the new answer to 10 of 10 prompts" in shown
    assert "gives the new answer to 3 of 3 prompts" in shown
    assert (tmp_path / "first-gguf/model.gguf").is_file()


def test_no_line_of_the_changelog_is_longer_than_120():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_no_placeholder_is_left_in_a_page():
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    assert len(pages) > 10
    assert [page.name for page in pages if re.search(r"@@|\{\{|TODO|FIXME", page.read_text(encoding="utf-8"))] == []


def test_the_pages_stay_short():
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in PAGES}
    assert sum(words.values()) + len(README.split()) <= 25_000, words


def test_every_relative_link_outside_the_site_leads_to_a_file():
    pages = [*ROOT.glob("*.md"), *(ROOT / "bench").rglob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 10
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
