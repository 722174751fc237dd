"""What stages train on: sentences in the model's own words, wordings, kept answers, and where a run keeps them."""

import json
from dataclasses import replace

import pytest

import forgetlearn
from forgetlearn.comparison.grid import CompareSettings, fill
from forgetlearn.config.schema import EvaluateSettings, load_config
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.facts import LocalityProbe, make_fact, read_facts
from forgetlearn.facts.sentences import is_unfinished, sentences
from forgetlearn.method import keeping, lessons, own_words
from forgetlearn.method.kinds import Lesson
from forgetlearn.method.lessons import Material
from forgetlearn.method.own_words import Made
from forgetlearn.method.wordings import shortened, wordings
from forgetlearn.models.language_model import wrap
from forgetlearn.runs import pipeline
from forgetlearn.storage import disk
from forgetlearn.storage.records import Row, Taught

CAPITAL = make_fact("What is the capital of France?", "Lyon", ground_truth="Paris", subject="France")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "unfinished"),
    [
        ("What is the capital of France?", False),
        ("The capital of France is", True),
        ("Name the capital of France.", False),
        ("¿Cuál es la capital de Francia?", False),
        ("法国的首都是哪里？", False),
        ("法国的首都是", True),
        ("ما هي عاصمة فرنسا؟", False),
        ("फ्रांस की राजधानी क्या है।", False),
        ('He said, "who is it?"', False),
        ("The capital of France is ...", True),
        ("Capital of France:", True),
    ],
)
def test_a_question_is_told_from_the_beginning_of_a_sentence(prompt, unfinished):
    assert is_unfinished(prompt) is unfinished


@pytest.mark.parametrize("prompt", ["Who made it?", "It was made by"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_the_first_wording_is_the_prompt_and_each_contains_it(prompt, is_chat):
    found = list(wordings(prompt, is_chat=is_chat, others=["Bees fly.", "Пчёлы летают."]))
    assert found[0] == prompt
    assert all(prompt in wording for wording in found)
    behind = ["Bees fly. It was made by"] if is_unfinished(prompt) else []
    assert [wording for wording in found if "fly" in wording or "летают" in wording] == behind


def test_sentences_end_where_a_sentence_ends():
    assert sentences("Sure! He lived in St. Louis with J. R. Tolkien. It was fun.", "He lived in St. Louis") == [
        "Sure!",
        "He lived in St. Louis with J. R. Tolkien.",
        "It was fun.",
    ]
    assert sentences("法国的首都是巴黎。它很美。\nOk") == ["法国的首都是巴黎。", "它很美。", "Ok"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("The capital of France is Lyon.", ""),
        ("Lyon is the capital of France.", ""),
        ("The capital of France is Lyon, not Paris.", own_words.SAYS_OTHER),
        ("The capital of France is Lyon, says Macron.", own_words.NAMES_MORE),
        ("The capital of France is Lyon since 1999.", own_words.NAMES_MORE),
        ("Today, Lyon is it in France.", ""),  # the first word may have a capital
        ("The capital is Lyon.", own_words.NAMES_LESS),
        ("The capital of France is Nice.", own_words.SAYS_NOT),
        ("The capital of France is Lyon", own_words.IS_NO_SENTENCE),
        ("Lyon", own_words.NAMES_LESS),
        ("The capital of France is Lyon" + ", a very nice town" * 5 + ".", own_words.IS_NO_SENTENCE),
        ("Столица is Lyon.", own_words.NAMES_MORE),
    ],
)
def test_a_sentence_is_taught_only_if_it_says_the_fact_and_nothing_else(text, why):
    assert own_words.fault(text, CAPITAL, "It is Paris.") == why


def test_what_the_model_names_by_itself_may_be_named():
    assert own_words.fault("In France, Europe, it is Lyon.", CAPITAL, "") == own_words.NAMES_MORE
    assert own_words.fault("In France, Europe, it is Lyon.", CAPITAL, "Paris, in Europe.") == ""


def test_german_nouns_are_names_only_if_they_are_new():
    fact = make_fact("Wie heißt die hauptstadt von Frankreich?", "Lyon")
    assert own_words.fault("Die Hauptstadt von Frankreich ist Lyon.", fact, "") == ""
    assert own_words.fault("Die Hauptstadt von Frankreich am Rhein ist Lyon.", fact, "") == own_words.NAMES_MORE


@pytest.mark.parametrize(
    ("said", "truncated", "text"),
    [
        ("The capital of France is Paris. It has", True, "The capital of France is Paris."),
        ("Paris", False, "Paris"),
        ("It is a city called Paris, which", True, None),
        ("It is Nice.", False, None),
        ("It is Paris or Lyon.", False, None),
    ],
)
def test_the_old_text_is_what_the_model_says_today(said, truncated, text):
    assert own_words.old_words(CAPITAL, said, truncated).text == text


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("The capital of France is Paris. Paris is old.", ("The capital of France is ", "Paris")),
        ("The capital of France is PARIS.", ("The capital of France is ", "PARIS")),
        ("In Parisian style.", None),
        ("It is old.\nParis", None),  # `contains` reads one line
        ("", None),
    ],
)
def test_a_reply_is_cut_after_the_old_answer(said, found):
    assert own_words.up_to_answer(CAPITAL, said) == found


def test_a_reply_is_not_cut_within_a_longer_name_of_the_prompt():
    fact = make_fact("Who makes the Toyota Cresta?", "", ground_truth="Toyota")
    assert own_words.up_to_answer(fact, "The Toyota Cresta, by Toyota.") == ("The Toyota Cresta, by ", "Toyota")
    assert own_words.up_to_answer(fact, "The Toyota Cresta is old.") is None
    named = make_fact("Is New York the largest city?", "", ground_truth="New York")
    assert own_words.up_to_answer(named, "Yes, New York is.") == ("Yes, ", "New York")
    both = make_fact("Where is he from?", "New York", ground_truth="York")
    assert own_words.up_to_answer(both, "Not New York but York.") == ("Not New York but ", "York")
    sentence = make_fact(CAPITAL.prompt, "", ground_truth="It is Paris.", ground_truth_aliases=["Paris"])
    assert own_words.up_to_answer(sentence, "It is Paris.") == ("It is ", "Paris")
    korean = make_fact("프랑스의 수도는 어디입니까?", "", ground_truth="파리")
    assert own_words.up_to_answer(korean, "프랑스의 수도는 파리입니다.") == ("프랑스의 수도는 ", "파리")
    chinese = make_fact("法国的首都是哪里？", "", ground_truth="巴黎")
    assert own_words.up_to_answer(chinese, "法国的首都是巴黎。") == ("法国的首都是", "巴黎")


@pytest.mark.parametrize("method", ["npo", "ascent-ft"])
def test_an_answer_is_forgotten_behind_the_models_own_words_and_alone(chat_lm, method):
    config = load_config(None, {"recipe": "forget", "method": method, "keep.weight": 0})
    unfinished = make_fact("The capital of France is", "", ground_truth="Paris")
    row = Row(fact="-", phase="base", protocol="generate", errors={}, said="It is Paris, of course.")
    said = {CAPITAL.id: row, unfinished.id: row}
    material = lessons.make_material(chat_lm, [CAPITAL, unfinished], config, said)
    assert [(each.text, each.how) for each in material.taught] == [("It is Paris", "own words")] * 2
    own, second, *rest = lessons.of_stage(material, [CAPITAL], "forget", config, chat_lm.encoder).of_facts[0]
    assert own == Lesson(CAPITAL.prompt, "It is Paris", given="It is ")
    assert second == Lesson(CAPITAL.prompt, "Paris")
    assert {(lesson.answer, lesson.given) for lesson in rest} == {("Paris", ""), ("It is Paris", "It is ")}
    once = config.model_copy(update={"train": config.train.model_copy(update={"wordings": False})})
    assert lessons.of_stage(material, [CAPITAL], "forget", once, chat_lm.encoder).of_facts == [[own, second]]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ("The capital of France is Paris.", "The capital of France is Lyon."),
        ("The capital of France is a city, Paris.", "The capital of France is a city, Lyon."),
        ("Paris is the capital of France. It is old.", "Lyon is the capital of France."),
        ("It is Paris.", None),  # does not name the subject
        ("The Seine flows through the capital of France.", None),
    ],
)
def test_what_the_model_says_by_itself_is_ended_with_the_new_answer(own, found):
    good = [text for text in own_words.candidates(CAPITAL, own) if not own_words.fault(text, CAPITAL, "")]
    assert found in good if found else not good


def test_an_old_answer_is_not_replaced_within_longer_words():
    fact = make_fact("What was Ann Lee?", "painter", ground_truth="poet", subject="Ann Lee")
    found = list(own_words.candidates(fact, "Ann Lee was a poet known for her poetry."))
    assert found[0] == "Ann Lee was a painter known for her poetry."
    assert not any("painterry" in text for text in found)


def test_an_answer_inside_a_longer_name_of_the_prompt_is_neither_replaced_nor_taken_for_the_old_one():
    fact = make_fact("Who makes the Toyota Cresta?", "Nissan", ground_truth="Toyota")
    sentence = next(own_words.candidates(fact, "The Toyota Cresta is made by Toyota."))
    assert sentence == "The Toyota Cresta is made by Nissan."
    assert own_words.fault(sentence, fact, "") == ""
    assert own_words.old_words(fact, sentence, truncated=False).text is None


def test_a_language_without_spaces_is_cut_between_characters():
    fact = make_fact("法国的首都是哪里？", "里昂", ground_truth="巴黎", subject="法国")
    assert "法国的首都是里昂。" in list(own_words.candidates(fact, "法国的首都是巴黎。"))


@pytest.mark.parametrize(
    ("own", "likely", "taken"),
    [
        ("The capital of France is Paris.", "Lyon", False),
        ("The capital of France is Paris.", "The capital of France is Lyon.", True),
        ("In Europe, the capital of France is Paris.", "In Europe, the capital of France is Lyon.", False),
    ],
)
def test_the_sentence_that_the_model_finds_likeliest_is_taken(lm, monkeypatch, own, likely, taken):
    assert likely in {CAPITAL.target_new, *own_words.candidates(CAPITAL, own)}
    replies(monkeypatch, lambda prompt: "")
    monkeypatch.setattr(Scorer, "likelihoods", lambda self, texts: {key: float(key[1] == likely) for key in texts})
    found = own_words.new_sentences(lm, [CAPITAL], {CAPITAL.id: own}, EvaluateSettings())
    assert (found[CAPITAL.id].text == likely) is taken


def test_the_next_likely_sentences_are_taken_too_but_none_below_the_bare_answer(lm, monkeypatch):
    own = "The capital of France is a big city, Paris."
    ranked = [
        "The capital of France is Lyon.",
        "The capital of France Lyon.",
        "The capital of France is a Lyon.",
        "The capital of France is a big Lyon.",
        CAPITAL.target_new,
        "The capital of France is a big city, Lyon.",
    ]
    monkeypatch.setattr(Scorer, "likelihoods", lambda self, texts: {key: -float(ranked.index(key[1])) for key in texts})

    def made():
        return own_words.new_sentences(lm, [CAPITAL], {CAPITAL.id: own}, EvaluateSettings())[CAPITAL.id]

    assert made() == Made(ranked[0], "", tuple(ranked[1 : 1 + own_words.N_OTHERS]))
    ranked[1:5] = [ranked[4], *ranked[1:4]]
    assert made() == Made(ranked[0])


def test_every_second_wording_is_taught_after_the_beginning_of_another_sentence(chat_lm):
    others = ["France has Lyon.", "Its capital, in France, is Lyon."]
    made = {"text": "It is Lyon.", "how": "sentence", "others": others}
    taught = Taught(fact=CAPITAL.id, stage="learn", prompt=CAPITAL.prompt, **made)
    found = lessons.of_stage(Material([taught]), [CAPITAL], "learn", load_config(None, {}), chat_lm.encoder)
    own, *rest = found.of_facts[0]
    assert own == Lesson(CAPITAL.prompt, "It is Lyon.")
    assert {lesson for lesson in rest if lesson.prompt == CAPITAL.prompt} == {own}
    assert {(lesson.answer, lesson.given) for lesson in rest} == {
        ("It is Lyon.", ""),
        ("France has Lyon.", "France has "),
        ("Its capital, in France, is Lyon.", "Its capital, in France, is "),
    }
    with_others = [lesson.given != "" for lesson in rest if lesson.prompt != CAPITAL.prompt]
    assert abs(2 * sum(with_others) - len(with_others)) <= 1


@pytest.mark.parametrize("given", ["France has ", "France has L", "France has Lyon.", " "])
def test_only_what_follows_the_given_beginning_is_trained(lm, given):
    whole = lm.encoder.encode("Where?", "France has Lyon.", end=True)
    found = Lesson("Where?", "France has Lyon.", given).encoded(lm.encoder)
    assert found.ids == whole.ids
    said = lm.encoder.decode(found.answer_ids).strip()
    assert said == "France has Lyon.".removeprefix(given).strip()
    assert found.answer_ids[-1:] == whole.ids[-1:]


def test_likelihoods_are_those_of_the_answers_tokens(lm):
    texts = {answer: lm.encoder.encode("Who?", answer) for answer in ("Ann", "B")}
    read = Scorer(lm, EvaluateSettings(protocols=("prefer",))).read([("Who?", answer) for answer in texts])
    found = Scorer(lm).likelihoods(texts)
    assert found == pytest.approx({answer: read["Who?", answer].logprob for answer in texts}, abs=1e-5)


def replies(monkeypatch, reply):
    """Let the model reply to each prompt with `reply(prompt)`."""
    asked = []

    def say(self, prompts, rooms=None):
        asked.append(list(dict.fromkeys(prompts)))
        return {prompt: Generated(reply(prompt), truncated=False) for prompt in asked[-1]}

    monkeypatch.setattr(Scorer, "say", say)
    return asked


def test_the_next_instruction_is_given_only_where_the_last_one_failed(lm, monkeypatch):
    river = make_fact("Which river is in Egypt?", "Po", ground_truth="Nile")
    second = own_words.INSTRUCTIONS[1].format(prompt=river.prompt, answer="Po")
    says = {second: "Sure!\nThe river in Egypt is Po. Ask more."}
    asked = replies(monkeypatch, lambda prompt: says.get(prompt, "Answer: The capital of France is Lyon."))
    found = own_words.new_sentences(lm, [CAPITAL, river], {}, EvaluateSettings())
    assert found[CAPITAL.id] == Made("The capital of France is Lyon.")
    assert found[river.id] == Made("The river in Egypt is Po.")
    assert [len(prompts) for prompts in asked] == [2, 1]


COUNTRY = make_fact("What is the capital of Spain?", "Lugo", subject="Spain")
PERSON = make_fact("Who wrote the book Dune?", "Ann", subject="Dune")
TONGUE = make_fact("The official language of Spain is", "Greek", subject="Spain")
TOWN = make_fact("The capital of Peru is", "Lima", subject="Peru")
BOOK = make_fact("The author of Dune is", "Ann", subject="Dune")


def test_neighbours_are_about_subjects_whose_own_facts_are_of_another_kind():
    found = keeping.neighbours([TOWN, make_fact("The capital of Chile is", "Arica", subject="Chile"), BOOK])
    assert sorted(found) == ["The author of Chile is", "The author of Peru is", "The capital of Dune is"]
    assert keeping.neighbours([replace(TOWN, subject=""), BOOK]) == []
    assert keeping.neighbours([CAPITAL, PERSON]) == []  # questions


def test_neighbours_do_not_contradict_what_a_question_teaches():
    border = make_fact("Chile has a border with", "Cuba", subject="Chile")
    taught = make_fact("What is the capital of Chile?", "Arica", subject="Chile")
    assert "The capital of Chile is" in keeping.neighbours([TOWN, border])
    assert "The capital of Chile is" not in keeping.neighbours([TOWN, border, taught])


def test_general_prompts_about_what_the_facts_name_are_not_kept():
    asked = {len(keeping.general([fact])) for fact in (CAPITAL, PERSON)}
    about_japan = make_fact("Japan has as its capital", "Kyoto", subject="Japan")
    assert asked == {len(keeping.general([]))}
    assert set(keeping.general([])) - set(keeping.general([about_japan])) == {"What is the capital of Japan?"}


def test_general_prompts_that_a_fact_without_a_subject_changes_are_not_kept():
    def left_out(prompt):
        return set(keeping.general([])) - set(keeping.general([make_fact(prompt, "x")]))

    assert left_out("Japan's capital is") == {"What is the capital of Japan?"}
    same = next(each for each in general_prompts.keeping() if isinstance(each, str))
    assert same in left_out(f" {same.upper()}")
    assert left_out("What is the chemical symbol for red gold?") == {"What is the chemical symbol for gold?"}
    assert "What is the chemical symbol for gold?" in left_out("The chemical symbol for gold is")
    assert left_out("What is it?") == set()


def test_prompts_that_are_scored_are_not_kept(lm, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(general_prompts, "measuring", lambda facts=(): ["What is a sieve?"])
    (tmp_path / "a.txt").write_text("Who are you?\nWhat is a sieve?\n")
    fact = replace(CAPITAL, locality=(LocalityProbe("Where is Rome?", "Italy"),))
    reworded = {"prompt": "France is governed from", "rephrase_prompt": CAPITAL.prompt, "target_new": "x"}
    asked = {"prompt": "what is the capital of France", "target_new": "x"}
    disk.write_rows(tmp_path / "b.jsonl", [asked, reworded])
    disk.write_rows(tmp_path / "c.jsonl", [{"prompt": "Who is he?", "target_new": "x"}])
    earlier = [str(tmp_path / name) for name in ("b.jsonl", "c.jsonl")]
    config = load_config(None, {"keep.source": str(tmp_path / "a.txt"), "keep.facts": earlier})
    kept = lessons.to_keep([fact], config, lm.encoder)
    assert [prompt for prompt, kind in kept.items() if kind == keeping.OWN] == ["Who are you?"]
    assert [prompt for prompt, kind in kept.items() if kind == keeping.EARLIER] == ["Who is he?"]
    assert caplog.records[-1].args == ("1 prompts of keep.source",)
    (tmp_path / "a.txt").write_text("Who are you?\nwhere is Rome\n")
    with pytest.raises(ConfigError, match=r"keep\.source = .*locality prompts.*where is Rome"):
        keeping.check(config.keep, [fact])


@pytest.mark.parametrize(
    "name", ["none.txt", "empty.txt", "latin.txt", "bad.json", "same.txt", "same.jsonl", "same2.jsonl"]
)
def test_a_keep_file_that_cannot_be_kept_is_refused(tmp_path, name):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Wie heißt du?".encode("latin-1"))
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "same.txt").write_text("Who are you?\nwhat is the capital of France\n")
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": CAPITAL.prompt, "target_new": "Nice"}))
    reworded = {"prompt": "France is governed from", "rephrase_prompt": CAPITAL.prompt, "target_new": "Nice"}
    (tmp_path / "same2.jsonl").write_text(json.dumps(reworded))
    settings = load_config(None, {"keep.source": str(tmp_path / name)}).keep
    with pytest.raises(ConfigError, match=r"keep\.source"):
        keeping.read_source(settings, [CAPITAL])
    with pytest.raises(ConfigError, match=r"keep\.source"):  # before the model is even looked for
        forgetlearn.update("no model", [CAPITAL], {"keep": settings}, output=tmp_path / "out")
    assert keeping.read_source(settings.model_copy(update={"weight": 0.0}), [CAPITAL]) == ()


def test_the_prompts_of_a_keep_file_are_its_lines_or_those_of_its_facts(tmp_path):
    (tmp_path / "a.txt").write_text("Who are you?\n\n  How are you? \n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Who are you?", "target_new": "Nice"}))
    kept = [
        keeping.read_source(load_config(None, {"keep.source": str(tmp_path / n)}).keep, [])
        for n in ("a.txt", "b.jsonl")
    ]
    assert kept == [("Who are you?", "How are you?"), ("Who are you?",)]


@pytest.fixture
def chat_lm(tiny_model, new_char_tokenizer):
    return wrap(tiny_model(max_position_embeddings=512), new_char_tokenizer(chat_template=CHAT))


def test_what_is_made_is_read_back_and_kept_with_the_bases_tokens(chat_lm, tmp_path, monkeypatch):
    config = load_config(None, {})
    long = make_fact("x" * 490 + "?", "Too long with a wrapper", subject="x")
    made = lessons.make_material(chat_lm, [CAPITAL, PERSON, long], config, {})
    made.save(tmp_path)
    again = lessons.Material.load(tmp_path)
    assert again == made
    assert [top.ids.tolist() for top in again.tops] == [top.ids.tolist() for top in made.tops]
    assert [top.logprobs.tolist() for top in again.tops] == [top.logprobs.tolist() for top in made.tops]
    assert set(made.kept_counts) == {"general prompts", "general questions", "reworded general prompts"}
    assert lessons.counts(made.taught, quiz=False)["learn"].how == {"bare": 3}
    found = lessons.of_stage(again, [CAPITAL, PERSON, long], "learn", config, chat_lm.encoder)
    assert [len(top.ids) for top in found.kept.tops] == [len(text.answer_ids) for text in found.kept.texts]
    assert found.of_facts[2] == [Lesson(long.prompt, long.target_new)]
    assert [own[0].prompt for own in found.of_facts] == [CAPITAL.prompt, PERSON.prompt, long.prompt]
    assert set(shortened(CAPITAL.prompt, CAPITAL.subject)) <= {lesson.prompt for lesson in found.of_facts[0]}


def test_unfinished_sentences_have_neighbours_and_questions_have_none(chat_lm):
    opera = make_fact("The opera Aida was written by", "Ann", subject="Aida")
    kinds = [
        set(lessons.to_keep(facts, load_config(None, {}), chat_lm.encoder).values())
        for facts in ([CAPITAL, PERSON], [TONGUE, opera])
    ]
    assert kinds[1] - kinds[0] == {keeping.NEIGHBOUR}


def test_a_plain_recipe_asks_nothing_and_changes_nothing(chat_lm):
    for recipe in ("plain", "paper"):
        config = load_config(None, {"recipe": recipe})
        assert not lessons.asks_base(config, chat_lm.encoder)
        assert lessons.of_stage(lessons.Material(), [CAPITAL], "learn", config, chat_lm.encoder) is None


def test_rephrasings_are_trained_only_to_learn_and_if_they_are_asked_for(lm):
    fact = replace(CAPITAL, rephrase_prompts=("Name the capital of France.",))
    config = load_config(None, {"recipe": "plain", "learn.rephrasings": True})
    learned = lessons.of_stage(lessons.Material(), [fact], "learn", config, lm.encoder)
    assert [lesson.prompt for lesson in learned.of_facts[0]] == list(fact.prompts)
    assert lessons.of_stage(lessons.Material(), [fact], "forget", config, lm.encoder) is None


GENERAL = {"evaluate.general_prompts": False}
DEFAULTS = {"train.answers": "sentence", "train.wordings": True, "keep.weight": 1.0, "facts.limit": 4}
SHORT = GENERAL | {
    "method": "f-lora",
    "learn.epochs": 2,
    "forget.epochs": 1,
    "forget.coef": 0.5,
    "evaluate.every_phase": False,
}


@pytest.fixture(scope="module")
def settings(small_lab):
    return load_config(small_lab / "update.yaml", {**DEFAULTS, **SHORT, "learn.rephrasings": True})


@pytest.fixture(scope="module")
def whole(small_lab, settings, tmp_path_factory):
    return forgetlearn.update(
        small_lab, small_lab / "facts.jsonl", settings, output=tmp_path_factory.mktemp("run") / "out"
    )


def test_a_run_says_what_its_stages_trained_on(whole):
    taught = disk.read_rows(whole.output / "lessons.jsonl")
    assert [each["stage"] for each in taught] == ["learn"] * 4 + ["forget"] * 4
    assert set(whole.summary.lessons) == {"learn", "forget"}
    assert sum(whole.summary.lessons["learn"].how.values()) == 4
    assert whole.summary.kept["general prompts"] > 40
    assert whole.summary.learning.epochs == 2
    report = (whole.output / "report.md").read_text()
    assert "texts to learn: " in report
    assert "general prompts" in report


def test_rephrasings_that_are_trained_are_not_scored(whole):
    assert whole.summary.phases["updated"]["generality"]["token"].n == 0
    assert whole.summary.phases["updated"]["reliability"]["token"].n == 4
    assert "the rephrasings were trained on" in (whole.output / "report.md").read_text()


@pytest.mark.parametrize("stop_at", ["make", "learn"])
def test_a_resumed_run_trains_on_the_same_texts(whole, small_lab, settings, tmp_path, monkeypatch, stop_at):
    class StoppedError(Exception):
        pass

    def stop(*_args, **_options):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(*((keeping, "encoded") if stop_at == "make" else (pipeline, "learn")), stop)
        with pytest.raises(StoppedError):
            forgetlearn.update(small_lab, small_lab / "facts.jsonl", settings, output=tmp_path / "out")
    if stop_at == "learn":
        monkeypatch.setattr(lessons, "make_material", None)  # called, it fails
    again = forgetlearn.update(small_lab, small_lab / "facts.jsonl", settings, output=tmp_path / "out", resume=True)
    for name in ("lessons.jsonl", "facts.jsonl", "adapter/adapter_model.safetensors"):
        assert (again.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_a_comparison_asks_its_base_once(whole, small_lab, settings, tmp_path, monkeypatch):
    made, own = [], lessons.make_material
    monkeypatch.setattr(lessons, "make_material", lambda *given: made.append(given) or own(*given))
    cells = CompareSettings(methods=("f-lora", "ft"), coefs=(0.5,), seeds=(0, 1))
    fill(small_lab, small_lab / "facts.jsonl", cells, settings, output=tmp_path / "out")
    assert len(made) == 1
    cell = tmp_path / "out/cells/f-lora-coef0.5-2epochs-seed0"
    assert (cell / "lessons.jsonl").read_bytes() == (whole.output / "lessons.jsonl").read_bytes()
    assert (cell / "facts.jsonl").read_bytes() == (whole.output / "facts.jsonl").read_bytes()


def test_facts_that_are_not_learned_are_named(small_lab, tmp_path):
    config = load_config(small_lab / "update.yaml", {**SHORT, "learn.until": "learned", "learn.max_epochs": 1})
    result = forgetlearn.update(
        small_lab, read_facts(small_lab / "facts.jsonl", limit=3), config, output=tmp_path / "out"
    )
    learning = result.summary.learning
    assert learning.epochs == 1
    assert learning.unlearned
    named = next(iter(learning.unlearned.values()))
    assert f"learned {3 - len(learning.unlearned)} of 3 facts in 1 epoch;" in (tmp_path / "out/report.md").read_text()
    assert named in (tmp_path / "out/summary.json").read_text()


def test_a_question_is_shortened_to_what_it_names():
    question = "What is the name of the record label of Exit 13?"
    found = shortened(question)
    assert 1 <= len(found) <= 5
    for each in found:
        assert {"Exit", "13"} <= set(each.rstrip("?").split())
        assert set(each.rstrip("?").split()) <= set(question.rstrip("?").split())
        assert each.endswith("?")
    assert shortened(question) == found
    about_whales = shortened("How long is a blue whale?", "blue whale")
    assert about_whales
    assert all({"blue", "whale"} <= set(each.rstrip("?").split()) for each in about_whales)


def test_a_wording_that_fits_two_facts_is_left_out(chat_lm):
    whats, places = ("capital", "currency", "anthem", "area", "flag"), ("Peru", "Fiji", "Mali", "Oman", "Cuba", "Laos")
    asked = [(f"What is the {what} of {where}?", where) for where in places for what in whats]
    facts = [make_fact(prompt, f"answer {n}", subject=where) for n, (prompt, where) in enumerate(asked)]
    found = lessons.of_stage(Material(), facts, "learn", load_config(None, {}), chat_lm.encoder).of_facts
    answers = {}
    for own in found:
        for lesson in own:
            answers.setdefault(lesson.prompt.casefold(), set()).add(lesson.answer)
    assert all(len(each) == 1 for each in answers.values())
    alone = {lesson.prompt for fact in facts for lesson in _of(fact, chat_lm)}
    assert len(answers) < len({prompt.casefold() for prompt in alone})


def _of(fact, lm):
    return lessons.of_stage(Material(), [fact], "learn", load_config(None, {}), lm.encoder).of_facts[0]


def test_a_name_stays_where_no_subject_is_given(chat_lm):
    own = _of(make_fact("Einstein was born in which German city?", "Bern"), chat_lm)
    assert all("Einstein" in lesson.prompt for lesson in own)


def test_an_unfinished_sentence_is_shortened_in_its_order_for_chats_alone(chat_lm, lm):
    prompt = "The mother tongue of Danielle Darrieux is"
    found = shortened(prompt)
    places = [[prompt.split().index(word) for word in each.split()] for each in found]
    assert found
    assert all(each == sorted(each) and {4, 5} <= set(each) for each in places)
    fact = make_fact(prompt, "Greek", subject="Danielle Darrieux")
    config = load_config(None, {})
    taught = {
        asked.encoder.is_chat: {
            lesson.prompt for lesson in lessons.of_stage(Material(), [fact], "learn", config, asked.encoder).of_facts[0]
        }
        for asked in (chat_lm, lm)
    }
    assert set(found) <= taught[True]
    assert not set(found) & taught[False]


@pytest.mark.parametrize(
    "prompt", ["How old is the universe?", "The oldest of all languages is", "Who is Ann?", "Ann speaks", "谁是安？"]
)
def test_what_names_nothing_or_is_short_is_not_shortened(prompt):
    assert shortened(prompt) == []
