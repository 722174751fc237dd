"""What docs/security.md promises, line by line; the lines that other files test name their tests there."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import stat
import struct
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import licences
import test_models
from forgetlearn.cli.main import main
from forgetlearn.config import safe_yaml
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, ModelError, RunError, plain, without_secrets
from forgetlearn.models.encoding import Encoder
from forgetlearn.report import render
from forgetlearn.report.run_page import write_run
from forgetlearn.storage import disk, provenance, run_folder
from forgetlearn.weights.folder_arithmetic import save_vector, subtract_folders
from test_cli import FEW, NASTY, PLAIN
from test_models import load
from test_page import make_run
from written_by_hand import an_update, change_manifest, write_chain

ROOT = Path(__file__).parents[1]
HUB_TOKEN, WANDB_KEY = "hf_" + "aB3x" * 9, "0123456789abcdef" * 2
saved, damaged = test_models.saved, test_models.damaged  # fixtures

# Model folders -----------------------------------------------------------------------------------


def test_code_of_a_tokenizer_is_not_run(damaged):
    file = damaged / "tokenizer_config.json"
    told = json.loads(file.read_text()) | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(told))
    (damaged / "own.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="needs Python code from its repository"):
        load(damaged)


def forge_header(file: Path, header: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


@pytest.mark.parametrize("length", [2**63, 10**11])
def test_a_header_that_claims_to_be_huge(damaged, length):
    forge_header(damaged / "model.safetensors", b"{}", length)
    with pytest.raises(ModelError, match=r"model\.safetensors: .*header too large"):
        load(damaged)


@pytest.mark.parametrize("shape", [[2**40], [2**40, 2**40], [-1], [2**63, 4]])
def test_tensors_that_claim_to_be_huge(damaged, shape):
    told = {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    forge_header(damaged / "model.safetensors", json.dumps(told).encode() + b"    ")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(damaged)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_reads_no_file_outside_its_folder(damaged, place):
    weights = damaged / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(damaged.parent / "outside.safetensors")
    (damaged / "other.safetensors").write_bytes(b"")
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    with pytest.raises(ModelError, match="missing"):
        load(damaged)


@pytest.fixture
def moved(damaged, tmp_path):
    """A copy of the model with other numbers."""
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    weights = {name: tensor + 0.5 for name, tensor in load_file(damaged / "model.safetensors").items()}
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    return tuned


def test_a_link_out_of_a_model_is_not_copied(damaged, moved, tmp_path):
    (tmp_path / "id_rsa").write_text("private")
    (damaged / "LICENSE.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(RunError, match=r"LICENSE\.txt is a link"):
        subtract_folders(damaged, tmp_path / "out", 1.0, tuned=moved)
    assert not (tmp_path / "out").exists()
    (damaged / "LICENSE.txt").unlink()
    (damaged / "terms").write_text("free")
    (damaged / "LICENSE").symlink_to("terms")
    subtract_folders(damaged, tmp_path / "out", 1.0, tuned=moved)
    assert (tmp_path / "out/LICENSE").read_text() == "free"


def test_links_of_the_hubs_cache_are_copied(damaged, moved, tmp_path):
    snapshot, blobs = tmp_path / "hub/models--a--b/snapshots/1234", tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(damaged.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    subtract_folders(snapshot, tmp_path / "out", 1.0, tuned=moved)
    assert not (tmp_path / "out/config.json").is_symlink()


@pytest.mark.parametrize(
    "change", [{"peft_type": "NONE"}, {"peft_type": "LORA", "r": "x"}, {"peft_type": "LORA", "r": -1}, {"base": "x"}]
)
def test_an_adapters_config_of_a_stranger(saved, tmp_path, change):
    told = {"base_model_name_or_path": str(saved), "target_modules": ["q_proj"], **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        load(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for n in range(10 ** 9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(new_char_tokenizer, template):
    with pytest.raises(ModelError, match="chat template fails"):
        Encoder(new_char_tokenizer(chat_template=template))


# Texts from outside ------------------------------------------------------------------------------


def test_names_in_a_run_folder_are_text_on_its_pages(tmp_path):
    make_run(tmp_path / "run", 3, nasty=False)

    def change(manifest):
        manifest["config"]["model"]["name"] = manifest["config"]["facts"]["source"] = manifest["machine"] = NASTY
        manifest["command"] = ["forgetlearn", NASTY]

    change_manifest(tmp_path / "run", change)
    for name in ("inputs.jsonl", "facts.jsonl"):
        rows = disk.read_rows(tmp_path / "run" / name)
        key = "id" if name == "inputs.jsonl" else "fact"
        disk.write_rows(tmp_path / "run" / name, [{**row, key: NASTY + row[key]} for row in rows])
    run_folder.RunFolder.open(tmp_path / "run").finish()  # with the hashes of what is there now
    write_run(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for file in ("report.html", "report.md"):
        assert not {"\x1b", "\x07", "\u202e"} & {*(tmp_path / "run" / file).read_text(encoding="utf-8")}


@pytest.mark.parametrize("text", [NASTY, "\x9b31m", "a\r\nb", "\ud800", "\u2066", "\x00", "caf\u00e9 \u0645\u0631"])
def test_escaping_leaves_only_what_prints(text):
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)
    assert (plain(text) == text) == text.isprintable()


def test_nothing_in_the_log_steers_the_terminal(capsys):
    assert main(["settings"]) == 0  # which sets up the log
    capsys.readouterr()
    handler = logging.getLogger().handlers[0]
    shown = handler.format(logging.makeLogRecord({"msg": "%s: loaded with %s", "args": (NASTY, HUB_TOKEN)}))
    assert shown == f"{PLAIN}: loaded with ***"


def test_nothing_in_a_models_history_steers_the_terminal(tmp_path, capsys):
    name = NASTY.replace("/", "")
    told = {
        "when": NASTY,
        "method": NASTY,
        "base": NASTY,
        "base_sha256": NASTY,
        "product": name,
        "files": {name: NASTY},
    }
    write_chain(tmp_path, an_update(facts={"source": NASTY, "sha256": NASTY}, **told))
    for flags in ([], ["--json"]):
        assert main(["log", str(tmp_path), *flags]) == 0
        out = capsys.readouterr()
        assert "alert" in out.out
        assert all(line.isprintable() for line in (out.out + out.err).split("\n"))


def test_a_terminal_that_knows_few_letters(tmp_path, monkeypatch):
    import io
    import sys

    (tmp_path / "f.jsonl").write_text('{"prompt": "caf\u00e9 \u65e5?", "target_new": "n"}', encoding="utf-8")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["facts", str(tmp_path / "f.jsonl")]) == 0
    stream.flush()
    assert b"caf\\xe9 \\u65e5?" in stream.buffer.getvalue()


def test_only_one_function_prints():
    """So that nothing is printed without its escapes."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "src/forgetlearn").rglob("*.py")}
    assert {name for name, text in sources.items() if re.search(r"typer\.echo\(|\bprint\(|\.stdout\.write", text)} == {
        "terminal.py"
    }
    assert sources["terminal.py"].count("typer.echo(") == 1


def test_yaml_makes_plain_values_only(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config(file)
    assert not (tmp_path / "ran").exists()
    assert safe_yaml.load("a: &x {b: 1}\nc: {<<: *x, b: 2}") == {"a": {"b": 1}, "c": {"b": 2}}


# Secrets and files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {HUB_TOKEN}.", "token ***."),
        ("https://me:pass@host/x?token=abc&n=1", "https://***@host/x?token=***&n=1"),
        ("--set WANDB_API_KEY=abc", "--set WANDB_API_KEY=***"),
        ("evaluate.general_tokens=512 evaluate.max_new_tokens=8", None),
        (f"of the environment: {WANDB_KEY}", "of the environment: ***"),
        ("hf_models/llama https://host:80/x", None),
    ],
)
def test_secrets_are_masked(monkeypatch, text, shown):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    assert without_secrets(text) == (shown or text)


@pytest.mark.parametrize("value", [HUB_TOKEN, f"https://me:{WANDB_KEY}@host/model"])
def test_a_token_is_no_setting(value, capsys):
    with pytest.raises(ConfigError, match=r"model\.name holds what looks like a token") as caught:
        load_config(None, {"model.name": value})
    assert value not in str(caught.value)
    assert main(["update", "--output", "out", "--set", f"seed={value}", "--model", "x"]) == 2
    assert value not in capsys.readouterr().err


# Case 32
@pytest.mark.parametrize(
    "name",
    ["MYTOKEN", "GITHUB_PAT", "PGPASSWORD", "DB_PASS", "SMTPPASS", "MYSQL_PWD", "AWS_SECRET_ACCESS_KEY", "X_AUTH"],
)
@pytest.mark.parametrize("value", ["swordfish", "hunter2", "Zx9+/a=b.c", "/8ecret+key/of64"])
def test_case_32_a_secret_of_the_environment_is_masked_whatever_its_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert without_secrets(f"cannot log in with {value}: refused") == "cannot log in with ***: refused"
    assert value not in provenance.masked(["forgetlearn", f"--x={value}"])[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false1"),
        ("PATH", "models/llama2"),
        ("KEYBOARD", "us-intl"),
        ("XAUTHORITY", "models/llama2"),
        ("MY_KEY", "true"),
        ("USE_AUTH", "disabled"),
        ("PASSWORD_FILE", "/run/secrets/a.txt"),
        ("MAX_TOKEN", "4096"),
        ("PASS", "update"),
    ],
)
def test_case_32_what_is_no_secret_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert without_secrets(f"model {value}: not found") == f"model {value}: not found"


@pytest.mark.parametrize(
    "token",
    [
        f"ghp_{'a1' * 18}",
        f"github_pat_{'a1' * 11}_{'b2' * 20}",
        f"sk-{'a1' * 24}",
        f"sk-ant-api03-{'a1' * 20}",
        "xoxb-123456789012-abcdefghij",
        "AKIAIOSFODNN7EXAMPLE",
        f"glpat-{'a1' * 10}",
        f"eyJ{'a1' * 10}.eyJ{'b2' * 10}.{'c3' * 10}",
    ],
)
def test_case_32_tokens_are_known_by_their_shape(token):
    assert without_secrets(f"could not read {token}, sorry") == "could not read ***, sorry"
    assert without_secrets(f"Authorization: Bearer {token}") in ("Authorization: Bearer ***", "Authorization: ***")
    assert without_secrets("Bearer abcdefgh1234, task-oriented-dialogue-systems, the bearer of this") == (
        "Bearer *** task-oriented-dialogue-systems, the bearer of this"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ask @everyone now", "ask `@everyone` now"),
        ("see https://evil.example/a_b?c=*d*", "see `https://evil.example/a_b?c=*d*`"),
        ("www.evil.example, me@evil.example", "`www.evil.example,` `me@evil.example`"),
        (":smile: at 10:20:30, rank #1", "`:smile:` at 10:20:30, rank `#1`"),
        ("a`@x`|b_c", "a\\``@x`\\`\\|b\\_c"),
    ],
)
def test_case_32_nothing_from_facts_is_a_link_a_mention_or_an_emoji_in_markdown(text, shown):
    assert render._cell(text) == shown


@pytest.fixture(scope="module")
def private_run(small_lab, tmp_path_factory):
    """A run made under umask 077 with tokens in the environment, and what was printed."""
    output = tmp_path_factory.mktemp("private") / "run"
    config = ["--config", str(small_lab / "update.yaml"), "--set", "keep_stages=true", "--method", "f-lora"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", HUB_TOKEN)
        patch.setenv("WANDB_API_KEY", WANDB_KEY)
        mask = os.umask(0o077)
        try:
            base = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl")]
            assert main(["update", *base, *config, *FEW, "--output", str(output)]) == 0
        finally:
            os.umask(mask)
    return output


def test_no_token_of_the_environment_is_written(private_run):
    files = [path for path in private_run.rglob("*") if path.is_file()]
    assert len(files) > 15
    for secret in (HUB_TOKEN, WANDB_KEY):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_files_are_only_for_those_whom_the_umask_lets(private_run):
    paths = [private_run, *private_run.rglob("*")]
    assert not [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]


# Case 29
def test_case_29_threads_that_write_leave_the_umask_alone(tmp_path):
    mask = os.umask(0o077)
    try:
        ends = time.monotonic() + 1
        wrong: list[Path] = []

        def write(number: int) -> None:
            while time.monotonic() < ends:
                disk.write_text(tmp_path / f"mine-{number}", "secret")

        def look() -> None:
            for number in itertools.count():
                if time.monotonic() > ends:
                    return
                file = tmp_path / f"other-{number}"
                file.touch()
                if stat.S_IMODE(file.stat().st_mode) & 0o077:
                    wrong.append(file)
                file.unlink()

        threads = [threading.Thread(target=write, args=(n,)) for n in range(3)] + [threading.Thread(target=look)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        with disk.atomic_folder(tmp_path / "folder"):
            pass
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600, 0o700}
        assert not re.search(r"\bumask\(", Path(disk.__file__).read_text())
    finally:
        os.umask(mask)


def test_the_files_of_arithmetic_too(damaged, moved, tmp_path):
    mask = os.umask(0o027)
    try:
        save_vector(damaged, moved, tmp_path / "vector")
    finally:
        os.umask(mask)
    paths = [tmp_path / "vector", *(tmp_path / "vector").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) & ~0o100 for path in paths} <= {0o640, 0o650}


def test_every_package_states_a_licence():
    rows = licences.packages()
    assert len(rows) > 40
    assert not licences.refused(rows)
    assert licences.refused([("a", "1", "GPLv3"), ("b", "1", ""), ("c", "1", "LGPL-2.1"), ("d", "1", "MIT")]) == [
        "a",
        "b",
    ]


# The page ----------------------------------------------------------------------------------------


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), f"{file}.py::{test}"
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert own - {test for _file, test in named} == {"test_every_test_that_the_page_names_is_there"}
