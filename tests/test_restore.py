"""A product again from its base, and the base from it: the same bits, verified; anything else is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.errors import ConfigError, ModelError, RunError
from forgetlearn.products import chain, restore
from forgetlearn.storage import digests, run_folder
from hub_server import commit, serve
from written_by_hand import a_manifest, a_summary, change_manifest, forget_stages, write_run


@pytest.fixture(scope="module")
def made(small_lab, tmp_path_factory):
    """A folder with a base and two runs from it: `whole` (f-ft, the change kept), `lora` (f-lora, merged too)."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(small_lab, root / "base")
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    forgetlearn.update(root / "base", facts, {"method": "f-ft", "keep_change": True, **QUICK}, output=root / "whole")
    forgetlearn.update(root / "base", facts, {"method": "f-lora", "save_merged": True, **QUICK}, output=root / "lora")
    return root


def named(base, **inputs):
    """For `change_manifest`: the base has another name, and other inputs."""

    def change(manifest):
        manifest["config"]["model"]["name"] = str(base)
        manifest["inputs"] |= inputs

    return change


def run_of(folder, base, inputs):
    config = {"model": {"name": str(base)}}
    return run_folder.RunFolder.open(write_run(folder, a_manifest(config, inputs=inputs), a_summary()))


@pytest.fixture
def moved(made, tmp_path) -> Path:
    """The same on another machine: the base is not where it was."""
    root = Path(shutil.copytree(made, tmp_path / "there"))
    for name in ("whole", "lora"):
        change_manifest(root / name, named(tmp_path / "gone/base"))
    return root


def test_an_adapter_of_a_run_that_taught_belongs_on_the_taught_model(made, tmp_path):
    run = Path(shutil.copytree(made / "lora", tmp_path / "run"))
    change_manifest(run, lambda manifest: manifest["config"]["teach"].update(epochs=1))
    with pytest.raises(RunError, match="taught/"):
        restore.apply_run(run, made / "base", tmp_path / "out")
    shutil.copytree(made / "whole/model", run / "taught")
    with pytest.raises(ModelError, match=r"--base .*taught"):
        restore.apply_run(run, made / "base", tmp_path / "out")
    assert "copied" in restore.apply_run(run, run / "taught", tmp_path / "out")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def changed(path: Path) -> None:
    """Flip one bit of the last weight."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


class TestApply:
    def test_a_model_from_its_base_and_the_change(self, moved, tmp_path, capsys):
        expected = files_of(moved / "whole/model")
        shutil.rmtree(moved / "whole/model")
        words = ["apply", moved / "whole", "--base", moved / "base", "--output", tmp_path / "again"]
        assert main([str(word) for word in words]) == 0
        assert "verified by hash" in capsys.readouterr().out
        assert files_of(tmp_path / "again") == expected

    def test_a_model_without_a_change_is_copied(self, moved, tmp_path):
        shutil.rmtree(moved / "whole/change")
        assert "copied" in restore.apply_run(moved / "whole", moved / "base", tmp_path / "again")
        assert files_of(tmp_path / "again") == files_of(moved / "whole/model")
        shutil.rmtree(moved / "whole/model")
        with pytest.raises(RunError, match="model/"):
            restore.apply_run(moved / "whole", moved / "base", tmp_path / "more")

    def test_an_adapter_names_the_base_that_is_given(self, moved, tmp_path):
        restore.apply_run(moved / "lora", moved / "base", tmp_path / "again")
        assert json.loads((tmp_path / "again/adapter_config.json").read_text())["base_model_name_or_path"] == str(
            moved / "base"
        )
        own = files_of(moved / "lora/adapter")
        assert files_of(tmp_path / "again")["adapter_model.safetensors"] == own["adapter_model.safetensors"]
        assert len(chain.read_chain(tmp_path / "again")) == 1

    def test_case_34_a_merge_says_what_survives(self, moved, tmp_path, capsys):
        command = ["apply", moved / "lora", "--base", moved / "base", "--output", tmp_path / "again", "--merge"]
        assert main([*map(str, command), "--dtype", "bfloat16"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"\d+ of \d+ tensors moved", said)
        assert "of the wanted change survives" in said

    def test_an_adapter_merged(self, moved, tmp_path):
        restore.apply_run(moved / "lora", moved / "base", tmp_path / "again", merge=True)
        found, expected = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / "again", moved / "lora/merged")
        )
        base = load_file(moved / "base/model.safetensors")
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        assert any(not torch.equal(found[name], base[name]) for name in found)
        restore.apply_run(moved / "lora", moved / "base", tmp_path / "adapter")
        ids = torch.arange(3, 40)[None]
        alone, merged = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("adapter", "again")
        )
        torch.testing.assert_close(alone, merged, rtol=0, atol=1e-5)
        (update,) = chain.read_chain(tmp_path / "again")
        assert update.product == "merged"
        assert digests.damaged(tmp_path / "again", update.files) == []

    @pytest.mark.parametrize("name", ["whole", "lora"])
    def test_another_base_is_refused(self, moved, tmp_path, name):
        changed(moved / "base/model.safetensors")
        with pytest.raises(ModelError, match="base"):
            restore.apply_run(moved / name, moved / "base", tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_a_damaged_change_gives_nothing(self, moved, tmp_path):
        changed(moved / "whole/change/change.safetensors")
        with pytest.raises(RunError, match=r"change\.safetensors"):
            restore.apply_run(moved / "whole", moved / "base", tmp_path / "again")
        assert [path.name for path in tmp_path.iterdir()] == ["there"]

    def test_what_does_not_fit_a_run(self, moved, tmp_path, capsys):
        with pytest.raises(ConfigError, match="--merge"):
            restore.apply_run(moved / "whole", moved / "base", tmp_path / "again", merge=True)
        words = ["apply", moved / "whole", "--base", moved / "base", "--output", tmp_path / "o", "--factor", "2"]
        assert main([str(word) for word in words]) == 2
        assert "--factor" in capsys.readouterr().err
        (moved / "half").mkdir()
        shutil.copy(moved / "whole/manifest.json", moved / "half")
        change_manifest(moved / "half", forget_stages())
        with pytest.raises(RunError, match="not finished"):
            restore.apply_run(moved / "half", moved / "base", tmp_path / "again")


class TestUndo:
    @pytest.mark.parametrize("name", ["whole", "lora"])
    def test_the_base_is_where_it_was(self, made, tmp_path, name, capsys):
        assert main(["undo", str(made / name)]) == 0
        assert "is the base, as it was" in capsys.readouterr().out
        restore.undo_run(made / name, tmp_path / "base")
        assert digests.sha256_of(tmp_path / "base") == digests.sha256_of(made / "base")

    def test_the_output_may_not_lie_in_the_base_or_the_run(self, made):
        for inside in ("base", "lora"):
            with pytest.raises(ConfigError, match="The output"):
                restore.undo_run(made / "lora", made / inside / "again")

    def test_the_base_from_the_product(self, moved, tmp_path):
        wanted = digests.sha256_of(moved / "base")
        shutil.rmtree(moved / "base")
        with pytest.raises(RunError, match="--output"):
            restore.undo_run(moved / "whole")
        assert "verified by hash" in restore.undo_run(moved / "whole", tmp_path / "back")
        assert digests.sha256_of(tmp_path / "back") == wanted

    def test_from_a_changed_product_nothing(self, moved, tmp_path):
        changed(moved / "whole/model/model.safetensors")
        with pytest.raises(ModelError, match="not the product"):
            restore.undo_run(moved / "whole", tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_why_not(self, moved):
        shutil.rmtree(moved / "whole/change")
        with pytest.raises(RunError, match="keep_change"):
            restore.undo_run(moved / "whole")
        with pytest.raises(RunError, match="adapter"):
            restore.undo_run(moved / "lora")

    def test_a_base_that_was_changed_since(self, made, tmp_path):
        root = Path(shutil.copytree(made, tmp_path / "there"))
        change_manifest(root / "lora", named(root / "base"))
        changed(root / "base/model.safetensors")
        with pytest.raises(RunError, match=r"base .*hash"):
            restore.undo_run(root / "lora")


COMMANDS = """
import json, sys
from forgetlearn.cli.main import main
for words in json.loads(sys.argv[1]):
    print("code", main(words), flush=True)
assert "torch" not in sys.modules
"""


def test_a_base_and_a_product_on_the_hub(made, tmp_path):
    """By id: the base at the commit that the run recorded, for apply, undo and subtract; a product's log."""
    root = Path(shutil.copytree(made, tmp_path / "there"))
    branch = "org/base@main"
    for name in ("whole", "lora"):
        change_manifest(root / name, named("org/base", base_sha256=commit(branch)))
    base, lora = ["--base", "org/base"], str(root / "lora")
    commands = [
        ["undo", lora],
        ["apply", lora, *base, "--output", str(tmp_path / "adapter")],
        ["apply", str(root / "whole"), *base, "--output", str(tmp_path / "product")],
        ["undo", lora, "--output", str(tmp_path / "back")],
        ["subtract", *base, "--adapter", f"{lora}/adapter", "--coef", "0", "--output", str(tmp_path / "zero")],
        ["log", "me/mine"],
        ["log", "org/base"],
        ["vector", *base, "--revision", "v2", "--tuned", str(made / "base"), "--output", str(tmp_path / "vector")],
        ["apply", lora, "--base", "org/none", "--output", str(tmp_path / "none")],
        ["inspect", f"{lora}/adapter", *base, "--revision", "v9"],
        ["inspect", f"{lora}/adapter", "--revision", "v2"],
        ["apply", lora, *base, "--revision", "v2", "--output", str(tmp_path / "none")],
        ["subtract", "--base", lora, "--revision", "v2", "--coef", "0", "--output", str(tmp_path / "none")],
    ]
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean = {key: value for key, value in clean.items() if not key.startswith(("HF_", "HUGGING"))}
    repos = {branch: made / "base", "org/base@v2": made / "whole/model", "me/mine": made / "lora/adapter"}
    with serve(repos) as hub:
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
        asked = {path for _method, path in hub.requests}
    assert done.returncode == 0, done.stderr
    assert re.findall(r"code (\d)", done.stdout) == ["0"] * 8 + ["2"] * 5, done.stdout + done.stderr
    assert f"org/base on the hub, commit {commit(branch)}, is the base" in done.stdout
    assert f"/org/base/resolve/{commit(branch)}/model.safetensors" in asked
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert digests.sha256_of(tmp_path / "back") == digests.sha256_of(made / "base")
    assert files_of(tmp_path / "product").keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    weights = "model.safetensors"
    assert (tmp_path / "zero" / weights).read_bytes() == (made / "base" / weights).read_bytes()
    assert "f-lora, coef 0.3" in done.stdout
    assert "org/base: no update of forgetlearn is recorded" in done.stdout
    assert "org/none: is neither a folder nor a model on the hub that can be read" in done.stderr
    assert f"/org/base/resolve/{commit('org/base@v2')}/model.safetensors" in asked
    assert "org/base: has no such revision on the hub" in done.stderr
    assert "--revision v2" in done.stderr
    assert done.stderr.count("--revision") >= 3


def test_shards_dtypes_and_names_that_differ(tmp_path):
    """What has no partner of its dtype and shape is kept whole; both ways give the same files."""
    base, product = tmp_path / "base", tmp_path / "product"
    base.mkdir()
    product.mkdir()
    one, two = torch.arange(6.0).reshape(2, 3).bfloat16(), torch.arange(5, dtype=torch.int64)
    save_file({"a": one, "tied": one.clone()}, base / "model-1.safetensors", {"format": "pt"})
    save_file({"b": one.float(), "n": two}, base / "model-2.safetensors")
    index = {"a": "model-1.safetensors", "tied": "model-1.safetensors"}
    index |= {"b": "model-2.safetensors", "n": "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file({"b": one + 1, "a": one * 1.5, "n": two, "new": two + 1}, product / "model.safetensors")
    for folder in (base, product):
        (folder / "config.json").write_text(json.dumps({"name": folder.name}))
    inputs = {"base_sha256": digests.sha256_of(base)}
    run = run_of(tmp_path / "run", base, inputs)
    kept = tmp_path / "run/change"
    kept.mkdir(parents=True)
    restore.keep_change(run, product, kept)
    assert load_file(kept / "change.safetensors").keys() == {"xor:a", "xor:n", "base:tied", "base:b"} | {
        "product:b",
        "product:new",
    }
    restore._rebuild(kept, "base", product, tmp_path / "base2")
    restore._rebuild(kept, "product", base, tmp_path / "product2")
    assert files_of(tmp_path / "base2") == files_of(base)
    assert files_of(tmp_path / "product2") == files_of(product)


def test_a_change_is_kept_only_from_the_base_of_the_run(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "base/model.safetensors")
    run = run_of(tmp_path / "run", tmp_path / "base", {"base_sha256": "another"})
    with pytest.raises(RunError, match="base"):
        restore.keep_change(run, tmp_path / "base", tmp_path)
    with pytest.raises(ConfigError, match=r"keep_change .*LlamaForCausalLM"):
        restore.check_keeping(chain.Base("LlamaForCausalLM", None, "another"))


def test_a_damaged_file_of_the_kept_change_is_not_copied(made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "there"))
    told = root / "whole/change/product/forgetlearn.json"
    told.write_bytes(told.read_bytes()[:100])
    with pytest.raises(RunError, match=r"change/product/forgetlearn\.json"):
        restore.apply_run(root / "whole", root / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
