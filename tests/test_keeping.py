"""Facts to keep: only what they share with what is subtracted is left out of it."""

import pytest
import torch
from torch import tensor

from forgetlearn.cli.main import main
from forgetlearn.config.schema import ForgetSettings, ModelSettings
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import read_facts, write_facts
from forgetlearn.method.core import check_forgetting, forget
from forgetlearn.method.keeping import fisher_weights, read_keep, spared, squared_gradients
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import load_model
from forgetlearn.weights.task_vector import TaskVector, snapshot

BASE = {"w": tensor([[1.0, 2.0], [3.0, 4.0]]), "still": tensor([1.0])}
FORGOTTEN = {"w": tensor([[3.0, 2.0], [3.0, 5.0]]), "still": tensor([1.0])}  # changed by 2, 0, 0, 1


def made(kept, by):
    return dict(spared(BASE, FORGOTTEN.items(), {"still": tensor([5.0]), "w": tensor(kept)}, by))


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ([[0.0, 3.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]),  # orthogonal
        ([[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]),
        ([[-4.0, 0.0], [0.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),  # along it, either way
        ([[1.0, 1.0], [0.0, 0.0]], [[1.0, -1.0], [0.0, 1.0]]),
    ],
)
def test_projection_takes_out_what_is_shared(kept, left):
    result = made(kept, "projection")
    assert torch.equal(result["w"], BASE["w"] + tensor(left))
    assert torch.equal(result["still"], BASE["still"])


def test_fisher_scales_each_number():
    weights = fisher_weights({"w": tensor([3.0, 0.0, 2.0, 0.0])}, {"w": tensor([1.0, 2.0, 0.0, 0.0])})["w"]
    assert weights.tolist() == [0.75, 0.0, 1.0, 0.0]
    result = made([[0.75, 0.0], [1.0, 0.0]], "fisher")
    assert torch.equal(result["w"], tensor([[2.5, 2.0], [3.0, 4.0]]))


def test_a_weight_of_one_changes_nothing_to_the_bit():
    start, moved = torch.randn(50), torch.randn(50)
    (result,) = spared({"w": start}, [("w", moved)], {"w": torch.ones(50)}, "fisher")
    assert torch.equal(result[1], moved)


def test_squared_gradients_are_those_of_each_text_by_itself(tiny_model):
    model = tiny_model()
    texts = [Encoded((1, 5, 6, 7), 2), Encoded((1, 9, 8), 2)]
    wanted = 0
    for text in texts:
        model.zero_grad()
        model(torch.tensor([text.ids]), labels=torch.tensor([[-100] * 2 + list(text.ids[2:])])).loss.backward()
        wanted = wanted + model.lm_head.weight.grad.square() / 2
    found = squared_gradients(model, texts, torch.device("cpu"))
    assert torch.allclose(found["lm_head.weight"], wanted, rtol=1e-4, atol=1e-12)
    assert wanted.max() > 0
    assert all(weight.grad is None for weight in model.parameters())


@pytest.fixture(scope="module")
def files(small_lab, tmp_path_factory):
    """Six facts to update, and a file of six others."""
    facts = read_facts(small_lab / "facts.jsonl", limit=6)
    other = tmp_path_factory.mktemp("keep") / "keep.jsonl"
    write_facts(read_facts(small_lab / "facts.jsonl")[6:12], other)
    return facts, other


def test_what_is_kept_is_the_old_answer_or_in_a_file_without_any_the_new_one(files, tmp_path):
    facts, file = files
    assert [fact.ground_truth for fact in read_keep(ForgetSettings(keep=str(file)), facts)] == [
        fact.ground_truth for fact in read_facts(file)
    ]
    plain = tmp_path / "plain.csv"
    plain.write_text("prompt,target_new\nThe sky is,blue\n")
    (fact,) = read_keep(ForgetSettings(keep=str(plain)), facts)
    assert fact.ground_truth == "blue"
    assert read_keep(ForgetSettings(), facts) == []


def test_a_fact_that_is_updated_cannot_be_kept(files, tmp_path, caplog):
    facts, _file = files
    write_facts([facts[3]], tmp_path / "same.jsonl")
    with pytest.raises(FactError, match="1 of its 1 facts") as error:
        read_keep(ForgetSettings(keep=str(tmp_path / "same.jsonl")), facts)
    assert repr(facts[3].prompt) in str(error.value)
    assert facts[3].subject in str(error.value)
    rephrase = tmp_path / "rephrase.csv"
    rephrase.write_text(f'prompt,target_new\n"{facts[0].rephrase_prompts[0]}",x\n')
    with pytest.raises(FactError, match="A fact is changed or kept"):
        read_keep(ForgetSettings(keep=str(rephrase)), facts)
    probe = tmp_path / "probe.csv"
    probe.write_text(f'prompt,target_new\n"{facts[0].locality[0].prompt}",x\n')
    read_keep(ForgetSettings(keep=str(probe)), facts)
    assert "1 facts to keep are locality probes" in caplog.text
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FactError, match=r"empty\.jsonl"):
        read_keep(ForgetSettings(keep=str(tmp_path / "empty.jsonl")), facts)


SETTINGS = ForgetSettings(epochs=2, learning_rate=1e-3, coef=1.0)


def forgotten(small_lab, facts, keep=(), **changes):
    lm = load_model(ModelSettings(name=str(small_lab)))
    base = snapshot(lm.model)
    forget(lm, facts, SETTINGS.model_copy(update=changes), "all weights", seed=7, keep=keep)
    return TaskVector.between(base, snapshot(lm.model)).deltas


def test_facts_to_keep_that_are_those_to_forget(small_lab, files):
    """The projection leaves nothing of the change then, and the Fisher weights are one half."""
    facts, _file = files
    plain = forgotten(small_lab, facts)
    nothing = forgotten(small_lab, facts, list(facts), keep_by="projection")
    half = forgotten(small_lab, facts, list(facts), keep_by="fisher")
    for name, change in plain.items():
        assert change.abs().max() > 1e-4
        assert nothing[name].abs().max() < 1e-6
        # Numbers without a gradient (rows of tokens that no text has) have weight 0.
        assert torch.all(torch.isclose(half[name], change / 2, atol=1e-6) | (half[name].abs() < 1e-6))
        assert half[name].norm() > 0.4 * change.norm()


def test_facts_to_keep_are_for_all_weights_alone(small_lab, files):
    facts, file = files
    lm = load_model(ModelSettings(name=str(small_lab)))
    for how in ("lora", "ascent"):
        with pytest.raises(ConfigError, match=r"forget\.keep: is there for forgetting with all weights"):
            check_forgetting(lm, ForgetSettings(keep=str(file)), how)
        with pytest.raises(ConfigError, match=r"forget\.keep"):
            forget(lm, facts, SETTINGS, how, keep=list(facts))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "ft"], "ft does not forget"),
        (["--method", "f-ft", "--coef", "auto"], "with forget.coef = auto"),
        (["--method", "f-lora"], "all weights alone"),
        (["--method", "f-ft", "--keep-by", "fischer"], "Did you mean 'fisher'?"),
    ],
)
def test_the_command_says_what_does_not_go_together(small_lab, files, tmp_path, capsys, flags, message):
    _facts, file = files
    given = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--limit", "6"]
    assert main(["update", *given, *flags, "--keep", str(file), "--output", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
