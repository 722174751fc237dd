import copy
from fnmatch import fnmatch

import pytest
import torch
from peft import PeftModel

from adapter_vectors import as_vector
from forgetlearn.config.methods import METHODS, PAPER_METHODS
from forgetlearn.config.schema import EditSettings, ForgetSettings, LoraSettings, ModelSettings, StageSettings
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.evaluation.scoring import score, summarise
from forgetlearn.facts import make_fact, read_facts
from forgetlearn.method.checks import check_forgetting, check_learning
from forgetlearn.method.core import forget, learn
from forgetlearn.method.kinds import STAGE_KINDS, StageKind
from forgetlearn.models import lora
from forgetlearn.models.language_model import editable_module, load_model, wrap
from forgetlearn.models.modules import factors_of, groups
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import TaskVector, snapshot, subtract

# A rank above the lab's width would make training chaotic.
SMALL = LoraSettings(r=8, lora_alpha=16)
FORGET = ForgetSettings(epochs=3, learning_rate=1e-3, coef=0.5, lora=SMALL)
LEARN = StageSettings(epochs=3, learning_rate=1e-3, lora=SMALL, edit=EditSettings(steps=3, contexts=1))


@pytest.fixture
def world(small_lab):
    """A fresh copy of the lab base and its facts."""
    return load_model(ModelSettings(name=str(small_lab))), read_facts(small_lab / "facts.jsonl")


def step_by_step(lm, facts, method, coef=0.5):
    how = METHODS[method]
    if how.forgets:
        forget(lm, facts, FORGET.model_copy(update={"coef": coef}), how.forgets, seed=7)
    if how.learns:
        learn(lm, facts, LEARN, how.learns, seed=3)
    return lm


def logits(lm):
    with torch.no_grad():
        return lm.model(torch.arange(20)[None]).logits


def test_the_methods_are_those_of_the_paper():
    assert {name: (METHODS[name].forgets, METHODS[name].learns) for name in PAPER_METHODS} == {
        "ft": (None, "all weights"),
        "lora": (None, "lora"),
        "f-ft": ("all weights", "all weights"),
        "f-lora": ("lora", "lora"),
        "f-lora-ft": ("lora", "all weights"),
    }


def test_forgetting_all_weights_is_base_minus_coef_times_what_fine_tuning_added(world):
    lm, facts = world
    base = snapshot(lm.model)
    tuned = copy.deepcopy(lm)
    forget(tuned, facts, FORGET.model_copy(update={"coef": 0.0}), "all weights", seed=7)
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(tuned.model).items())
    forget(lm, facts, FORGET, "all weights", seed=7)
    half = TaskVector.between(base, snapshot(lm.model))
    forget(tuned, facts, FORGET.model_copy(update={"coef": 1.0}), "all weights", seed=7)
    whole = TaskVector.between(base, snapshot(tuned.model))
    assert half.norm() > 0
    for name, delta in half.deltas.items():
        assert torch.allclose(2 * delta, whole.deltas[name], atol=1e-6)


def test_the_sign_is_forgetting_not_learning(world):
    """Forgetting lowers the old answers' likelihood; reinforcing (a wrong sign) would raise it."""
    lm, facts = world

    def old_logprob():
        from forgetlearn.evaluation.scorer import Scorer

        read = Scorer(lm).read((fact.prompt, fact.ground_truth) for fact in facts)
        return sum(reading.logprob for reading in read.values())

    before = old_logprob()
    strong = FORGET.model_copy(update={"coef": 3.0, "epochs": 10})
    for how in ("lora", "all weights"):
        lm.model = load_model(ModelSettings(name=lm.name)).model
        forget(lm, facts, strong, how, seed=7)
        assert old_logprob() < 2 * before - 0.1, how


def test_forgetting_with_lora_leaves_the_base_and_folds_the_coefficient_in(world):
    lm, facts = world
    base = snapshot(lm.model)
    forget(lm, facts, FORGET, "lora", seed=7)
    half = as_vector(lm.model, lora.FORGET)
    plain = lora.detach(lm.model)
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(plain).items())
    lm.model = plain
    forget(lm, facts, FORGET.model_copy(update={"coef": 1.0}), "lora", seed=7)
    whole = as_vector(lm.model, lora.FORGET)
    assert whole.norm() > 0
    assert all(torch.allclose(2 * delta, whole.deltas[name], atol=1e-6) for name, delta in half.deltas.items())


def test_forgetting_is_the_same_arithmetic_on_state_dicts(world):
    lm, facts = world
    base = snapshot(lm.model)
    other = copy.deepcopy(lm)
    forget(lm, facts, FORGET, "all weights", seed=7)
    from forgetlearn.training.finetune import finetune

    texts = [other.encoder.encode(fact.prompt, fact.ground_truth, end=True) for fact in facts]
    finetune(other.model, texts, FORGET, seed=7, pad_id=other.pad_id)
    expected = subtract(base, snapshot(other.model), 0.5)
    assert all(torch.equal(expected[name], weight) for name, weight in snapshot(lm.model).items())


def test_forgetting_is_the_same_to_the_bit_where_the_base_lies_on_the_disk(world, tmp_path, monkeypatch):
    lm, facts = world
    other = copy.deepcopy(lm)
    forget(lm, facts, FORGET, "all weights", seed=7)
    monkeypatch.setattr("forgetlearn.weights.task_vector.SMALL_BYTES", 0)
    monkeypatch.setattr("forgetlearn.weights.task_vector.snapshot", None)  # so that no copy in memory is made
    forget(other, facts, FORGET, "all weights", seed=7, stage_io=StageIO(points=tmp_path))
    monkeypatch.undo()
    assert all(torch.equal(weight, snapshot(lm.model)[name]) for name, weight in snapshot(other.model).items())
    assert list(tmp_path.iterdir()) == []


def test_f_loras_product_on_the_base_gives_the_logits_of_the_model_that_was_scored(world, tmp_path):
    lm, facts = world
    step_by_step(lm, facts, "f-lora")
    lora.save(lm.model, lora.PRODUCT, tmp_path / "adapter", lm.name)
    base = load_model(ModelSettings(name=lm.name))
    loaded = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(20)[None]).logits, logits(lm))


def test_f_lora_learns_as_from_the_forgotten_model_merged(world):
    """Learning beside the frozen adapter is learning on the merged forgotten weights."""
    lm, facts = world
    merged = copy.deepcopy(lm)
    step_by_step(lm, facts, "f-lora")
    forget(merged, facts, FORGET, "lora", seed=7)
    from forgetlearn.method.kinds import fold_in

    fold_in(merged, lora.FORGET)
    learn(merged, facts, LEARN, "lora", seed=3)
    assert torch.allclose(logits(lm), logits(merged), atol=2e-3)
    assert not torch.allclose(logits(lm), logits(load_with(lm)), atol=1e-1)


def load_with(lm):
    return load_model(ModelSettings(name=lm.name))


def test_f_lora_ft_learns_all_weights_from_the_forgotten_ones(world):
    lm, facts = world
    base = snapshot(lm.model)
    step_by_step(lm, facts, "f-lora-ft")
    assert not hasattr(lm.model, "peft_config")
    now = snapshot(lm.model)
    assert all(not torch.equal(base[name], now[name]) for name in base)
    plain = step_by_step(load_with(lm), facts, "ft")
    assert any(not torch.equal(now[name], weight) for name, weight in snapshot(plain.model).items())


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_repeats_to_the_bit(world, method):
    lm, facts = world
    again = copy.deepcopy(lm)
    step_by_step(lm, facts, method)
    step_by_step(again, facts, method)
    assert torch.equal(logits(lm), logits(again))


def test_enough_learning_is_complete(world):
    lm, facts = world
    learn(lm, facts, StageSettings(epochs=60, learning_rate=2e-3), "all weights", seed=0)
    summary = summarise(score(lm, facts, phase="updated"))
    assert summary["reliability"]["generate"].mean == 100
    assert summary["residue"]["generate"].mean < 60


@pytest.mark.parametrize("how", ["lora", "all weights"])
def test_a_bf16_base_is_trained_in_float32_and_rounded_once_at_the_end(small_lab, how):
    lm = load_model(ModelSettings(name=str(small_lab), dtype="bfloat16"))
    facts = read_facts(small_lab / "facts.jsonl")
    forget(lm, facts, FORGET, how, seed=7)
    trained = [weight for weight in lm.model.parameters() if how == "all weights" or weight.requires_grad]
    assert all(weight.dtype == torch.float32 for weight in trained)
    if how == "all weights":
        forgotten = snapshot(lm.model)
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in forgotten.values())
    learn(lm, facts, LEARN, "all weights", seed=3)
    assert {weight.dtype for weight in lm.model.parameters()} == {torch.bfloat16}


def test_facts_without_an_old_answer_have_nothing_to_forget(small_lab):  # case 14
    lm = load_model(ModelSettings(name=str(small_lab)))
    facts = list(read_facts(small_lab / "facts.jsonl"))[:2]
    without = make_fact("Who?", "Ann")
    alone = forget(lm, facts, FORGET, "lora", seed=7)
    lm = load_model(ModelSettings(name=str(small_lab)))
    assert forget(lm, [*facts, without], FORGET, "lora", seed=7).steps == alone.steps
    with pytest.raises(FactError, match="old answer"):
        forget(lm, [without], FORGET, "lora")


def test_gpt2_and_tied_models_go_through_every_method(tiny_model, char_tokenizer):
    facts = [make_fact(f"Who {index}?", "Ann", subject="Who", ground_truth="Bob") for index in range(4)]
    for model in (tiny_model("gpt2", tied=True), tiny_model("llama", tied=True)):
        for method in METHODS:
            lm = step_by_step(wrap(copy.deepcopy(model), char_tokenizer), facts, method)
            assert torch.isfinite(logits(lm)).all()
            head = lm.model.get_output_embeddings().weight
            assert head is lm.model.get_input_embeddings().weight


def changed(before, after):
    return {name for name, weight in after.items() if not torch.equal(before[name], weight)}


def test_locft_trains_one_module_and_nothing_else(world):
    lm, facts = world
    base = snapshot(lm.model)
    step_by_step(lm, facts, "locft")
    assert changed(base, snapshot(lm.model)) == {"model.layers.1.mlp.down_proj.weight"}  # int(0.7 * 2)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("llama", "model.layers.7.mlp.down_proj"),
        ("gpt2", "transformer.h.7.mlp.c_proj"),
        ("opt", "model.decoder.layers.7.fc2"),
    ],
)
def test_the_one_module_is_told_from_the_structure(tiny_model, family, module):
    n_layers = {"n_layer": 10} if family == "gpt2" else {"num_hidden_layers": 10}
    assert editable_module(tiny_model(family, **n_layers)) == module


def test_ft_c_stays_in_its_ball_and_reaches_its_edge(world):
    lm, facts = world
    base = snapshot(lm.model)
    learn(lm, facts, LEARN.model_copy(update={"max_change": 1e-3}), "bounded", seed=3)
    most = max(float((weight - base[name]).abs().max()) for name, weight in snapshot(lm.model).items())
    assert 0.99e-3 < most <= 1e-3 * 1.001


@pytest.mark.parametrize("modules", ["layers.1", "*.layers.1.mlp.down_proj.weight"])
def test_ft_c_of_one_layer_moves_nothing_else(world, modules):
    """As the paper has it: one layer, one fact a step, within the ball."""
    lm, facts = world
    base = snapshot(lm.model)
    settings = LEARN.model_copy(update={"max_change": 1e-3, "modules": modules, "batch_size": 1, "epochs": 5})
    stage_log = learn(lm, facts, settings, "bounded", seed=3)
    assert len(stage_log.steps) == 5 * len(facts)
    moved = changed(base, snapshot(lm.model))
    assert moved == {name for name in base if fnmatch(name, modules if "*" in modules else f"*.{modules}.*")}
    assert all(float((weight - base[name]).abs().max()) <= 1e-3 * 1.001 for name, weight in snapshot(lm.model).items())


def test_ga_climbs_the_loss_of_the_old_answers_and_harder_with_its_coefficient(world):
    lm, facts = world
    losses = []
    for coef in (0.1, 1.0):
        lm.model = load_with(lm).model
        log = forget(lm, facts, FORGET.model_copy(update={"coef": coef}), "ascent", seed=7)
        losses.append(log.final_loss)
    assert log.steps[-1]["loss"] < log.steps[0]["loss"] < 0  # logged with its sign: ever more negative
    assert losses[1] < losses[0]


def test_only_the_named_modules_change_each_by_its_factor(world):
    lm, facts = world
    base, whole = snapshot(lm.model), copy.deepcopy(lm)
    forget(whole, facts, FORGET, "all weights", seed=7)
    modules = {"mlp@layers.0": 2.0, "attention": 1.0}
    forget(lm, facts, FORGET.model_copy(update={"modules": modules}), "all weights", seed=7)
    for name, weight in snapshot(lm.model).items():
        change, all_of_it = weight - base[name], snapshot(whole.model)[name] - base[name]
        factor = 2 if "layers.0.mlp" in name else 1 if "attn" in name else 0
        assert torch.allclose(change, factor * all_of_it, atol=1e-6), name
        assert factor or torch.equal(weight, base[name])


@pytest.mark.parametrize("rows", ["answers", "facts"])
def test_of_the_vocabulary_only_the_rows_that_are_asked_for_forget(world, rows):
    lm, facts = world
    base, whole = snapshot(lm.model), copy.deepcopy(lm)
    forget(whole, facts, FORGET, "all weights", seed=7)
    forget(lm, facts, FORGET.model_copy(update={"rows": rows}), "all weights", seed=7)
    texts = [lm.encoder.encode(fact.prompt, fact.ground_truth, end=rows == "facts") for fact in facts]
    tokens = {token for text in texts for token in (text.ids if rows == "facts" else text.answer_ids)}
    vocabulary = set(groups(lm.model)["vocabulary"])
    for name, weight in snapshot(lm.model).items():
        forgotten = snapshot(whole.model)[name]
        changes = [name not in vocabulary or token in tokens for token in range(len(weight))]
        for row, old, new, changed in zip(weight, base[name], forgotten, changes, strict=True):
            assert torch.equal(row, new if changed else old), name
    assert vocabulary
    assert 0 < len(tokens) < len(base[next(iter(vocabulary))])


def test_only_the_named_modules_of_an_adapter_forget(world):
    lm, facts = world
    forget(lm, facts, FORGET.model_copy(update={"modules": ("attention",)}), "lora", seed=7)
    changed = {name for name, delta in as_vector(lm.model, lora.FORGET).deltas.items() if delta.any()}
    assert changed
    assert all("self_attn" in name for name in changed)


def test_matrices_that_the_adapter_leaves_out_are_named(world, caplog):
    for modules, told in (
        ("layers.0", ""),
        (("mlp", "embeddings"), "leaves out 1 of its matrices, which stay: model"),
    ):
        whole = SMALL.model_copy(update={"layers": 1.0})
        check_forgetting(world[0], FORGET.model_copy(update={"modules": modules, "lora": whole}), "lora")
        assert told in caplog.text if told else not caplog.text


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"modules": "embeddings"}, "lora", r"forget\.modules = 'embeddings'.*model\.layers"),
        ({"modules": "nothing*"}, "all weights", r"forget\.modules: 'nothing"),
        ({"rows": "answers"}, "lora", r"forget\.rows"),
        ({"rows": "answers", "modules": "mlp"}, "all weights", r"forget\.modules = 'mlp'"),
        ({"modules": "mlp"}, "ascent", r"forget\.modules"),
    ],
)
def test_forgetting_that_cannot_be_done(world, changes, how, message):
    with pytest.raises(ConfigError, match=message):
        check_forgetting(world[0], FORGET.model_copy(update=changes), how)


def test_only_the_named_modules_learn(world):
    lm, facts = world
    base = snapshot(lm.model)
    learn(lm, facts, LEARN.model_copy(update={"modules": ("mlp", "attention@layers.0")}), "all weights", seed=3)
    changed = {name for name, weight in snapshot(lm.model).items() if not torch.equal(weight, base[name])}
    assert changed == set(factors_of(lm.model, ("mlp", "attention@layers.0")))


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_vocabulary_only_the_rows_of_the_facts_learn(tiny_model, char_tokenizer, tied):
    """Tokens are characters: those that no prompt and no answer has stay, to the bit, in both matrices."""
    lm = wrap(tiny_model("llama", tied=tied), char_tokenizer)
    facts = [make_fact("abc", "d", ground_truth="e")]
    base = snapshot(lm.model)
    learn(lm, facts, LEARN.model_copy(update={"rows": "facts"}), "all weights", seed=3)
    told = {*lm.encoder.encode("abc", "d", end=True).ids, *lm.encoder.encode("abc", "e", end=True).ids}
    vocabulary = groups(lm.model)["vocabulary"]
    assert len(vocabulary) == (1 if tied else 2)
    for name in vocabulary:
        moved = (lm.model.state_dict()[name] != base[name]).any(-1)
        assert not moved[[token for token in range(len(moved)) if token not in told]].any(), name
    head = lm.model.get_output_embeddings().weight != base[groups(lm.model)["head"][0]]
    assert head.any(-1)[sorted(told)].all()  # the old answer's too, though no text of learning has it
    assert not lm.model.get_output_embeddings().weight._backward_hooks


def test_the_bias_of_a_head_goes_with_its_rows(tiny_model, char_tokenizer):
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)  # as Phi and GPT-J have it
    lm, facts = wrap(model, char_tokenizer), [make_fact("abc", "d", ground_truth="e")]
    told = sorted({*lm.encoder.encode("abc", "d", end=True).ids, *lm.encoder.encode("abc", "e", end=True).ids})
    base = snapshot(lm.model)
    forget(lm, facts, FORGET.model_copy(update={"rows": "facts"}), "all weights", seed=7)
    learn(lm, facts, LEARN.model_copy(update={"rows": "facts"}), "all weights", seed=3)
    moved = snapshot(lm.model)["lm_head.bias"] != base["lm_head.bias"]
    assert moved.nonzero().flatten().tolist() == told


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"modules": "nothing"}, "all weights", "learn.modules: 'nothing'"),
        ({"modules": {"mlp": 2.0}}, "all weights", "learn.modules"),
        ({"modules": "mlp"}, "lora", r"learn\.modules"),
        ({"rows": "answers"}, "all weights", "learn.rows = answers"),
        ({"rows": "facts"}, "lora", "learn.rows = facts"),
        ({"rows": "facts", "modules": "mlp"}, "all weights", "learn.modules = 'mlp'"),
        ({"rows": "facts", "weight_decay": 0.1}, "bounded", "train.weight_decay"),
        ({"rows": "facts", "deepspeed": "zero.json"}, "all weights", "DeepSpeed"),
    ],
)
def test_learning_that_cannot_be_done(world, changes, how, message):
    with pytest.raises(ConfigError, match=message):
        check_learning(world[0], LEARN.model_copy(update=changes), how)
    if "rows" in changes and "deepspeed" not in changes:
        with pytest.raises(ConfigError, match=message):
            learn(*world, LEARN.model_copy(update=changes), how)


def test_a_kind_of_stage_may_edit_in_closed_form(lm, monkeypatch):
    class Edit(StageKind):
        """Double the last projection of the last MLP."""

        def fit(self, lm, lessons, settings, seed, stage_io):
            assert lessons.of_facts == [[("q", "new", "")]]
            lm.model.model.layers[-1].mlp.down_proj.weight.data.mul_(2)
            return StageLog(())

    monkeypatch.setitem(STAGE_KINDS, "edit", Edit())
    base = snapshot(lm.model)
    log = learn(lm, [make_fact("q", "new")], StageSettings(), "edit")
    moved = {name: weight for name, weight in snapshot(lm.model).items() if not torch.equal(weight, base[name])}
    (name,) = moved
    assert torch.equal(moved[name], 2 * base[name])
    assert (log.steps, log.final_loss) == ((), None)
