"""Model folders from a stranger: files that disagree, numbers that are none, JSON of the wrong kind."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetlearn.cli.main import main
from forgetlearn.errors import ModelError
from forgetlearn.models.language_model import wrap
from forgetlearn.models.loading import check_finite
from forgetlearn.products.inspect import inspect_change
from forgetlearn.weights.folder_arithmetic import save_vector, subtract_folders
from forgetlearn.weights.task_vector import is_finite, subtract
from test_models import change_config, change_weights, load, refused, saved  # noqa: F401 (a fixture)

NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def damaged(saved, tmp_path):  # noqa: F811
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def moved(tiny_model, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def edit(file, **changes):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def put(folder, name, value, at=(3,)):
    """One number of a weight replaced."""

    def change(weights):
        weights[name] = weights[name].clone()
        weights[name][at] = value

    change_weights(folder, change)


# case 5
def test_case_5_a_name_in_two_shards_is_refused_by_every_command(damaged, moved, tmp_path, capsys):
    weights = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    save_file({n: w for n, w in weights.items() if n != DOWN}, damaged / ONE, {"format": "pt"})
    save_file({DOWN: weights[DOWN]}, damaged / TWO, {"format": "pt"})
    index = {name: TWO if name == DOWN else ONE for name in weights}
    (damaged / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert load(damaged).model
    save_file({DOWN: weights[DOWN], NORM: 9 * weights[NORM]}, damaged / TWO, {"format": "pt"})
    (tmp_path / "f.jsonl").write_text('{"prompt": "abc", "target_new": "d", "ground_truth": "e"}\n')
    facts, output = ["--facts", str(tmp_path / "f.jsonl")], ["--output", str(tmp_path / "out")]
    for argv in (
        ["ask", "--model", str(damaged), "abc"],
        ["update", "--model", str(damaged), *facts, *output],
        ["evaluate", "--model", str(damaged), *facts, *output],
        ["plan", "--model", str(damaged), *facts],
        ["subtract", "--base", str(damaged), "--tuned", str(moved), "--coef", "0.3", *output],
        ["subtract", "--base", str(moved), "--tuned", str(damaged), "--coef", "0.3", *output],
        ["vector", "--base", str(damaged), "--tuned", str(moved), *output],
        ["inspect", str(moved), "--base", str(damaged)],
    ):
        assert main(argv) == 2, argv
        said = capsys.readouterr().err
        assert "ModelError" in said
        assert "Traceback" not in said
        assert NORM in said
        assert ONE in said
        assert TWO in said
        assert not (tmp_path / "out").exists(), argv


# case 6
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, "lm_head.weight"])
def test_case_6_a_weight_that_is_not_finite_is_refused(damaged, name, value):
    put(damaged, name, value)
    said = refused(damaged)
    assert said.startswith(str(damaged / "model.safetensors"))
    assert name in said


# case 6
def test_case_6_a_model_in_memory_too(tiny_model, char_tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match=NORM):
        wrap(model, char_tokenizer)


# case 6
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_case_6_weights_without_their_scales_are_refused(damaged, dtype):
    change_weights(damaged, lambda weights: weights.update({DOWN: weights[DOWN].to(dtype)}))
    said = refused(damaged)
    assert f"{DOWN} (" in said
    assert "quantization_config" in said


def test_buffers_may_hold_whole_numbers_and_infinite_ones(tiny_model, char_tokenizer, tmp_path):
    """GPT-2's files of 2019 hold the causal mask as bytes, under names without the prefix."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    char_tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(float("-inf"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).model
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_finite(module)


def test_looking_for_what_is_not_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        weight = torch.ones(3, 5).to(dtype)
        assert is_finite(weight)
        weight[1, 2] = float("nan")
        assert not is_finite(weight)
    assert not is_finite(torch.tensor([1.0, float("-inf")]))
    assert is_finite(torch.full((1000,), 60000.0).half())  # their sum would not be
    assert is_finite(torch.tensor([1]))
    assert is_finite(torch.empty(0))


# case 6: the streamed arithmetic, where masks hold -inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", ["base", "base, not moved", "tuned"])
def test_case_6_nan_is_never_written(tmp_path, side, dtype):
    mask = torch.tensor([0.0, float("-inf")]).to(dtype)
    good = {"w": torch.ones(2).to(dtype), "still": torch.ones(2).to(dtype), "mask": mask}
    name = "still" if side == "base, not moved" else "w"
    bad = good | {name: torch.tensor([1.0, float("nan")]).to(dtype)}
    for folder, tensors in (("good", good), ("bad", bad)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    base, tuned = ("good", "bad") if side == "tuned" else ("bad", "good")
    base, tuned = tmp_path / base, tmp_path / tuned
    factors = {"w": 1.0} if side == "base, not moved" else None
    with pytest.raises(ModelError, match=rf"bad/model\.safetensors: {name} holds NaN"):
        subtract_folders(base, tmp_path / "out", 0.5, tuned=tuned, factors=factors)
    with pytest.raises(ModelError, match=f"{name} holds NaN"):
        save_vector(base, tuned, tmp_path / "out")
    with pytest.raises(ModelError, match=f"{name} holds NaN"):
        inspect_change(tuned, base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad"}
    assert subtract_folders(
        tmp_path / "good", tmp_path / "out", 0.5, tuned=shutil.copytree(tmp_path / "good", tmp_path / "c")
    )


# case 6
def test_case_6_an_infinite_weight_of_the_base_is_told_from_a_mask(tmp_path):
    inf = float("inf")
    sides = {
        "mask": {"w": torch.tensor([1.0, -inf])},
        "same": {"w": torch.tensor([2.0, -inf])},
        "finite": {"w": torch.tensor([2.0, 3.0])},
    }
    for folder, tensors in sides.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    done = subtract_folders(tmp_path / "mask", tmp_path / "out", 0.5, tuned=tmp_path / "same")
    assert load_file(done.output / "model.safetensors")["w"].tolist() == [0.5, -inf]
    with pytest.raises(ModelError, match=r"^w: 1 .*infinite"):
        subtract_folders(tmp_path / "mask", tmp_path / "no", 0.5, tuned=tmp_path / "finite")
    with pytest.raises(ModelError, match=r"^w: 1 .*not finite"):
        subtract_folders(tmp_path / "finite", tmp_path / "no", 0.5, tuned=tmp_path / "mask")
    with pytest.raises(ModelError, match=r"^w: .*not finite"):
        inspect_change(tmp_path / "mask", base=tmp_path / "finite")
    assert not (tmp_path / "no").exists()


def test_the_arithmetic_in_memory_refuses_it_too():
    inf, nan = float("inf"), float("nan")
    base = {"w": torch.tensor([1.0, -inf])}
    assert subtract(base, {"w": torch.tensor([2.0, -inf])}, 0.5)["w"].tolist() == [0.5, -inf]
    for wrong in (nan, inf):
        with pytest.raises(ModelError, match=r"^w: .*not finite"):
            subtract(base, {"w": torch.tensor([wrong, -inf])}, 0.5)


# case 23
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ],
)
def test_case_23_brackets_without_end(damaged, file):
    for text in ("[" * 100_000, '{"a": ' + "[" * 500 + "]" * 500 + "}"):
        (damaged / file).write_text(text)
        if file == INDEX:
            (damaged / "model.safetensors").unlink(missing_ok=True)
            save_file({"a": torch.ones(1)}, damaged / ONE)
        said = refused(damaged)
        assert f"{file}: nests" in said


def test_a_config_of_a_gigabyte_or_that_is_no_file(damaged):
    with (damaged / "generation_config.json").open("wb") as file:
        file.truncate(10**9)
    assert "generation_config.json" in refused(damaged)
    (damaged / "generation_config.json").unlink()
    (damaged / "generation_config.json").mkdir()
    assert "generation_config.json" in refused(damaged)


# case 26
@pytest.mark.parametrize("value", ["1024", [1024], {"a": 1}, True, -1])
def test_case_26_the_length_of_a_tokenizer(damaged, value):
    edit(damaged / "tokenizer_config.json", model_max_length=value)
    said = refused(damaged)
    assert "tokenizer_config.json: model_max_length" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", 5),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "x"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**400),
        ("num_labels", 10**9),
        ("sliding_window", "x"),
        ("hidden_act", []),
        ("vocab_size", -1),
    ],
)
def test_a_config_that_builds_no_model(damaged, field, value):
    change_config(damaged, **{field: value})
    start = time.monotonic()
    assert str(damaged) in refused(damaged)
    assert time.monotonic() - start < 10


def test_memory_that_is_not_there_is_no_fault_of_the_model(damaged, monkeypatch):
    def fails(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr("forgetlearn.models.loading.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(MemoryError):
        load(damaged)
