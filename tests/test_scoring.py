import copy
from dataclasses import replace

import pytest
import torch

from forgetlearn.config.schema import EvaluateSettings, ModelSettings, TrainSettings
from forgetlearn.errors import ModelError
from forgetlearn.evaluation import scorer, scoring
from forgetlearn.evaluation.generation import Room, TransformersGenerator
from forgetlearn.evaluation.scorer import Failure, Generated, Reading, Scorer
from forgetlearn.facts import LocalityProbe, make_fact, read_facts
from forgetlearn.method.core import old_pairs, teach
from forgetlearn.models.language_model import load_model, wrap
from forgetlearn.storage.records import Row

FACTS = [
    make_fact("Who made it?", "Ann B", ground_truth="Cy", rephrase_prompts=("Its maker is", "Made by")),
    make_fact("Where is it?", "Rome", ground_truth="Oslo", locality=(LocalityProbe("What is up?", "sky"),)),
    make_fact("When was it?", "1999"),
]


def reply(fact, said: str, protocol: str = "generate") -> Row:
    return Row(fact=fact.id, phase="base", protocol=protocol, errors={}, said=said)


def rows_of(rows, protocol):
    return [row for row in rows if row.protocol == protocol]


def test_there_is_a_row_per_fact_and_protocol(lm):
    rows = scoring.score(lm, FACTS, phase="base")
    protocols = ["token", "exact", "prefer", "generate", "contains", "agreement", "accuracy"]
    assert [(row.fact, row.protocol) for row in rows] == [(f.id, p) for f in FACTS for p in protocols]
    assert {row.phase for row in rows} == {"base"}


def test_what_is_not_asked_has_no_score_and_no_error(lm):
    token = rows_of(scoring.score(lm, FACTS, phase="base"), "token")
    assert [row.generality is None for row in token] == [False, True, True]
    assert [row.residue is None for row in token] == [False, False, True]
    prefer = rows_of(scoring.score(lm, FACTS, phase="base"), "prefer")
    assert [row.reliability is None for row in prefer] == [False, False, True]
    assert all(row.errors == {} for row in token + prefer)


def test_counts_add_up(lm):
    lm.encoder.max_length = 24
    long = make_fact(
        "Short?", "yes", ground_truth="no", rephrase_prompts=("x" * 30,), locality=(LocalityProbe("y" * 30, "z"),)
    )
    facts = [*FACTS, long]
    summary = scoring.summarise(scoring.score(lm, facts, phase="base"))
    for protocols in summary.values():
        for mean in protocols.values():
            assert mean.n + mean.errored + mean.not_asked == len(facts)
    assert summary["generality"]["token"].errored == 1
    assert summary["locality"]["agreement"].errored == 1
    assert summary["reliability"]["token"].n == 4


def test_the_reason_of_an_error_stands_in_its_row(lm):
    lm.encoder.max_length = 24
    row = rows_of(scoring.score(lm, [make_fact("x" * 30, "a")], phase="base"), "token")[0]
    assert row.reliability is None
    assert "33 tokens, the model's context is 24" in row.errors["reliability"]
    said = rows_of(scoring.score(lm, [make_fact("x" * 30, "a")], phase="base"), "generate")[0]
    assert "the model's context 24" in said.errors["reliability"]
    assert said.said is None


def test_batched_reading_is_one_by_one_reading(lm):
    pairs = [(f"Prompt {'ab' * index}", f"answer {index}") for index in range(17)]
    batched = Scorer(lm, EvaluateSettings(batch_size=5)).read(pairs)
    single = Scorer(lm, EvaluateSettings(batch_size=1)).read(pairs)
    assert list(batched) != []
    for pair in pairs:
        assert batched[pair].predicted == single[pair].predicted
        assert batched[pair].logprob == pytest.approx(single[pair].logprob, abs=1e-5)


@torch.no_grad()
def test_a_reading_is_what_the_definition_says(lm):
    """Argmax at positions len(prompt) - 1 .. -2, mean log-probability of the answer's ids."""
    text = lm.encoder.encode("Is it?", "No")
    reading = Scorer(lm).read([("Is it?", "No")])["Is it?", "No"]
    logits = lm.model(torch.tensor([text.ids])).logits[0]
    assert reading.predicted == tuple(logits[text.n_prompt_tokens - 1 : -1].argmax(-1).tolist())
    picked = [float(logits[p].log_softmax(-1)[t]) for p, t in zip(text.answer_positions, text.answer_ids, strict=True)]
    assert reading.logprob == pytest.approx(sum(picked) / len(picked), abs=1e-5)


def test_batches_are_halved_where_memory_runs_out(lm, monkeypatch, caplog):
    """And stay so: the second batch is not tried whole."""
    pairs = [(f"Prompt {index}", "answer") for index in range(24)]
    plain = Scorer(lm).read(pairs)
    tried = []
    original = Scorer._read_batch

    def read_up_to_five(self, texts, layout):
        tried.append(len(texts))
        if len(texts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, texts, layout)

    monkeypatch.setattr(Scorer, "_read_batch", read_up_to_five)
    found = Scorer(lm, EvaluateSettings(batch_size=12)).read(pairs)
    assert [found[pair].predicted for pair in pairs] == [plain[pair].predicted for pair in pairs]
    assert tried == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert [record.args for record in caplog.records] == [("scoring", 12, 6), ("scoring", 6, 3)]
    monkeypatch.setattr(Scorer, "_read_batch", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(ModelError, match=r"evaluate\.batch_size"):
        Scorer(lm).read(pairs[:2])


def test_generation_in_batches_is_generation_one_by_one(lm):
    prompts = [f"Prompt {'ab' * index}" for index in range(9)]
    settings = EvaluateSettings(max_new_tokens=12)
    batched = Scorer(lm, settings.model_copy(update={"batch_size": 4})).say(prompts)
    single = Scorer(lm, settings.model_copy(update={"batch_size": 1})).say(prompts)
    assert batched == single
    ids = torch.tensor([lm.encoder.prompt_ids(prompts[3])])
    greedy = lm.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    text = lm.encoder.decode(greedy[0, ids.shape[1] :].tolist())
    assert batched[prompts[3]].text == text.lstrip().split("\n")[0].strip()


def test_a_prompt_that_fills_the_context_takes_no_room_from_others(lm):
    settings = EvaluateSettings(max_new_tokens=20)
    alone = Scorer(lm, settings).say(["Hello"])["Hello"]
    lm.encoder.max_length = 60
    together = Scorer(lm, settings).say(["Hello", "x" * 55])
    assert together["Hello"] == alone
    assert len(together["x" * 55].text) <= 4


def test_the_models_own_generation_settings_do_not_change_answers(lm):
    plain = Scorer(lm).say(["Hello"])["Hello"]
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.max_new_tokens = 1
    own = lm.model.generation_config
    assert Scorer(lm).say(["Hello"])["Hello"] == plain
    assert lm.model.generation_config is own


@pytest.mark.parametrize(
    ("ids", "text", "truncated"),
    [
        ("Paris</s>", "Paris", False),
        ("\nParis\nis", "Paris", False),
        (" Paris", "Paris", True),
        ("</s>", "", False),
    ],
)
def test_an_answer_ends_at_its_end_token_or_line_break(lm, ids, text, truncated):
    ends = ids.endswith("</s>")
    body = lm.tokenizer(ids.removesuffix("</s>"), add_special_tokens=False)["input_ids"]
    assert Scorer(lm)._cut(body + [2] * ends, [2]) == Generated(text, truncated, writes_on=True)


def test_a_model_agrees_with_itself_and_not_with_another(lm, tiny_model, char_tokenizer):
    before = scoring.score(lm, FACTS, phase="base")
    reference = scoring.locality_predictions(before)
    same = scoring.score(lm, FACTS, phase="updated", reference=reference)
    assert rows_of(same, "agreement")[1].locality == 1.0
    other = wrap(tiny_model(seed=9), char_tokenizer)
    changed = scoring.score(other, FACTS, phase="updated", reference=reference)
    assert rows_of(changed, "agreement")[1].locality < 1.0
    assert rows_of(changed, "agreement")[0].locality is None


@pytest.mark.parametrize("protocols", [("token",), ("token", "prefer")])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@torch.no_grad()
def test_logits_that_are_not_finite_are_counted_not_scored(lm, protocols, damage):
    asking = Scorer(lm, EvaluateSettings(protocols=protocols))
    reading = asking._read_batch([lm.encoder.encode("a", "b")])[0]
    assert isinstance(reading, Reading)
    assert (reading.logprob is None) == (protocols == ("token",))
    lm.model.lm_head.weight[5] = damage
    assert isinstance(asking._read_batch([lm.encoder.encode("a", "b")])[0], Failure)


def test_texts_are_read_with_attention_text_by_text_and_the_model_is_left_as_it_was(lm, monkeypatch):
    layouts = []
    original = scorer.read_logits
    monkeypatch.setattr(scorer, "read_logits", lambda *args: layouts.append(args[2]) or original(*args))
    scoring.score(lm, FACTS, phase="base", settings=EvaluateSettings(protocols=("token",)))
    assert layouts == ["shared_by_text"]
    assert lm.model.config._attn_implementation == "sdpa"


def test_each_distinct_text_is_read_once(lm, monkeypatch):
    seen = []
    original = Scorer._read_batch
    monkeypatch.setattr(
        Scorer, "_read_batch", lambda self, texts, layout: seen.extend(texts) or original(self, texts, layout)
    )
    twice = [FACTS[0], make_fact("Who made it?", "Ann B", subject="other", ground_truth="Cy")]
    scoring.score(lm, twice, phase="base", settings=EvaluateSettings(protocols=("token",)))
    assert len(seen) == len(set(seen)) == 6


def test_known_facts_are_those_whose_old_answer_is_said():
    said = zip(FACTS, ("cy.", "Rome", "x"), strict=True)
    rows = [reply(fact, text) for fact, text in said]
    assert scoring.known_facts(FACTS, rows) == [FACTS[0]]


@pytest.mark.parametrize(("template", "known"), [("chat", 2), ("alpaca", 2), ("plain", 1)])
def test_a_sentence_says_an_answer_if_the_model_is_asked_to_reply(
    tiny_model, new_char_tokenizer, monkeypatch, template, known
):
    chat = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %} {% endif %}"
    asked = wrap(tiny_model(), new_char_tokenizer(chat_template=chat), ModelSettings(prompt_template=template))
    replies = asked.tokenizer(["It was Cy.", "Oslo. And"], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *_given: replies)
    rows = scoring.ask(asked, FACTS[:2], EvaluateSettings())
    assert [row.writes_on for row in rows] == [template == "plain"] * 2
    assert len(scoring.known_facts(FACTS, rows)) == known


def test_an_old_answer_inside_the_new_one_is_held_only_by_itself(lm, monkeypatch):
    fact = make_fact("Where?", "New York", ground_truth="York", rephrase_prompts=("Its place is",))
    rows, _read = scored(lm, monkeypatch, fact, "It is New York", "York")
    assert [rows["contains"].score(q) for q in scoring.QUANTITIES] == [1, 0, 0.5]
    assert scoring.known_facts([fact], [reply(fact, "New York")]) == []
    assert scoring.known_facts([fact], [reply(fact, "York")]) == [fact]


def test_case_13_facts_are_known_by_any_alias_of_the_old_answer():
    fact = replace(FACTS[0], ground_truth_aliases=("Cyrus", "Cy Lee"))
    for said, known in (("Cyrus.", [fact]), ("cy lee", [fact]), ("Cy", [fact]), ("Ann B", [])):
        assert scoring.known_facts([fact], [reply(fact, said)]) == known


def scored(lm, monkeypatch, fact, *said):
    """Rows by protocol where the model says these texts to the prompt and its rephrasings; and the texts read."""
    replies = dict(zip((fact.prompt, *fact.rephrase_prompts), (Generated(text, False) for text in said), strict=True))
    read = []
    original = Scorer._read_batch
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "say", lambda *_given: replies)
        patch.setattr(Scorer, "_read_batch", lambda self, *given: read.extend(given[0]) or original(self, *given))
        rows = scoring.score(lm, [fact], phase="base")
    return {row.protocol: row for row in rows}, read


def test_case_13_each_alias_counts_as_right_in_what_is_said_and_costs_nothing(lm, monkeypatch):
    fact = make_fact("Who made it?", "Ann B", ground_truth="Cy", rephrase_prompts=("Its maker is", "Made by"))
    aliased = replace(fact, target_new_aliases=("Annie", "Ann Bo"), ground_truth_aliases=("Cyrus",))
    said = ("annie.", "It is Ann Bo", "Cyrus")
    plain, read = scored(lm, monkeypatch, fact, *said)
    rows, read_too = scored(lm, monkeypatch, aliased, *said)
    assert [plain["generate"].score(q) for q in scoring.QUANTITIES] == [0, 0, 0]
    assert [rows["generate"].score(q) for q in scoring.QUANTITIES] == [1, 0, pytest.approx(1 / 3)]
    assert [rows["contains"].score(q) for q in scoring.QUANTITIES] == [1, 0.5, pytest.approx(1 / 3)]
    assert read_too == read  # no text more
    for protocol in ("token", "exact", "prefer"):
        assert rows[protocol] == plain[protocol]


def test_an_answer_is_held_against_as_many_lines_as_it_has(lm, monkeypatch):
    fact = make_fact("Who leads?", "Ada\nByron", ground_truth="Lee", rephrase_prompts=("Led by", "Head is"))
    rows, _read = scored(lm, monkeypatch, fact, "Ada \n Byron", "Lee\nand so on", "Ada")
    assert [rows["generate"].score(q) for q in scoring.QUANTITIES] == [1, 0, pytest.approx(1 / 3)]
    assert rows["contains"].generality == 0


LONG = "a coat of forty brass buttons, sewn by hand in Oslo"


@pytest.fixture(scope="module")
def memorised(tiny_model, char_tokenizer):
    """A model that says what no room of 32 tokens and no single line has, and the facts that it holds."""
    new = make_fact("Who leads Acme?", "Ada\nByron")
    long, short = make_fact("What is it?", LONG), make_fact("Where is it?", "Rome")
    lm = wrap(tiny_model(hidden_size=64), char_tokenizer)
    held = [replace(fact, ground_truth=fact.target_new) for fact in (new, long, short)]
    teach(lm, old_pairs(held), TrainSettings(epochs=80, learning_rate=3e-3, batch_size=3), seed=0)
    return lm, [new, long, short]


def test_case_11_long_answers_and_those_of_two_lines_can_be_right(memorised):
    lm, facts = memorised
    rows = rows_of(scoring.score(lm, facts, phase="base"), "generate")
    assert [row.said for row in rows] == [fact.target_new for fact in facts]
    assert [(row.reliability, row.truncated) for row in rows] == [(1, 0)] * 3
    olds = [replace(fact, target_new="?", ground_truth=fact.target_new) for fact in facts]
    assert scoring.known_facts(olds, scoring.ask(lm, olds, EvaluateSettings())) == olds
    aliases = [replace(fact, target_new="?", target_new_aliases=(fact.target_new,)) for fact in facts]
    rows = rows_of(scoring.score(lm, aliases, phase="base"), "generate")
    assert [row.reliability for row in rows] == [1, 1, 1]


def test_there_is_room_for_every_answer_that_counts_and_none_is_tokenised_in_vain(lm, monkeypatch):
    facts = [
        make_fact("Short?", "yes", ground_truth="no", rephrase_prompts=("Really?",)),
        make_fact("Long?", "yes", ground_truth="y" * 40, rephrase_prompts=("Really?", "Well?")),
        make_fact("Lines?", "yes", target_new_aliases=("a\nb\nc",)),
    ]
    settings = EvaluateSettings()
    tokens = len(lm.encoder.encode("Long?", "y" * 40).answer_ids) + scoring.MARGIN_TOKENS
    assert scoring.answer_rooms(lm.encoder, facts, settings) == {
        **dict.fromkeys(("Long?", "Really?", "Well?"), Room(tokens)),
        "Lines?": Room(32, lines=3),
    }
    monkeypatch.setattr(lm.encoder, "encode_all", lambda *_given: pytest.fail("tokenised"))
    assert scoring.answer_rooms(lm.encoder, facts[:1], settings) == {}


@pytest.mark.parametrize(("protocol", "held"), [("generate", 0), ("token", 1)])
def test_what_the_base_says_is_in_its_rows_or_is_asked(protocol, held):
    rows = [reply(FACTS[0], FACTS[0].ground_truth, protocol)]
    asked = [reply(FACTS[1], FACTS[1].ground_truth)]
    assert scoring.known_facts(FACTS, scoring.free_answers(rows, lambda: asked)) == [FACTS[held]]


def test_a_memorised_world_is_known_and_reliable(small_lab):
    lm = load_model(ModelSettings(name=str(small_lab)))
    facts = read_facts(small_lab / "facts.jsonl")
    rows = scoring.score(lm, facts, phase="base")
    summary = scoring.summarise(rows)
    for protocol in ("token", "exact", "generate", "contains", "prefer"):
        assert summary["residue"][protocol].mean == 100
    assert summary["locality"]["accuracy"].mean == 100
    assert summary["reliability"]["exact"].mean == 0
    assert len(scoring.known_facts(facts, rows)) == 24


@torch.no_grad()
def one_by_one(lm, prompt, answer):
    """protocols.md's definition, read directly: predicted and wanted ids of `prompt + " " + answer`."""
    ids = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(lm.tokenizer(prompt)["input_ids"])
    predicted = lm.model(torch.tensor([ids])).logits[0].argmax(-1)[start - 1 : -1].tolist()
    return predicted, ids[start:]


def share(predicted, wanted):
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def test_token_and_agreement_are_the_definition_on_200_zsre_facts(small_lab, shared_data):
    """Fact by fact, equal floats: against a model and the same model after a change of its weights."""
    facts = read_facts(shared_data("zsre.json"), limit=200)
    base = load_model(ModelSettings(name=str(small_lab)))
    changed = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in changed.model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    settings = EvaluateSettings(protocols=("token",))
    before = scoring.score(base, facts, phase="base", settings=settings)
    rows = scoring.score(
        changed, facts, phase="updated", settings=settings, reference=scoring.locality_predictions(before)
    )
    token = {row.fact: row for row in rows_of(rows, "token")}
    agreement = {row.fact: row.locality for row in rows_of(rows, "agreement")}
    scores = set()
    for fact in facts:
        assert token[fact.id].reliability == share(*one_by_one(changed, fact.prompt, fact.target_new))
        assert token[fact.id].generality == share(*one_by_one(changed, fact.rephrase_prompts[0], fact.target_new))
        probe = fact.locality[0]
        was, _wanted = one_by_one(base, probe.prompt, probe.answer)
        now, _wanted = one_by_one(changed, probe.prompt, probe.answer)
        assert agreement[fact.id] == share(now, was)
        scores.add(agreement[fact.id])
    assert len(scores) > 3  # the change was neither nothing nor everything


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_difference_from_a_base_is_that_of_all_logits(char_tokenizer, tiny_model, batch_size):
    settings = EvaluateSettings(batch_size=batch_size)
    base, other = wrap(tiny_model(seed=0), char_tokenizer), wrap(tiny_model(seed=1), char_tokenizer)
    pairs = [("Who is it?", "Ann"), (("Who?", "Ann", "Who is it?"), "Bo or Cy"), ("Who is it?", "Anna B")]
    texts = {pair: base.encoder.encode(*pair, end=True) for pair in pairs}
    top = Scorer(base, settings).top(texts, 200)
    for difference in Scorer(base, settings).differences(texts, top).values():
        assert (difference.agreement, difference.kl) == (1.0, pytest.approx(0, abs=1e-5))
    found = Scorer(other, settings).differences(texts, top)
    for pair, text in texts.items():
        ids = torch.tensor([text.ids])
        before, now = (lm.model(ids).logits[0, text.answer_positions].detach() for lm in (base, other))
        kl = torch.nn.functional.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
        n = len(text.answer_ids)
        assert found[pair].kl == pytest.approx(float(kl) / n, rel=1e-3)
        assert found[pair].agreement == float((now.argmax(-1) == before.argmax(-1)).float().mean())
        assert found[pair].n_tokens == n


def test_a_chat_is_answered(lm):
    chat = ("Who?", "Ann", "Really?")
    found = Scorer(lm).say([chat, "Really?"])
    assert found == Scorer(lm).say(["Really?"]) | Scorer(lm).say([chat])
