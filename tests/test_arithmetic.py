import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forgetlearn.errors import ConfigError, ModelError, RunError, WeightMismatchError
from forgetlearn.weights import folder_arithmetic, streaming
from forgetlearn.weights.folder_arithmetic import apply_vector, save_vector, subtract_folders
from forgetlearn.weights.streaming import Numbers
from forgetlearn.weights.task_vector import TaskVector, subtract

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def write(folder, tensors, shards=1, config=None, order=1):
    """A checkpoint of plain tensors, in so many shards, the names in their order or backwards."""
    folder.mkdir(parents=True)
    names = list(tensors)[::order]
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
    else:
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **(config or {})}))
    return folder


def read(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pair(dtype=torch.bfloat16, n=3, seed=0, size=0.02):
    torch.manual_seed(seed)
    base = {f"layer.{i}.weight": (0.02 * torch.randn(5 + i, 7)).to(dtype) for i in range(n)}
    return base, {name: (w.double() + size * torch.randn(w.shape)).to(dtype) for name, w in base.items()}


def equal_bits(one, two):
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 8 numbers, so that small tensors are cut in the middle."""
    monkeypatch.setattr(streaming, "PIECE", 8)


def test_forgetting_by_hand(tmp_path):
    write(tmp_path / "b", {"w": torch.tensor([1.0, -2.0]), "steps": torch.tensor([3])})
    write(tmp_path / "t", {"w": torch.tensor([1.5, -2.5]), "steps": torch.tensor([9])})
    written = subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, tuned=tmp_path / "t")
    got = read(tmp_path / "o")
    assert torch.allclose(got["w"], torch.tensor([0.85, -1.85]))
    assert got["steps"].tolist() == [3]
    assert (written.moved, written.tensors) == (1, 2)
    assert written.survival.share_changed == 1
    assert written.survival.share_survived == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_streamed_is_in_memory_to_the_bit(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("property")
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4))
    kind, other = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    base = {f"w{i}": torch.randn(shape).to(kind) for i, shape in enumerate(shapes)}
    tuned = {name: (w.double() + 0.1 * torch.randn(w.shape)).to(other) for name, w in base.items()}
    base["count"], tuned["count"] = torch.tensor([1, 2]), torch.tensor([3, 4])
    write(root / "b", base, draw(st.integers(1, 3)))
    write(root / "t", tuned, draw(st.integers(1, 3)), order=draw(st.sampled_from([1, -1])))
    coef = draw(st.floats(0, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "PIECE", draw(st.sampled_from([1, 8, 1 << 17])))
        subtract_folders(root / "b", root / "o", coef, tuned=root / "t")
    assert equal_bits(read(root / "o"), subtract(base, tuned, coef))


def test_coef_zero_gives_the_same_files(tmp_path, tiny_model, char_tokenizer):
    for seed, name in enumerate("bt"):
        tiny_model(seed=seed).save_pretrained(tmp_path / name, max_shard_size="20KB")
    char_tokenizer.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "b" / "README.md").write_text("the base's card")
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"pickle")
    subtract_folders(tmp_path / "b", tmp_path / "o", 0, tuned=tmp_path / "t")
    ours = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert set(theirs) - set(ours) == {"README.md", "pytorch_model.bin"}
    assert set(ours) - set(theirs) == {"arithmetic.json"}
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert len(weights) > 2
    for name in [*weights, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]:
        assert ours[name] == theirs[name]
    assert json.loads(ours["model.safetensors.index.json"])["weight_map"]


def test_the_output_loads_and_is_the_forgotten_model(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM

    base, tuned = (tiny_model(seed=seed).to(torch.bfloat16) for seed in (0, 1))
    base.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    tuned.save_pretrained(tmp_path / "t")
    subtract_folders(tmp_path / "b", tmp_path / "wide", 0.5, tuned=tmp_path / "t", numbers=Numbers("float32"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert loaded.dtype == torch.float32
    wide = {name: weight.float() for name, weight in base.state_dict().items()}
    assert equal_bits(dict(loaded.state_dict()), subtract(wide, tuned.state_dict(), 0.5))
    sizes = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert sizes == 4 * sum(weight.numel() for weight in base.parameters())
    assert (tmp_path / "wide" / "config.json").read_text().count("float32") == 1


def test_subtract_then_add_returns_within_one_rounding(tmp_path):
    base, tuned = pair(n=2)
    write(tmp_path / "b", base), write(tmp_path / "t", tuned, 2)
    save_vector(tmp_path / "b", tmp_path / "t", tmp_path / "v")
    by_vector = subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, vector=tmp_path / "v").output
    assert equal_bits(read(by_vector), subtract(base, tuned, 0.3))
    with safe_open(tmp_path / "v" / "vector.safetensors", "pt") as file:
        assert file.metadata()["forgetlearn"] == "task vector"
        assert len(file.metadata()["base_sha256"]) == 64
    assert equal_bits(read(tmp_path / "v"), dict(TaskVector.between(base, tuned).deltas))
    back = read(apply_vector(tmp_path / "v", by_vector, tmp_path / "back", 0.3).output)
    forgotten = read(by_vector)
    for name, weight in base.items():
        most = torch.maximum(weight.abs(), forgotten[name].abs()).float()
        assert bool(((back[name].float() - weight.float()).abs() <= torch.finfo(torch.bfloat16).eps * most).all())


@pytest.mark.parametrize("stored_by", ["base", "tuned"])
def test_a_tied_head_that_one_side_stores(tmp_path, stored_by, small_pieces):
    base, tuned = pair()
    for weights, side in ((base, "base"), (tuned, "tuned")):
        if side == stored_by:
            weights["lm_head.weight"] = weights["layer.0.weight"].clone()
    write(tmp_path / "b", base, 2), write(tmp_path / "t", tuned)
    subtract_folders(tmp_path / "b", tmp_path / "o", 0.5, tuned=tmp_path / "t")
    got = read(tmp_path / "o")
    assert got.keys() == base.keys()
    tuned.setdefault("lm_head.weight", tuned["layer.0.weight"])
    assert equal_bits(got, subtract(base, {name: tuned[name] for name in base}, 0.5))


def test_a_head_of_its_own_is_not_taken_for_a_tied_one(tmp_path):
    base, tuned = pair()
    tuned["lm_head.weight"] = tuned["layer.0.weight"] + 1
    write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    with pytest.raises(WeightMismatchError, match=r"only in tuned: lm_head\.weight"):
        subtract_folders(tmp_path / "b", tmp_path / "o", 0.5, tuned=tmp_path / "t")
    tuned["lm_head.weight"] = tuned["layer.0.weight"].clone()
    write(tmp_path / "t2", tuned, config={"tie_word_embeddings": False})
    with pytest.raises(WeightMismatchError, match=r"only in tuned: lm_head\.weight"):
        subtract_folders(tmp_path / "b", tmp_path / "o", 0.5, tuned=tmp_path / "t2")
    assert not (tmp_path / "o").exists()


def test_an_infinite_mask_stays_and_what_is_no_number_is_refused(tmp_path):
    mask = torch.tensor([0.0, float("-inf")])
    base, tuned = {"w": torch.ones(2), "mask": mask}, {"w": torch.zeros(2), "mask": mask}
    write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    subtract_folders(tmp_path / "b", tmp_path / "o", 0.5, tuned=tmp_path / "t")
    assert equal_bits(read(tmp_path / "o"), subtract(base, tuned, 0.5))
    assert read(tmp_path / "o")["mask"].tolist() == mask.tolist()
    write(tmp_path / "n", {"w": torch.tensor([1.0, float("nan")]), "mask": mask})
    with pytest.raises(ModelError, match="w holds NaN"):
        subtract_folders(tmp_path / "b", tmp_path / "o2", 0.5, tuned=tmp_path / "n")
    write(tmp_path / "h", {"w": torch.full((2,), 60000.0).half()}), write(tmp_path / "h2", {"w": torch.zeros(2).half()})
    with pytest.raises(ModelError, match="float16"):
        subtract_folders(tmp_path / "h", tmp_path / "o2", 1, tuned=tmp_path / "h2")
    assert not [path for path in tmp_path.iterdir() if "o2" in path.name]


def test_rounding_eats_a_small_change_and_says_so(tmp_path):
    torch.manual_seed(0)
    base = {"w": (0.02 * torch.randn(300, 300)).bfloat16()}
    tuned = {"w": base["w"].float() + 1e-4 * torch.randn(300, 300)}
    write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    near = subtract_folders(tmp_path / "b", tmp_path / "near", 0.1, tuned=tmp_path / "t")
    # The table in docs/arithmetic.md.
    assert near.survival.share_changed == pytest.approx(0.12, abs=0.01)
    assert near.survival.share_survived == pytest.approx(0.28, abs=0.02)
    assert "float32" in near.warning()
    assert "stochastic" in near.warning()
    wanted = -0.1 * (tuned["w"] - base["w"].float())
    for seed in (1, 1, 2):
        numbers = Numbers(rounding="stochastic", seed=seed, threads=seed)
        random = subtract_folders(
            tmp_path / "b", tmp_path / f"r{seed}", 0.1, tuned=tmp_path / "t", numbers=numbers, overwrite=True
        )
        assert random.survival.share_survived == pytest.approx(1, abs=0.06)
        assert random.warning() is None
        done = read(random.output)["w"].float() - base["w"].float()
        assert float((done * wanted).sum() / (wanted * wanted).sum()) == pytest.approx(
            random.survival.share_survived, abs=1e-3
        )
    again = subtract_folders(
        tmp_path / "b", tmp_path / "again", 0.1, tuned=tmp_path / "t", numbers=Numbers(rounding="stochastic", seed=1)
    )
    assert equal_bits(read(again.output), read(tmp_path / "r1"))
    assert not equal_bits(read(again.output), read(tmp_path / "r2"))
    kept = subtract_folders(tmp_path / "b", tmp_path / "f", 0.1, tuned=tmp_path / "t", numbers=Numbers("float32"))
    assert kept.warning() is None


def test_pieces_draw_numbers_of_their_own(tmp_path, small_pieces):
    """Equal rows in pieces of their own are rounded differently, and the same however many threads there are."""
    write(tmp_path / "b", {"w": torch.ones(64, 8).bfloat16()})
    write(tmp_path / "t", {"w": torch.full((64, 8), 1.002)})
    for threads in (1, 3):
        numbers = Numbers(rounding="stochastic", threads=threads)
        subtract_folders(tmp_path / "b", tmp_path / f"o{threads}", 1, tuned=tmp_path / "t", numbers=numbers)
    got = read(tmp_path / "o1")["w"]
    assert len({tuple(row) for row in got.tolist()}) > 32
    assert torch.equal(got, read(tmp_path / "o3")["w"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A process that subtracts a tensor of 50 MB (100 in float32) holds no more than Python and numpy need."""
    big = torch.zeros(25_000, 1000).bfloat16()
    big[0, 0] = 1
    write(tmp_path / "b", {"w": big}), write(tmp_path / "t", {"w": big + 1})
    code = (
        "import sys; from pathlib import Path; from forgetlearn.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); print(Path('/proc/self/status').read_text());"
        "sys.exit(code)"
    )
    command = ["subtract", "--base", tmp_path / "b", "--tuned", tmp_path / "t", "--output", tmp_path / "o"]
    command = [sys.executable, "-c", code, *command, "--coef", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 90_000  # kB
    assert read(tmp_path / "o")["w"][1, 1].item() == torch.tensor(-0.3).bfloat16().item()


@pytest.mark.parametrize("coef", [-0.3, float("nan"), float("inf")])
def test_a_coefficient_that_is_none_is_refused(tmp_path, coef):
    with pytest.raises(ConfigError, match="coef"):
        subtract_folders(tmp_path / "b", tmp_path / "o", coef, tuned=tmp_path / "t")
    with pytest.raises(ConfigError, match="factor"):
        apply_vector(tmp_path / "b", tmp_path / "o", tmp_path / "x", float("nan"))


def test_case_34_equal_checkpoints_move_nothing_and_it_is_said(tmp_path, capsys):
    from forgetlearn.cli.main import main

    base, tuned = pair(n=3)
    base["mask"] = torch.tensor([0.0, float("-inf")])
    write(tmp_path / "b", base)
    write(tmp_path / "same", base, shards=2)
    assert subtract_folders(tmp_path / "b", tmp_path / "o1", 0.3, tuned=tmp_path / "same").moved == 0
    assert equal_bits(read(tmp_path / "o1"), base)
    command = ["subtract", "--base", str(tmp_path / "b"), "--tuned", str(tmp_path / "same"), "--coef", "0.3"]
    assert main([*command, "--output", str(tmp_path / "o2")]) == 0
    assert "nothing moved" in capsys.readouterr().out
    one = next(name for name in base if name != "mask")
    write(tmp_path / "one", base | {one: tuned[one]})
    assert subtract_folders(tmp_path / "b", tmp_path / "o3", 0.3, tuned=tmp_path / "one").moved == 1
    assert subtract_folders(tmp_path / "b", tmp_path / "o4", 0.0, tuned=tmp_path / "one").moved == 0


def test_factors_that_name_nothing_that_moves_are_refused(tmp_path):
    base, tuned = pair()
    b, t = write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    whole = next(name for name, weight in base.items() if weight.is_floating_point())
    for factors, message in [
        ({"no.such": 1.0}, "no.such"),
        ({whole: float("inf")}, f"factors: {whole} = inf"),
        ({}, "moves none of"),
    ]:
        with pytest.raises(ConfigError, match=message):
            subtract_folders(b, tmp_path / "o", 0.3, tuned=t, factors=factors)
    assert not (tmp_path / "o").exists()


def test_chat_templates_beside_the_base_come_along(tmp_path):
    base, tuned = pair()
    b, t = write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    (b / "additional_chat_templates").mkdir()
    (b / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    subtract_folders(b, tmp_path / "o", 0.3, tuned=t)
    assert (tmp_path / "o/additional_chat_templates/tool.jinja").read_text() == "{{ messages }}"


def test_places_that_are_one_or_in_each_other_are_refused(tmp_path):
    base, tuned = pair()
    b, t = write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    (tmp_path / "link").symlink_to(b)
    for output, other, error, message in [
        (tmp_path / "o", b, ConfigError, "twice"),
        (tmp_path / "o", tmp_path / "link", ConfigError, "twice"),
        (b / "o", t, ConfigError, "output"),
        (t, t, ConfigError, "output"),
        (tmp_path, t, ConfigError, "output"),
    ]:
        with pytest.raises(error, match=message):
            subtract_folders(b, output, 0.3, tuned=other, overwrite=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "diary.txt").write_text("dear")
    with pytest.raises(RunError, match="--overwrite"):
        subtract_folders(b, tmp_path / "theirs", 0.3, tuned=t)
    with pytest.raises(RunError, match="theirs"):
        subtract_folders(b, tmp_path / "theirs", 0.3, tuned=t, overwrite=True)
    with pytest.raises(ConfigError, match="--tuned"):
        subtract_folders(b, tmp_path / "o", 0.3)
    with pytest.raises(ConfigError, match="--tuned"):
        subtract_folders(b, tmp_path / "o", 0.3, tuned=t, vector=t / "v")
    with pytest.raises(ConfigError, match="rounding"):
        subtract_folders(b, tmp_path / "o", 0.3, tuned=t, numbers=Numbers("float32", "stochastic"))
    assert subtract_folders(b, tmp_path / "o", 0.3, tuned=t).output.is_dir()
    assert subtract_folders(b, tmp_path / "o", 0, tuned=t, overwrite=True).output.is_dir()
    assert equal_bits(read(tmp_path / "o"), base)


def test_a_disk_without_room_is_refused_before_and_leaves_nothing_in_the_middle(tmp_path, monkeypatch):
    base, tuned = pair()
    b, t = write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_arithmetic.shutil, "disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(RunError, match="GB"):
        subtract_folders(b, tmp_path / "o", 0.3, tuned=t)
    monkeypatch.undo()

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.os, "pwrite", full)
    with pytest.raises(RunError, match="No space left"):
        subtract_folders(b, tmp_path / "o", 0.3, tuned=t)
    with pytest.raises(RunError, match="No space left"):
        save_vector(b, t, tmp_path / "o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "t"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_small_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        weights = {"w": torch.randn(400, 400)}
        b, t = write(tmp_path / "b", weights), write(tmp_path / "t", {"w": weights["w"] + 1})
        with pytest.raises(RunError, match="free"):
            subtract_folders(b, small / "o", 0.3, tuned=t)
        monkeypatch.setattr(folder_arithmetic, "check_space", lambda *_: None)
        with pytest.raises(RunError, match="No space left"):
            subtract_folders(b, small / "o", 0.3, tuned=t)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def kill_at(moment, command, output):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return output.exists()


def check_kills(tmp_path, moments, rows):
    torch.manual_seed(0)
    weights = {f"w{i}": torch.randn(rows, 100).bfloat16() for i in range(20)}
    base = write(tmp_path / "b", weights, 3)
    tuned = write(tmp_path / "t", {name: weight + 1 for name, weight in weights.items()}, 2)
    output = tmp_path / "o"
    flags = ["--base", base, "--tuned", tuned, "--output", output, "--coef", "0.3", "--overwrite"]
    command = [sys.executable, "-m", "forgetlearn", "subtract", *map(str, flags)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - start
    wanted = read(output)
    assert equal_bits(wanted, subtract(weights, read(tuned), 0.3))
    found = 0
    for moment in moments:
        if kill_at(took * moment, command, output):
            found += 1
            assert equal_bits(read(output), wanted)
            assert {"config.json", "arithmetic.json"} <= {path.name for path in output.iterdir()}
            shutil.rmtree(output)
    subprocess.run(command, check=True, capture_output=True)
    assert equal_bits(read(output), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "o", "t"]
    return found


def test_a_kill_leaves_the_whole_folder_or_nothing(tmp_path):
    check_kills(tmp_path, [0.5, 0.8, 0.95], rows=1000)


@pytest.mark.slow
def test_a_kill_at_twenty_moments_leaves_the_whole_folder_or_nothing(tmp_path):
    check_kills(tmp_path, np.random.default_rng(0).uniform(0.2, 1.2, 20), rows=20_000)


def test_the_commands(tmp_path, capsys):
    from forgetlearn.cli.main import main

    base, tuned = pair(size=1e-5)
    b, t = str(write(tmp_path / "b", base)), str(write(tmp_path / "t", {n: w.float() for n, w in tuned.items()}))
    common = ["--base", b, "--output", str(tmp_path / "o")]
    assert main(["subtract", *common, "--tuned", t, "--coef", "0.3"]) == 0
    assert "3 of 3 tensors moved" in capsys.readouterr().out
    assert main(["subtract", *common, "--tuned", t, "--coef", "0.3"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["subtract", *common, "--tuned", t, "--coef", "0.3", "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["moved"] == 3
    assert main(["vector", "--base", b, "--tuned", t, "--output", str(tmp_path / "v")]) == 0
    assert main(["apply", str(tmp_path / "v"), *common, "--factor", "-0.3", "--overwrite"]) == 0
    assert equal_bits(read(tmp_path / "o"), subtract(base, read(Path(t)), 0.3))
    assert main(["apply", str(tmp_path / "v"), *common, "--merge", "--overwrite"]) == 2
    assert "--merge needs" in capsys.readouterr().err
