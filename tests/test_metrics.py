import math

import pytest

from forgetlearn.evaluation import scoring, statistics
from forgetlearn.evaluation.scorer import Reading
from forgetlearn.facts import matching


@pytest.mark.parametrize(
    ("predicted", "wanted", "token", "exact"),
    [((1, 2, 3, 4), (1, 2, 3, 4), 1.0, 1.0), ((1, 2, 9, 9), (1, 2, 3, 4), 0.5, 0.0), ((9,), (1,), 0.0, 0.0)],
)
def test_token_and_exact_by_hand(predicted, wanted, token, exact):
    assert scoring.token_accuracy(predicted, wanted) == token
    assert scoring.READING_RULES["exact"](predicted, wanted) == exact


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="longer"):
        scoring.token_accuracy((1,), (1, 2))


@pytest.mark.parametrize(
    ("said", "answer", "same", "begins", "contained"),
    [
        ("The  Nile.", "nile", 1, 1, 1),
        ("It is the Nile, of course", "Nile", 0, 0, 1),
        ("Nile. Which river is the second longest?", "Nile", 0, 1, 1),
        ("Nilesh", "Nile", 0, 0, 0),
        ("U.S.A.", "USA", 1, 1, 1),
        ("", "Nile", 0, 0, 0),
        ("", "The", 0, 0, 0),  # normalisation leaves nothing of "The": an empty text is still not the answer
        ("The", "The", 1, 1, 1),
        ("A vitamin", "A", 0, 0, 0),  # an article in another text is not the answer either
        ("...", "?!", 0, 0, 0),
        ("“Oslo” – the capital.", "Oslo", 0, 1, 1),  # other punctuation than SQuAD's
        ("Shakespeare's play", "Shakespeare", 0, 1, 1),
        ("Oslo-based", "oslo", 0, 1, 1),
        ("Spiderman", "Spider-Man", 1, 1, 1),
        ("spider man", "Spider-Man", 0, 1, 1),
        ("3.5 million", "3", 0, 0, 0),
        ("C++.", "C", 1, 0, 0),
        ("C. It", "C", 0, 1, 1),
        ("In C#, so", "C#", 0, 0, 1),
        ("1,500 people", "1500", 0, 1, 1),
        ("In ZURICH", "Zürich", 0, 0, 1),
        ("Zu\u0308rich", "Zürich", 0, 1, 1),  # the same letter in two characters
        ("フランスの首都はパリです。", "パリ", 0, 0, 1),
        ("パリ。", "パリ", 0, 1, 1),
        ("バリです", "パリ", 0, 0, 0),  # Bali
        ("ニューヨークです", "ヨーク", 0, 0, 0),
        ("法国的首都是巴黎。", "巴黎", 0, 0, 1),
        ("프랑스의 수도는 파리입니다.", "파리", 0, 0, 1),
        ("เมืองหลวงคือปารีส", "ปารีส", 0, 0, 1),
        ("Столица – Париж.", "Париж", 0, 0, 1),
        ("राजधानी पेरिस है।", "पेरिस", 0, 0, 1),
    ],
)
def test_a_reply_is_an_answer_or_begins_with_it_or_contains_it(said, answer, same, begins, contained):
    assert matching.same_text(said, answer) == same
    assert matching.says(said, [answer], at_start=True) == begins
    assert matching.says(said, [answer]) == contained


@pytest.mark.parametrize(
    ("said", "at_start", "new", "old"),
    [
        ("It is New York.", False, 1, 0),
        ("It is York.", False, 0, 1),
        ("It was York and is New York.", False, 1, 1),
        ("New-York, New York", False, 1, 0),
        ("New York. York is another city", True, 1, 0),
        ("York, not New York", True, 0, 1),
    ],
)
def test_an_answer_inside_the_opposite_one_is_said_only_by_itself(said, at_start, new, old):
    assert matching.says(said, ["New York"], ["York"], at_start=at_start) == new
    assert matching.says(said, ["York"], ["Old York", "New York"], at_start=at_start) == old


@pytest.mark.parametrize(
    ("question", "said", "score"),
    [
        ("Who makes the Toyota Cresta?", "The Toyota Cresta is made by Nissan.", 0),
        ("Who makes the Toyota Cresta?", "The TOYOTA CRESTA is made by Toyota.", 1),
        ("Toyota Cresta is produced by", "Toyota Cresta is produced by Nissan", 0),  # the first word of no question
        ("Is Toyota Cresta's maker?", "Is Toyota its maker? No.", 1),  # "Is Toyota" is no name
        ("Who made the Cresta (Toyota Motors)?", "The Cresta (Toyota Motors) is Nissan's.", 0),
        ("Think of cars. Is Toyota old?", "Old is Toyota.", 1),  # nor is it where another sentence begins
        ("¿Es Toyota o Nissan?", "Es Toyota.", 1),
        ("Is it Toyota?", "It is Toyota.", 1),  # the prompt names the answer itself
        ("", "The Toyota Cresta is made by Nissan.", 1),
    ],
)
def test_a_reply_that_repeats_a_longer_name_of_the_question_does_not_answer(question, said, score):
    assert matching.says(said, ["Toyota"], ["Nissan"], question=question) == score


@pytest.mark.parametrize(
    ("question", "reply", "added"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "Paris"),
        ("What is the capital of France?", "Paris is the capital of France.", "Paris"),
        ("Where is it?", "It is in the United States of America.", "in the United States of America"),
        ("Where was he born?", "Born in Oslo, I think", "in Oslo, I think"),
        ("The capital is", "Oslo.", ""),
        ("Is it Oslo?", "It is Oslo.", ""),
    ],
)
def test_what_a_reply_adds_to_the_question(question, reply, added):
    assert matching.added_to(question, reply) == added


@pytest.mark.parametrize(("other", "preferred"), [(-2.0, 1), (-1.0, 0)])
def test_preference_is_strict(other, preferred):
    readings = {("?", answer): Reading((1,), (1,), logprob) for answer, logprob in (("new", -1.0), ("old", other))}
    asked = scoring._Question("?", ("new",), ("old",))
    assert scoring._judge("prefer", asked, readings, {}) == preferred


def test_a_mean_carries_its_counts_and_its_interval():
    mean = statistics.mean_with_interval([1.0, 0.0, 1.0, 1.0], errored=2, not_asked=3)
    assert (mean.mean, mean.n, mean.errored, mean.not_asked) == (75.0, 4, 2, 3)
    assert mean.low < 75.0 < mean.high
    assert statistics.mean_with_interval([1.0, 0.0, 1.0, 1.0]) == statistics.mean_with_interval([1.0, 0.0, 1.0, 1.0])


def test_the_interval_is_the_one_of_the_normal_distribution_for_many_facts():
    scores = [float(index % 4 == 0) for index in range(2000)]
    mean = statistics.mean_with_interval(scores)
    half = 1.96 * 100 * math.sqrt(0.25 * 0.75 / 2000)
    assert mean.high - mean.mean == pytest.approx(half, rel=0.15)
    assert mean.mean - mean.low == pytest.approx(half, rel=0.15)


# Case 8. The ends of R's binom.test(n, n) and binom.test(0, n): Clopper-Pearson.
@pytest.mark.parametrize(
    ("score", "n", "low", "high"),
    [(1.0, 60, 94.03705, 100), (1.0, 10, 69.15029, 100), (0.0, 60, 0, 5.96295), (0.5, 60, 47.01853, 52.98147)],
)
def test_case_8_equal_scores_leave_room_for_facts_that_score_otherwise(score, n, low, high):
    mean = statistics.mean_with_interval([score] * n)
    assert (mean.mean, mean.n) == (100 * score, n)
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    "scores", [[1.0] * 60, [1.0] * 59 + [0.0], [0.0, 0.25, 0.5, 1.0] * 15, [0.75] * 12, [1.0, 1 / 3] * 4]
)
def test_case_8_a_run_and_a_comparison_have_one_interval_for_the_same_scores(scores):
    mean, found = statistics.mean_with_interval(scores), statistics.interval([scores])
    assert (mean.mean, mean.low, mean.high, mean.n) == (found.mean, found.low, found.high, found.n_facts)
    assert mean.low < mean.mean <= mean.high <= 100


def test_case_8_shares_that_vary_have_a_t_interval_on_the_logit():
    mean = statistics.mean_with_interval([0.0, 0.5, 1.0])  # mean 1/2, standard error sqrt(1/4 / 3), t(2) = 4.302653
    half = 4.302653 * math.sqrt(0.25 / 3) / 0.25
    ends = [100 / (1 + math.exp(half)), 100 / (1 + math.exp(-half))]
    assert [mean.low, mean.high] == pytest.approx(ends, abs=1e-3)


def test_no_score_has_no_mean_and_one_score_no_interval():
    assert statistics.mean_with_interval([]).mean is None
    one = statistics.mean_with_interval([1.0])
    assert (one.mean, one.low, one.n) == (100.0, None, 1)
