import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from forgetlearn.errors import ModelError, WeightMismatchError
from forgetlearn.weights.agreement import partners
from forgetlearn.weights.checkpoint_folder import CheckpointFolder, header_bytes, read_header
from forgetlearn.weights.folder_arithmetic import subtract_folders
from forgetlearn.weights.task_vector import Checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7]), "c": torch.ones(4).bfloat16()}
ONE, TWO, THREE = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def forge(folder, change=None, *, raw=None, cut=0, more=b""):
    """The folder's file with another header, cut short or with something behind it."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    if change:
        change(header)
    raw = json.dumps(header).encode() if raw is None else raw
    data = struct.pack("<Q", len(raw)) + raw + whole[8 + length :] + more
    file.write_bytes(data[: len(data) - cut])


def test_tensors_are_those_of_safetensors(folder):
    found = Checkpoint(folder)
    assert found.shapes() == {"a": (2, 3), "b": (1,), "c": (4,)}
    for name, tensor in TENSORS.items():
        assert torch.equal(found.get(name), tensor)
        assert found.get(name).dtype == tensor.dtype
    assert found.metadata == {"model.safetensors": {"format": "pt"}}


def test_a_header_that_is_written_is_read_back(folder, tmp_path):
    entries = list(CheckpointFolder(folder).entries.values())
    told = header_bytes(entries, {"format": "pt"}, {entry.name: entry.dtype for entry in entries})
    (tmp_path / "again.safetensors").write_bytes(told + bytes(sum(entry.n_bytes for entry in entries)))
    metadata, again = read_header(tmp_path / "again.safetensors")
    assert metadata == {"format": "pt"}
    assert [(e.name, e.dtype, e.shape, e.n_bytes) for e in again] == [
        (e.name, e.dtype, e.shape, e.n_bytes) for e in entries
    ]
    assert len(told) % 8 == 0


def shift(name, start, stop):
    def change(header):
        header[name]["data_offsets"] = [header[name]["data_offsets"][0] + start, header[name]["data_offsets"][1] + stop]

    return change


def put(name, field, value):
    return lambda header: header[name].__setitem__(field, value)


@pytest.mark.parametrize(
    "change",
    [
        {"cut": 1},
        {"cut": 10_000},
        {"more": b"x"},
        {"change": shift("a", 0, 4)},
        {"change": shift("c", -4, -4)},
        {"change": shift("c", 8, 8)},
        {"change": put("a", "shape", [-1, 6])},
        {"change": put("a", "shape", [2.0, 3])},
        {"change": put("a", "shape", [10**30, 10**30])},
        {"change": put("a", "shape", [2**40, 2**40])},
        {"change": put("a", "data_offsets", [0, 10**30])},
        {"change": put("a", "data_offsets", "all")},
        {"change": put("a", "dtype", "F8_E4M3")},
        {"change": put("a", "dtype", "F31")},
        {"change": put("a", "dtype", ["F32"])},
        {"change": lambda header: header["a"].pop("shape")},
        {"change": lambda header: header.update(__metadata__={"format": 1})},
        {"raw": b"[1, 2]"},
        {"raw": b"{"},
        {"raw": b"[" * 100_000},
        {"raw": b"\xff\xfe"},
        {"raw": b'{"a": 1, "a": 2}'},
    ],
)
def test_a_header_that_lies_is_refused(folder, change):
    forge(folder, **change)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        CheckpointFolder(folder)


def test_a_header_that_repeats_a_name_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + length].strip()
    own = json.loads(header)["a"]
    forge(folder, raw=header[:-1] + b',"a":' + json.dumps(own | {"shape": [3, 2]}).encode() + b"}")
    with pytest.raises(ModelError, match="repeats a name"):
        CheckpointFolder(folder)


@pytest.mark.parametrize("length", [2**63, 10**9, 10**5])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelError, match="header"):
        CheckpointFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ModelError, match="header"):
        CheckpointFolder(tmp_path)


def sharded(folder, index):
    folder.mkdir()
    for number, name in ((1, "a"), (2, "c")):
        save_file({name: TENSORS[name]}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": ONE, "c": THREE}}, "00003"),
        ({"weight_map": {"a": ONE, "c": "../c.safetensors"}}, "c.safetensors"),
        ({"weight_map": {"a": ONE, "c": ONE}}, "names c"),
        ({"weight_map": {"a": ONE, "x": TWO}}, "names x"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ([], "index.json"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    with pytest.raises(ModelError, match=message):
        CheckpointFolder(sharded(tmp_path / "s", index))


def test_pickles_and_places_without_a_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        CheckpointFolder(tmp_path / "nowhere")
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        CheckpointFolder(tmp_path)
    with pytest.raises(ModelError, match="pytorch_model"):
        CheckpointFolder(tmp_path / "pytorch_model.bin")


def test_a_quantised_checkpoint_is_refused(folder, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("beside")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ModelError, match="quantization_config"):
        subtract_folders(folder, tmp_path / "o", 0.3, tuned=tmp_path / "t")


def test_quantised_weights_are_told_apart_from_damage(tmp_path):
    save_file(TENSORS | {"a": TENSORS["a"].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="a is stored as F8_E4M3"):
        CheckpointFolder(tmp_path)
    assert CheckpointFolder(tmp_path, any_dtype=True).entries["a"].dtype == "F8_E4M3"


def test_whole_numbers_for_weights_are_refused(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("int8")
    save_file(TENSORS | {"a": torch.ones(2, 3, dtype=torch.int8)}, other / "model.safetensors")
    with pytest.raises(WeightMismatchError, match=r"a \(F32 in base, I8 in tuned\)"):
        subtract_folders(folder, other.parent / "o", 0.3, tuned=other)


def test_other_architectures_are_told_apart_before_anything_is_written(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_model("llama", intermediate_size=96).save_pretrained(tmp_path / "wider")
    with pytest.raises(WeightMismatchError, match="only in base"):
        subtract_folders(tmp_path / "llama", tmp_path / "o", 0.3, tuned=tmp_path / "gpt2")
    with pytest.raises(WeightMismatchError, match="differ in shape"):
        subtract_folders(tmp_path / "llama", tmp_path / "o", 0.3, tuned=tmp_path / "wider")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "llama", "wider"]


def test_equal_matrices_are_twins_and_constants_are_not(tmp_path):
    head, zeros = torch.randn(900, 300), torch.zeros(900, 300)
    late = head.clone()
    late[-1, -1] += 1
    save_file(
        {"a": head, "b": head.clone(), "late": late, "z": zeros, "y": zeros.clone()}, tmp_path / "model.safetensors"
    )
    found = CheckpointFolder(tmp_path)
    assert {name: found.twins(name) for name in found.entries} == {
        **{"a": ("b",), "b": ("a",), "late": (), "z": (), "y": ()}
    }
    (tmp_path / "config.json").write_text('{"text_config": {"tie_word_embeddings": false}}')
    assert found.twins("a") == ()
    assert partners(found, found) == {name: name for name in found.entries}


def test_a_file_that_is_cut_while_it_is_read_is_an_error(folder):
    found = CheckpointFolder(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    last = max(found.entries.values(), key=lambda entry: entry.start)
    with pytest.raises(ModelError, match=f"ended inside {last.name}"):
        found.read_bytes(last, 0, last.n_bytes)
    found.close()
