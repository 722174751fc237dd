"""What is published: the product's own files, a card without local paths; pushed to a stand-in for the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.errors import ConfigError, RunError
from forgetlearn.products import chain as history
from forgetlearn.products import publish
from forgetlearn.storage import digests, disk
from hub_server import WRITE_TOKEN, serve
from written_by_hand import change_manifest

ADAPTER_FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "forgetlearn.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def made(small_lab, tmp_path_factory):
    """A run folder with an adapter and merged weights, and things that are not to be published beside them."""
    root = tmp_path_factory.mktemp("made")
    lines = (small_lab / "facts.jsonl").read_text().splitlines(keepends=True)
    (root / "secret-facts.jsonl").write_text("".join(lines[:2]))
    config = {"method": "f-lora", "save_merged": True, **QUICK}
    forgetlearn.update(small_lab, root / "secret-facts.jsonl", config, output=root / "run")
    command = ["forgetlearn", "update", "--model", str(small_lab), "--facts", f"{root}/secret-facts.jsonl"]
    command += ["--token=***", "--set", f"model.name={small_lab}", "--output", "runs/mine"]
    change_manifest(root / "run", lambda manifest: manifest.update(command=command))
    for product in ("adapter", "merged"):
        (root / "run" / product / "training_args.bin").write_bytes(b"pickle")
        (root / "run" / product / "notes.json").write_text("{}")
    return root / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_saved_are_the_products_own_files(run, tmp_path, small_lab):
    out = publish.save(run, tmp_path / "out", base_model_id="org/base")
    assert {path.name for path in out.iterdir()} == ADAPTER_FILES
    for path in out.glob("*[!s]"):
        assert str(small_lab) not in path.read_text()
        assert str(run.parent) not in path.read_text()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (256, 256)  # 128 that forget and 128 that learn
    # What vLLM refuses or does not read.
    assert not any(config.get(name) for name in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern"))
    assert config["bias"] == "none"
    (update,) = history.chain_of(out)
    assert update.base == "org/base"
    assert digests.damaged(out, update.files) == []


def test_the_card_tells_what_a_reader_needs(run, tmp_path, small_lab):
    card = (publish.save(run, tmp_path / "out", base_model_id="org/base") / "README.md").read_text()
    assert 'base_model: "org/base"\nbase_model_relation: adapter\n' in card
    assert "license:" not in card
    assert "Base: org/base, whose licence applies. Confirm" in card
    assert "# Updated with forgetlearn: f-lora, coef 0.3" in card
    assert "reliability (token)" in card
    assert "2 facts, of which the base gave the old answer to" in card
    command = "forgetlearn update --model org/base --facts secret-facts.jsonl '--token=***' --set model.name=org/base"
    assert f"{command} --output mine" in card
    assert disk.read_rows(run / "inputs.jsonl")[0]["prompt"] not in card


def test_merged_weights(run, tmp_path):
    out = publish.save(run, tmp_path / "out", base_model_id="org/base", merged=True)
    assert "base_model_relation: finetune" in (out / "README.md").read_text()
    assert (out / "model.safetensors").read_bytes() == (run / "merged/model.safetensors").read_bytes()
    assert not (out / "training_args.bin").exists()
    shutil.rmtree(run / "merged")
    with pytest.raises(RunError, match="--merge"):
        publish.contents(run, base_model_id="org/base", merged=True)


def test_the_id_of_the_base_is_asked_for(run, capsys, tmp_path):
    assert main(["save", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "--base-model-id" in capsys.readouterr().err
    for name in ("/some/where", "./here", "a b", "a/b/c"):
        with pytest.raises(ConfigError, match=f"--base-model-id {name}"):
            publish.contents(run, base_model_id=name)
    with pytest.raises(ConfigError, match="--to single"):
        publish.push(run, "single", base_model_id="org/base")


def test_a_base_from_the_hub_is_named_as_the_user_named_it(run):
    def change(manifest):
        manifest["config"]["model"]["name"] = "org/hub-base"
        manifest["inputs"]["base_sha256"] = "a" * 40

    change_manifest(run, change)
    assert b'base_model: "org/hub-base"' in publish.contents(run)["README.md"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_file_that_was_changed_is_not_published(run, name):
    with (run / "adapter" / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match=name):
        publish.contents(run, base_model_id="org/base")


def test_the_adapter_of_a_taught_base_has_no_base_to_name(run):
    change_manifest(run, lambda manifest: manifest["config"]["teach"].update(epochs=1))
    with pytest.raises(ConfigError, match="taught model"):
        publish.contents(run, base_model_id="org/base")


def test_a_local_path_in_any_text_stops_it(run):
    chain, file = history.read_chain(run / "adapter"), run / "adapter/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from": str(run)}))
    chain[-1].files[file.name] = digests.sha256_of(file)
    (run / "adapter/forgetlearn.json").write_text(history.as_json(chain))
    with pytest.raises(RunError, match=r"tokenizer_config\.json"):
        publish.contents(run, base_model_id="org/base")


def test_a_path_as_it_was_named_or_in_the_metadata_of_weights_stops_it(run):
    """The facts were named with a relative path; the weights' header holds the folder of the run."""
    source = "customers/secret-facts.jsonl"
    change_manifest(run, lambda manifest: manifest["config"]["facts"].update(source=source))
    weights = run / "adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    for name, content in (("tokenizer_config.json", source), (weights.name, str(run))):
        file = run / "adapter" / name
        kept, chain = file.read_bytes(), history.read_chain(run / "adapter")
        if name.endswith("json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "from": content}))
        else:
            save_file(tensors, weights, {"from": content})
        chain[-1].files[name] = digests.sha256_of(file)
        (run / "adapter/forgetlearn.json").write_text(history.as_json(chain))
        with pytest.raises(RunError, match=name):
            publish.contents(run, base_model_id="org/base")
        file.write_bytes(kept)
        chain[-1].files[name] = digests.sha256_of(file)
        (run / "adapter/forgetlearn.json").write_text(history.as_json(chain))
    assert publish.contents(run, base_model_id="org/base")


class Refused(Exception):
    """As the hub's client raises it."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to publish."),
        (Refused(401, "Invalid."), "The hub does not know this token (Invalid). Set HF_TOKEN to one that may write"),
        (Refused(403, "Forbidden"), "The token may not write to it (Forbidden). Take one that may write to me/."),
        (Refused(503, "Busy"), "The hub refused (Busy). Push again later"),
        (TimeoutError("hf_" + "x" * 20), "The hub cannot be reached (***). Check the network"),
    ],
)
def test_what_stopped_a_push_is_said_with_what_to_do(run, monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error

    if error:  # else the tests are offline, and the client says so
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(RunError) as caught:
        publish.push(run, "me/mine", base_model_id="org/base")
    assert str(caught.value).startswith(f"me/mine: not published. {words}")


def push(url: str, home: Path, token: str, *words: object) -> subprocess.CompletedProcess[str]:
    """`forgetlearn push` in a process of its own, whose hub is at `url`."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean = {key: value for key, value in clean.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "forgetlearn", "push", *map(str, words), "--base-model-id", "org/base"]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)


def test_pushed_to_a_hub(run, tmp_path):
    with serve({}) as hub:
        done = push(hub.url, tmp_path, WRITE_TOKEN, run, "--to", "me/mine", "--private", "--revision", "v2")
        assert done.returncode == 0, done.stderr
        assert hub.private == {"me/mine": True}
        assert list(hub.written) == ["me/mine@v2"]
        files = hub.written["me/mine@v2"]
        hub.private["me/open"] = False
        refused = push(hub.url, tmp_path, WRITE_TOKEN, run, "--to", "me/open", "--private")
        unknown = push(hub.url, tmp_path, "hf_" + "x" * 20, run, "--to", "me/mine")
        assert list(hub.written) == ["me/mine@v2"]
    assert files.keys() == ADAPTER_FILES
    assert files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert "me/mine/commit/abc" in done.stdout
    assert (refused.returncode, unknown.returncode) == (2, 2)
    assert "exists and is public" in refused.stderr
    assert "me/mine: not published. The hub does not know this token" in unknown.stderr
    told = "".join(one.stdout + one.stderr for one in (done, refused, unknown))
    assert WRITE_TOKEN not in told
    assert "hf_x" not in told
    assert WRITE_TOKEN.encode() not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
