"""ROME, MEMIT and AlphaEdit: the formulas by hand, the subject's last token, second moments, and what is refused."""

import signal

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import QUICK
from forgetlearn import update
from forgetlearn.config.schema import StageSettings, load_config
from forgetlearn.errors import ConfigError, FactError, ModelError
from forgetlearn.facts import Fact, make_fact, write_facts
from forgetlearn.facts.subjects import subject_span
from forgetlearn.method import moments, targets
from forgetlearn.method.core import learn
from forgetlearn.method.reading import at_last_token, hooked
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.language_model import wrap
from forgetlearn.models.modules import mlp_output
from forgetlearn.runtime import signals
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import TaskVector

FACTS = [
    make_fact("The capital of Kelda is", "Oslo", subject="Kelda"),
    make_fact("Who leads Mirona?", "Ann", subject="Mirona"),
    make_fact("Where is Tarn?", "Peru", subject="Tarn"),
]
FEW = {"edit": {"moment_tokens": 300}, "rome": {"layer": 0}, "memit": {"layers": [0]}}
KINDS = ("rome", "memit", "alphaedit")


def settings(**changes):
    return StageSettings.model_validate(
        {name: {**FEW.get(name, {}), **changes.get(name, {})} for name in {**FEW, **changes}}
    )


@pytest.fixture
def chosen_values(monkeypatch):
    """Take these changes of the output, instead of optimising them."""
    deltas = torch.randn(len(FACTS), 32, generator=torch.Generator().manual_seed(0))

    def together(_self, wanted):
        numbers = [FACTS.index(request.fact) for request in wanted]
        return targets.Found(deltas[numbers], torch.zeros(len(wanted)))

    monkeypatch.setattr(targets.Search, "together", together)
    return deltas


def output_at_subjects(lm, path, facts=FACTS):
    ids = [request.bare.up_to_subject for request in targets.requests(lm.encoder, facts, [])]
    return at_last_token(lm, ids, [path])[path]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen2", "gemma2", "mamba"])
def test_rome_writes_exactly_the_value_for_the_subjects_key(family, tiny_model, char_tokenizer, chosen_values):
    lm = wrap(tiny_model(family), char_tokenizer)
    path = mlp_output(lm.model, 0)
    before = output_at_subjects(lm, path, FACTS[:1])[1]

    learn(lm, FACTS[:1], settings(), "rome")

    torch.testing.assert_close(output_at_subjects(lm, path, FACTS[:1])[1], before + chosen_values[:1])


def test_rome_writes_one_fact_after_the_other_and_leaves_what_is_orthogonal(lm, chosen_values):
    path, own = mlp_output(lm.model, 0), settings(edit={"contexts": 0})
    weight = lm.model.get_submodule(path).weight.detach().double().clone()
    second = moments.second_moments(lm, [path], own.edit, 0).of[path]
    expected = weight.clone()
    for key, delta in zip(output_at_subjects(lm, path)[0].double(), chosen_values.double(), strict=True):
        direction = torch.linalg.inv(second) @ key
        expected += torch.outer(delta, direction) / (direction @ key)

    learn(lm, FACTS, own, "rome")

    torch.testing.assert_close(lm.model.get_submodule(path).weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_memit_follows_its_equation(lm, chosen_values):
    path, own = mlp_output(lm.model, 0), settings(memit={"moment_weight": 0.5}, edit={"contexts": 0})
    weight = lm.model.get_submodule(path).weight.detach().double().clone()
    second = moments.second_moments(lm, [path], own.edit, 0).of[path]
    keys = output_at_subjects(lm, path)[0].double().T  # (I, N), as in the paper

    learn(lm, FACTS, own, "memit")

    expected = weight + chosen_values.double().T @ keys.T @ torch.linalg.inv(0.5 * second + keys @ keys.T)
    torch.testing.assert_close(lm.model.get_submodule(path).weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_memit_over_several_layers_reaches_the_value_at_the_last(lm, chosen_values):
    before = output_at_subjects(lm, "model.layers.1")[1]

    learn(lm, FACTS, settings(memit={"layers": [0, 1], "moment_weight": 1e-9}, edit={"contexts": 0}), "memit")

    after = output_at_subjects(lm, "model.layers.1")[1]
    torch.testing.assert_close(after, before + chosen_values, rtol=1e-3, atol=1e-3)


def test_alphaedit_follows_its_equation_in_the_null_space(lm, chosen_values):
    own = settings(alphaedit={"null_space_threshold": 0.02, "l2": 0.5}, edit={"contexts": 0})
    path = mlp_output(lm.model, 0)
    weight = lm.model.get_submodule(path).weight.detach().double().clone()
    second = moments.second_moments(lm, [path], own.edit, 0).of[path]
    keys = output_at_subjects(lm, path)[0].double().T
    energies, directions = torch.linalg.eigh(second)
    rest = directions[:, energies < 0.02]
    projection = rest @ rest.T

    learn(lm, FACTS, own, "alphaedit")

    found = chosen_values.double().T @ keys.T @ projection
    expected = found @ torch.linalg.inv(keys @ keys.T @ projection + 0.5 * torch.eye(len(second)))
    change = lm.model.get_submodule(path).weight.double() - weight
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-4)
    assert 0 < rest.shape[1] < len(second)
    assert (change @ directions[:, energies >= 0.02]).norm() < 1e-3 * change.norm()
    with pytest.raises(ConfigError, match=r"alphaedit\.null_space_threshold"):
        learn(lm, FACTS, settings(alphaedit={"null_space_threshold": 1e-12}), "alphaedit")


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_memit_edits_the_last_layer_alone_where_the_layer_changes_what_its_mlp_gives(
    family, tiny_model, char_tokenizer, chosen_values
):
    options = {"residual_multiplier": 0.5} if family == "granite" else {}
    lm = wrap(tiny_model(family, num_hidden_layers=3, **options), char_tokenizer)
    path = mlp_output(lm.model, 1)
    first = lm.model.get_submodule(mlp_output(lm.model, 0)).weight.detach().clone()
    before = output_at_subjects(lm, path)[1]

    learn(lm, FACTS, settings(memit={"layers": [0, 1], "moment_weight": 1e-9}, edit={"contexts": 0}), "memit")

    torch.testing.assert_close(output_at_subjects(lm, path)[1], before + chosen_values, rtol=1e-2, atol=1e-2)
    assert torch.equal(lm.model.get_submodule(mlp_output(lm.model, 0)).weight, first)


@pytest.mark.parametrize(("kl_factor", "clamp"), [(1e4, 9.0), (3.0, 0.3)])
def test_the_search_takes_the_steps_of_the_authors_code(lm, kl_factor, clamp):
    """One fact, written out: whole texts, Adam, KL(now || before) after the essence, decay, and the clamp."""
    lm.model.requires_grad_(False)
    own = settings(edit={"steps": 4, "learning_rate": 0.5, "kl_factor": kl_factor, "weight_decay": 2.0}).edit
    path = mlp_output(lm.model, 0)
    (request,) = targets.requests(lm.encoder, FACTS[:1], ["The end"])

    def logits(text, delta):
        def push(_module, _read, out):
            place = torch.zeros(1, out.shape[1], 1)
            place[0, text.place] = 1
            return out + place * delta

        with hooked(lm.model, {path: push}):
            return lm.model(torch.tensor([text.text.ids])).logits[0].log_softmax(-1)

    def losses(delta):
        def answer(text):
            return -logits(text, delta)[list(text.text.answer_positions), list(text.text.answer_ids)].mean()

        now, before = (logits(request.essence, each)[-2] for each in (delta, torch.zeros(32)))
        said = torch.stack([answer(text) for text in request.trained]).mean()
        return said, said + kl_factor * (now.exp() * (now - before)).sum() + 2.0 * delta.norm() / length**2

    length = output_at_subjects(lm, path, FACTS[:1])[1].norm()
    delta = torch.zeros(32, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=own.learning_rate)
    for _step in range(3):
        adam.zero_grad()
        losses(delta)[1].backward()
        adam.step()
        with torch.no_grad():
            delta.mul_(min(1, clamp * length / delta.norm()))

    found = targets.Search(lm, path, own, clamp).together([request])

    torch.testing.assert_close(found.deltas[0], delta.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.losses[0], losses(delta)[0].detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_facts_are_optimised_as_if_each_were_alone(family, tiny_model, char_tokenizer):
    lm = wrap(tiny_model(family), char_tokenizer)
    lm.model.requires_grad_(False)
    path, own = mlp_output(lm.model, 0), settings(edit={"steps": 4}).edit
    wanted = targets.requests(lm.encoder, FACTS, ["The end", "I am"])

    together = targets.Search(lm, path, own, 4.0).together(wanted)

    alone = torch.cat([targets.Search(lm, path, own, 4.0).together([request]).deltas for request in wanted])
    torch.testing.assert_close(together.deltas, alone, rtol=1e-3, atol=1e-3)
    untouched = targets.Search(lm, path, own.model_copy(update={"steps": 1}), 4.0).together(wanted)
    assert (together.losses < untouched.losses).all()


def test_what_stands_before_the_subject_is_computed_once_without_a_difference(lm, monkeypatch):
    lm.model.requires_grad_(False)
    path, own = mlp_output(lm.model, 0), settings(edit={"steps": 4}).edit
    wanted = targets.requests(lm.encoder, FACTS, ["The end"])
    search = targets.Search(lm, path, own, 4.0)
    continued = search.together(wanted)

    monkeypatch.setattr(targets, "plain_cache", lambda _output: None)
    whole = targets.Search(lm, path, own, 4.0).together(wanted)

    assert search.continues
    torch.testing.assert_close(continued.deltas, whole.deltas, rtol=1e-3, atol=1e-3)


def test_the_subject_is_found_as_whole_words_or_from_a_rephrasing():
    def end(prompt, subject="", rephrased=()):
        return prompt[: subject_span(make_fact(prompt, "x", subject=subject, rephrase_prompts=rephrased))[1]]

    assert end("Is Annabel or Ann there?", "Ann") == "Is Annabel or Ann"
    assert end("Who leads MIRONA now?", "Mirona") == "Who leads MIRONA"
    assert end("What university did Watts Humphrey attend?", "", ["Where did Watts Humphrey study?"]).endswith(
        "Humphrey"
    )
    assert end("Which family are Ramalinaceae in?", "Ramalina", ["The family of Ramalinaceae"]).endswith("Ramalinaceae")


def test_a_subject_is_found_in_scripts_without_spaces_and_past_longer_shared_runs():
    fact = make_fact("東京はどの国の首都ですか", "x", subject="東京")
    assert subject_span(fact) == (0, 2)
    prompt, other = "What is the name of the river in Paris?", "In Paris, what is the name of the river?"
    start, end = subject_span(make_fact(prompt, "x", rephrase_prompts=[other]))
    assert prompt[start:end] == "in Paris"


@pytest.mark.parametrize("text", ["4-6", "4,5,6", "4-5, 6", [4, 5, 6]])
def test_layers_are_given_as_spans_or_lists(text):
    assert load_config(None, {"memit.layers": text}).memit.layers == (4, 5, 6)


@pytest.mark.parametrize("text", ["6-4", "-1", "x", "", [], [-1], True])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"memit\.layers"):
        load_config(None, {"memit.layers": text})


def test_the_last_token_of_the_subject_is_found_in_every_form(lm, tiny_model, new_char_tokenizer):
    template = "{% for m in messages %}[AI {{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[AI]"
    chat = wrap(tiny_model(), new_char_tokenizer(chat_template=template))
    for own in (lm, chat):
        prompt = "Does an AI like Ann?"
        place = own.encoder.place_of(prompt, prompt.index("AI") + 2)
        ids = own.encoder.prompt_ids(prompt)
        assert own.encoder.decode(ids[: place + 1]).endswith("Does an AI")


def test_a_token_that_joins_the_subject_to_what_follows_is_its_last():
    vocabulary = {"</s>": 0, **{letter: index for index, letter in enumerate(" AIinst?", 1)}, "n?": 9}
    merging = Tokenizer(models.BPE(vocabulary, [("n", "?")]))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>"))
    assert encoder.prompt_ids("Is it Ann?") == [vocabulary[part] for part in [*"Is it An", "n?"]]
    assert encoder.place_of("Is it Ann?", 9) == 8
    assert encoder.place_of("Is it Ann in?", 9) == 8


def test_moments_are_those_of_the_text_and_are_cached(lm, tmp_path, monkeypatch):
    path = mlp_output(lm.model, 0)
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    own = settings(edit={"moments": str(file), "moment_tokens": 200}).edit
    ids = lm.encoder.text_ids(file.read_text(encoding="utf-8"))[:201]  # with BOS
    keys = torch.cat([at_last_token(lm, [ids[: n + 1]], [path])[path][0] for n in range(201)]).double()

    found = moments.second_moments(lm, [path], own, 0).of[path]

    torch.testing.assert_close(found, keys.T @ keys / 201, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(moments, "_moments", lambda *_: {})
    torch.testing.assert_close(moments.second_moments(lm, [path], own, 0).of[path], found)
    with torch.no_grad():
        lm.model.get_submodule(path).weight.add_(1)  # another model
    with pytest.raises(FileNotFoundError):
        moments.second_moments(lm, [path], own, 0)


def test_too_few_tokens_for_the_rank_are_refused(lm, tmp_path):
    file = tmp_path / "short.txt"
    config = {**QUICK, "method": "rome", "edit": {"moments": str(file)}}
    for text, says in ((b"Too short.", "too few"), (b"\xff\xfe", "cannot be read as a text")):
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=rf"edit\.moments.*{says}"):
            update(lm, _written(FACTS, tmp_path), config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_a_long_text_only_the_beginning_is_read(lm, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("ab " * 5000, encoding="utf-8")
    whole = lm.encoder.text_ids(file.read_text(encoding="utf-8"))[len(lm.encoder.text_ids("")) :]
    for n_tokens in (10, 7000, 10**6):
        assert moments._ids_of_file(lm, str(file), n_tokens) == whole[:n_tokens]


def test_what_cannot_be_edited_is_refused_by_name(tmp_path, lm, tiny_model, char_tokenizer):
    experts = wrap(tiny_model("mixtral", num_local_experts=2), char_tokenizer)
    with pytest.raises(ModelError, match="mixtral"):
        update(experts, _written(FACTS, tmp_path), {**QUICK, "method": "rome"}, output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"rome\.layer = 7"):
        update(
            lm, _written(FACTS, tmp_path), {**QUICK, "method": "rome", "rome": {"layer": 7}}, output=tmp_path / "run"
        )
    nameless = [make_fact("who is it?", "Ann"), *FACTS]
    with pytest.raises(FactError, match=r"record 1.*subject"):
        update(lm, _written(nameless, tmp_path), {**QUICK, "method": "memit"}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _written(facts, folder):
    write_facts(facts, folder / "facts.jsonl")
    return folder / "facts.jsonl"


@pytest.mark.parametrize("method", KINDS)
def test_an_update_writes_a_model_that_differs_in_the_edited_matrix_alone(method, lm, tmp_path):
    lm.save(tmp_path / "base")
    config = {**QUICK, **FEW, "method": method}

    done = update(tmp_path / "base", _written(FACTS, tmp_path), config, output=tmp_path / "run")

    change = TaskVector.between(tmp_path / "base", done.product)
    moved = {name for name, weight in change.deltas.items() if weight.abs().max() > 0}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    assert "tokens of text that the model sampled" in (done.output / "report.html").read_text()


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(method, tiny_model, char_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "ROWS_AT_ONCE", 1)  # one fact after the other
    own = settings(edit={"steps": 3, "contexts": 1})
    whole, halves = (wrap(tiny_model(), char_tokenizer) for _ in range(2))
    learn(whole, FACTS, own, method)
    points, together = StageIO(points=tmp_path / "points"), targets.Search.together
    asked: list[Fact] = []

    def noted(search, wanted):
        asked.append(wanted[0].fact)
        if asked == FACTS[:2]:
            signal.raise_signal(signal.SIGTERM)
        return together(search, wanted)

    monkeypatch.setattr(targets.Search, "together", noted)
    with pytest.raises(signals.Interrupted), signals.handled():
        learn(wrap(tiny_model(), char_tokenizer), FACTS, own, method, stage_io=points)
    learn(halves, FACTS, own, method, stage_io=points)

    assert asked == FACTS
    for one, other in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(one, other)
