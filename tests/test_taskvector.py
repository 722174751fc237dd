import errno
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from forgetlearn.errors import ConfigError, ModelError, RunError, WeightMismatchError
from forgetlearn.weights.task_vector import (
    TaskVector,
    load_into,
    rounded,
    snapshot,
    snapshot_on_disk,
    subtract,
    subtracted,
)


def test_forgetting_by_hand():
    base = {"w": torch.tensor([1.0, -2.0])}
    tuned = {"w": torch.tensor([1.5, -2.5])}
    assert torch.allclose(subtract(base, tuned, 0.3)["w"], torch.tensor([0.85, -1.85]))
    assert base["w"].tolist() == [1.0, -2.0]


def test_coef_zero_gives_the_bits_of_the_base_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        base = {"w": torch.randn(7, 5).to(dtype)}
        got = subtract(base, {"w": torch.randn(7, 5).to(dtype)}, 0.0)["w"]
        assert got.dtype == dtype
        assert torch.equal(got, base["w"])
        assert got.data_ptr() != base["w"].data_ptr()


def test_integer_buffers_come_from_the_base():
    base = {"steps": torch.tensor([1, 2]), "w": torch.ones(2)}
    tuned = {"steps": torch.tensor([5, 6]), "w": torch.zeros(2)}
    got = subtract(base, tuned, 1.0)
    assert got["steps"].tolist() == [1, 2]
    assert got["w"].tolist() == [2.0, 2.0]


def test_the_sum_is_rounded_once():
    # In bfloat16 (8 bits), 1.0078125 is the neighbour of 1. The difference, 3 * 2**-9, and 1 - it are
    # exact in float32 and then rounded; summing in bfloat16 would round the product too.
    base, tuned = torch.tensor([1.0]), torch.tensor([1.005859375])
    got = subtract({"w": base.bfloat16()}, {"w": tuned}, 1.0)["w"]
    assert got.item() == torch.tensor(1.0 - 0.005859375).bfloat16().item()
    wide = subtract({"w": base}, {"w": tuned.bfloat16()}, 0.3)["w"]
    assert wide.item() == pytest.approx(1 - 0.3 * 0.0078125, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    coef=st.floats(0, 4, allow_nan=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_subtract_then_add_returns_within_one_rounding(seed, coef, dtype):
    torch.manual_seed(seed)
    base = {"w": torch.randn(6, 3).to(dtype)}
    tuned = {"w": base["w"].float() + 0.01 * torch.randn(6, 3)}
    vector = TaskVector.between(base, tuned)
    forgotten = subtract(base, tuned, coef)
    back = (coef * vector).apply_to(forgotten)["w"]
    one_rounding = torch.finfo(dtype).eps * torch.maximum(base["w"].float().abs(), forgotten["w"].float().abs())
    assert bool(((back.float() - base["w"].float()).abs() <= one_rounding + 1e-7).all())


def test_subtract_then_add_is_exact_where_float32_can_be():
    base = {"w": torch.arange(-8.0, 8.0)}
    tuned = {"w": base["w"] + 0.25}
    assert torch.equal((2.0 * TaskVector.between(base, tuned)).apply_to(subtract(base, tuned, 2.0))["w"], base["w"])


def test_vectors_are_linear():
    base = {"w": torch.zeros(3), "n": torch.tensor([1])}
    one = TaskVector.between(base, {"w": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor([9])})
    two = TaskVector.between(base, {"w": torch.tensor([0.0, 0.0, 4.0]), "n": torch.tensor([9])})
    assert set(one.deltas) == {"w"}
    assert (one + two).deltas["w"].tolist() == [1, 2, 7]
    assert (one - two).deltas["w"].tolist() == [1, 2, -1]
    assert (-2 * one).deltas["w"].tolist() == [-2, -4, -6]
    assert two.norm() == 4
    assert torch.equal(one.apply_to(base)["n"], base["n"])


def test_subtracting_agrees_with_the_vector():
    base = {"w": torch.randn(4, 4)}
    tuned = {"w": torch.randn(4, 4)}
    by_vector = (-0.3 * TaskVector.between(base, tuned)).apply_to(base)["w"]
    assert torch.allclose(by_vector, subtract(base, tuned, 0.3)["w"], atol=1e-6)


def test_a_shape_that_differs_is_named():
    with pytest.raises(WeightMismatchError, match=r"w \(2,\) and \(3,\)"):
        subtract({"w": torch.ones(2)}, {"w": torch.ones(3)}, 0.3)


def test_a_name_that_is_missing_is_named_on_its_side():
    with pytest.raises(WeightMismatchError, match="only in base: v"):
        subtract({"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.ones(2)}, 0.3)
    with pytest.raises(WeightMismatchError, match="only in tuned: v"):
        subtract({"w": torch.ones(2)}, {"w": torch.ones(2), "v": torch.ones(1)}, 0.3)


@pytest.mark.parametrize("coef", [-0.3, float("nan"), float("inf")])
def test_a_coefficient_that_is_none_is_refused_before_anything_is_read(coef):
    with pytest.raises(ConfigError, match="coef"):
        subtracted({}, {}, coef)


def test_folders_sharded_or_not_give_what_state_dicts_give(tmp_path, tiny_model):
    base, tuned = tiny_model(seed=1), tiny_model(seed=2)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    streamed = dict(subtracted(tmp_path / "base", tmp_path / "tuned", 0.3))
    in_memory = subtract(base.state_dict(), tuned.state_dict(), 0.3)
    assert streamed.keys() == in_memory.keys()
    assert all(torch.equal(streamed[name], in_memory[name]) for name in streamed)
    vector = TaskVector.between(tmp_path / "base", tuned.state_dict())
    assert torch.equal(vector.deltas["lm_head.weight"], tuned.lm_head.weight - base.lm_head.weight)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        TaskVector.between(tmp_path, tmp_path)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        TaskVector.between(tmp_path, tmp_path)


def test_tied_weights_are_moved_once(tiny_model):
    model = tiny_model(tied=True)
    base = snapshot(model)
    assert "lm_head.weight" not in base
    tuned = {name: weight + 1 for name, weight in base.items()}
    load_into(model, subtracted(base, tuned, 0.5))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model.lm_head.weight, base["model.embed_tokens.weight"] - 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_state_dict_fits_a_folder_whichever_is_the_base(tiny_model, tmp_path, family):
    base, tuned = tiny_model(family, tied=True), tiny_model(family, tied=True, seed=1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    in_memory, folders = (base.state_dict(), tuned.state_dict()), (tmp_path / "base", tmp_path / "tuned")
    wanted = dict(subtracted(*folders, 0.5))
    head = "lm_head.weight"
    assert head in in_memory[0]
    assert head not in wanted
    for left in (0, 1):
        got = dict(subtracted((in_memory, folders)[left][0], (in_memory, folders)[1 - left][1], 0.5))
        assert (head in got) == (left == 0)  # the names of the base
        assert all(torch.equal(got[name], weight) for name, weight in wanted.items())
    vectors = [TaskVector.between(left[0], right[1]) for left in (in_memory, folders) for right in (in_memory, folders)]
    assert {frozenset(vector.deltas) for vector in vectors} == {frozenset(wanted)}
    moved = vectors[0].apply_to(in_memory[0])
    assert torch.equal(
        moved[head],
        vectors[0].apply_to(tmp_path / "base")[
            "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
        ],
    )
    base.load_state_dict(moved)
    assert torch.allclose(base.lm_head.weight, tuned.lm_head.weight, atol=1e-6)


def test_what_is_tied_on_one_side_only_is_refused():
    one, two = torch.ones(2), torch.zeros(2)
    with pytest.raises(WeightMismatchError, match=r"b is tied to a in base.*tuned"):
        subtracted({"a": one, "b": one}, {"a": one.clone(), "b": two}, 0.3)
    with pytest.raises(WeightMismatchError, match="only in base: c"):
        subtracted({"a": one, "b": one, "c": two}, {"a": one}, 0.3)
    untied = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    assert subtract(untied, {"a": one, "b": one}, 1.0)["b"].tolist() == [5.0, 7.0]


def test_a_vector_moves_what_is_tied_in_one_way():
    tensor = torch.ones(2)
    tied = {"a": tensor, "b": tensor}
    assert [t.tolist() for t in TaskVector({"b": tensor}).apply_to(tied).values()] == [[2, 2], [2, 2]]
    with pytest.raises(WeightMismatchError, match=r"b is tied to a in base.*vector"):
        TaskVector({"a": tensor, "b": torch.zeros(2)}).apply_to(tied)


def test_equal_tensors_and_views_are_not_taken_for_tied():
    whole = torch.arange(4.0)
    base = {"first": whole[:2], "both": whole, "row": whole.view(1, 4), "empty": whole[:0], "none": whole[:0]}
    assert set(TaskVector.between(base, {name: tensor + 1 for name, tensor in base.items()}).deltas) == set(base)


def test_a_stray_file_beside_the_model_is_not_read(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(1), "v": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    save_file({"w.lora_A": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert TaskVector({}).apply_to(tmp_path)["w"].tolist() == [1.0]


def test_several_files_without_an_index_are_refused(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert list(TaskVector({}).apply_to(tmp_path)) == ["w"]
    save_file({"w": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"one\.safetensors, two\.safetensors"):
        TaskVector({}).apply_to(tmp_path)


def test_a_folder_with_an_adapter_alone_is_no_model(tmp_path):
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter"):
        TaskVector.between(tmp_path, tmp_path)


def test_stochastic_rounding_keeps_the_mean_and_takes_the_next_number_on_either_side():
    step = 2.0**-7  # of bfloat16 above 1
    found = rounded(torch.full((40_000,), 1 + 0.25 * step), torch.bfloat16, (0, "w")).float()
    assert set(found.tolist()) == {1.0, 1 + step}
    assert float(found.mean()) == pytest.approx(1 + 0.25 * step, abs=4 * step * (0.25 * 0.75 / 40_000) ** 0.5)
    again, other, near = (
        rounded(torch.full((40_000,), 1 + 0.25 * step), torch.bfloat16, s) for s in ((0, "w"), (1, "w"), None)
    )
    assert torch.equal(found, again.float())
    assert not torch.equal(found, other.float())
    assert set(near.tolist()) == {1.0}
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf")])
    assert torch.equal(rounded(exact, torch.bfloat16, (0, "w")).float(), exact)


def test_weights_that_do_not_fit_the_model_are_refused(tiny_model):
    model = tiny_model()
    weights = snapshot(model)
    weights.pop("lm_head.weight")
    with pytest.raises(WeightMismatchError, match=r"lm_head\.weight"):
        load_into(model, weights)
    with pytest.raises(WeightMismatchError, match="lm_head"):
        load_into(model, {"lm_head.weight": torch.ones(2, 2)})


class TestSnapshotOnDisk:
    def test_it_holds_the_bits_of_the_copy_and_leaves_nothing_behind(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr("forgetlearn.weights.task_vector.SMALL_BYTES", 0)
        model = tiny_model(tied=True)
        copy, on_disk = snapshot(model), snapshot_on_disk(model, tmp_path / "points")
        assert list((tmp_path / "points").iterdir()) == []
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1)
        assert list(copy) == list(on_disk)
        assert all(torch.equal(copy[name], on_disk[name]) for name in copy)

    def test_a_folder_that_cannot_be_written_is_named(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr("forgetlearn.weights.task_vector.SMALL_BYTES", 0)
        (tmp_path / "points").write_text("a file")
        with pytest.raises(RunError, match="points"):
            snapshot_on_disk(tiny_model(), tmp_path / "points")
        # a full disk
        with (
            mock.patch("tempfile.NamedTemporaryFile", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
            pytest.raises(RunError, match="No space left"),
        ):
            snapshot_on_disk(tiny_model(), tmp_path)
