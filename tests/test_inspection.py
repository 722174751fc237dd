import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetlearn.cli.main import main
from forgetlearn.errors import ConfigError, WeightMismatchError
from forgetlearn.products.inspect import inspect_change, place_of
from forgetlearn.weights.folder_arithmetic import save_vector, subtract_folders
from written_by_hand import a_manifest, a_summary, write_run

DRAWS = True  # looks at plots
WEIGHTS = "model.safetensors"
NAMES = ["embed.weight", "layers.0.mlp.up.weight", "layers.1.mlp.up.weight", "layers.1.norm.weight"]


def write(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def folders(tmp_path):
    base = {name: torch.full((2, 2), 1.0) for name in NAMES}
    one = {name: weight + 0.5 * place for place, (name, weight) in enumerate(base.items())}
    two = {name: weight - torch.tensor([[0.5, 0.0], [0.0, 0.0]]) for name, weight in base.items()}
    for name, tensors in (("b", base), ("one", one), ("two", two)):
        write(tmp_path / name, tensors)
    for name in ("one", "two"):
        save_vector(tmp_path / "b", tmp_path / name, tmp_path / f"v-{name}")
    return tmp_path


def test_layers_and_kinds_are_read_from_names():
    assert place_of("model.layers.3.mlp.up_proj.weight") == (3, "mlp.up_proj")
    assert place_of("transformer.h.11.attn.c_attn.bias") == (11, "attn.c_attn.bias")
    assert place_of("lm_head.weight") == (None, "lm_head")
    assert place_of("model.layers.2.mlp.experts.7.w1.weight") == (2, "mlp.experts.7.w1")


def test_norms_by_hand(folders):
    found = inspect_change(folders / "v-one")
    # changes of 0, 0.5, 1.0 and 1.5 in four numbers each
    assert found.total.as_dict()["norm"] == pytest.approx((4 * (0.25 + 1 + 2.25)) ** 0.5)
    assert {kind: tally.as_dict()["norm"] for kind, tally in found.by_kind().items()} == pytest.approx(
        {"embed": 0, "mlp.up": (4 * 1.25) ** 0.5, "norm": 3}
    )
    assert {layer: tally.as_dict()["norm"] for layer, tally in found.by_layer().items()} == pytest.approx(
        {None: 0, 0: 1, 1: (4 * 3.25) ** 0.5}
    )
    assert found.by_kind()["norm"].as_dict()["rms"] == pytest.approx(1.5)
    assert found.total.as_dict()["relative"] is None
    assert found.metadata["forgetlearn"] == "task vector"
    with_base = inspect_change(folders / "one", base=folders / "b").by_kind()["norm"].as_dict()
    assert with_base["relative"] == pytest.approx(1.5)
    assert with_base["share_changed"] is None


def test_the_cosine_of_two_changes(folders):
    same = inspect_change(folders / "v-one", other=folders / "v-one").total.as_dict()
    assert same["cosine"] == pytest.approx(1)
    found = inspect_change(folders / "v-one", other=folders / "v-two")
    assert found.by_kind()["norm"].as_dict()["cosine"] == pytest.approx(-1.5 * 0.5 / (3 * 0.5))
    assert found.by_kind()["embed"].as_dict()["cosine"] is None
    dot, norms = -0.5 * (0.5 + 1 + 1.5), (14**0.5) * 1
    assert found.total.as_dict()["cosine"] == pytest.approx(dot / norms)


def test_what_rounding_leaves_is_what_subtracting_does(tmp_path):
    torch.manual_seed(0)
    base = {"w": (0.02 * torch.randn(200, 200)).bfloat16(), "v": torch.ones(3)}
    tuned = {"w": base["w"].float() + 1e-4 * torch.randn(200, 200), "v": torch.ones(3)}
    write(tmp_path / "b", base), write(tmp_path / "t", tuned)
    found = inspect_change(tmp_path / "t", base=tmp_path / "b", coef=0.3).total.as_dict()
    written = subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, tuned=tmp_path / "t").survival
    assert found["share_changed"] == pytest.approx(written.share_changed)
    assert found["share_survived"] == pytest.approx(written.share_survived)
    done = (base["w"].float() - 0.3 * (tuned["w"] - base["w"].float())).bfloat16() != base["w"]
    assert found["share_changed"] == pytest.approx(float(done.float().mean()))
    assert found["share_survived"] == pytest.approx(0.69, abs=0.02)
    save_vector(tmp_path / "b", tmp_path / "t", tmp_path / "v")
    of_vector = inspect_change(tmp_path / "v", base=tmp_path / "b", coef=0.3).total.as_dict()
    assert of_vector == pytest.approx(found)


def test_a_run_is_inspected_by_its_product(folders):
    run = run_of(folders, teach_epochs=0)
    (folders / "one").rename(run / "model")
    assert inspect_change(run).total.as_dict()["norm"] == pytest.approx(14**0.5)
    assert inspect_change(run, other=folders / "v-one").total.as_dict()["cosine"] == pytest.approx(1)


def test_a_run_that_taught_first_is_inspected_from_the_taught_model(folders):
    run = run_of(folders, teach_epochs=2)
    (folders / "one").rename(run / "model")
    with pytest.raises(ConfigError, match="--base"):
        inspect_change(run)  # the taught model is gone, and the base it was made from is another
    (folders / "two").rename(run / "taught")
    from_base = inspect_change(run, base=folders / "b").total.as_dict()["norm"]
    assert inspect_change(run).total.as_dict()["norm"] != pytest.approx(from_base)


def run_of(folders, teach_epochs):
    config = {"model": {"name": str(folders / "b")}, "teach": {"epochs": teach_epochs}}
    return write_run(folders / "run", a_manifest(config, inputs={"base_sha256": "1" * 64}), a_summary())


def test_what_cannot_be_inspected_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="--base"):
        inspect_change(folders / "one")
    with pytest.raises(ConfigError, match=r"--coef .*--base"):
        inspect_change(folders / "v-one", coef=0.3)
    with pytest.raises(ConfigError, match="coef = nan"):
        inspect_change(folders / "v-one", base=folders / "b", coef=float("nan"))
    write(tmp_path / "strange", {"x": torch.ones(2)})
    write(tmp_path / "stranger", {"x": torch.zeros(2)})
    save_vector(tmp_path / "strange", tmp_path / "stranger", tmp_path / "v-strange")
    write(tmp_path / "part", {NAMES[0]: torch.ones(2, 2)})
    write(tmp_path / "part2", {NAMES[1]: torch.ones(2, 2)})
    for part in ("part", "part2"):
        write(tmp_path / f"{part}-tuned", {name: w + 1 for name, w in load_file(tmp_path / part / WEIGHTS).items()})
        save_vector(tmp_path / part, tmp_path / f"{part}-tuned", tmp_path / f"v-{part}")
    with pytest.raises(WeightMismatchError, match=r"v-part .*v-part2"):
        inspect_change(tmp_path / "v-part", other=tmp_path / "v-part2", base=folders / "b")
    with pytest.raises(WeightMismatchError, match="x"):
        inspect_change(folders / "v-one", other=tmp_path / "v-strange")


def test_the_command(folders, capsys):
    plot = folders / "plot.svg"
    words = ["inspect", str(folders / "v-one"), "--base", str(folders / "b"), "--coef", "0.3"]
    assert main([*words, "--other", str(folders / "v-two"), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = "tensors numbers norm rms relative cosine share changed share survived"
    assert lines[0].split() == columns.split()
    assert lines[1].split()[:4] == ["all", "4", "16", "3.742"]
    assert {"embed", "mlp.up", "norm"} <= {line.split()[0] for line in lines}
    assert "layer 1" in "\n".join(lines)
    assert plot.read_text().startswith("<?xml")
    assert "mlp.up" in plot.read_text()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["share_changed"] == 1
    assert main(["inspect", str(folders / "one")]) == 2
    assert "--base" in capsys.readouterr().err
