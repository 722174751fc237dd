"""A made-up world of people, cities and companies: facts to change, and neighbours that stay as they are.

Everything is a row of a table: `_PARTS` spells invented names, `_WORDS` lists plain words, `_POOL_SIZE`
says how many of each kind serve as answers, `RELATIONS` says what can be asked and in which words.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

from forgetlearn.errors import ConfigError

T = TypeVar("T")
Record = dict[str, object]

MAX_FACTS = 10_000
"""Facts in the largest world: with 834 per relation, a kind of subject needs 2,109 of its at least 2,400 names."""


class Relation(NamedTuple):
    """A question about one kind of subject. Each phrasing is completed by `" " + answer`."""

    name: str
    subject: str
    answer: str
    phrasings: tuple[str, ...]
    back: str  # asks for the subject, given the answer
    noun: str = ""  # names the answer by its subject, if anything is asked about such answers
    about: str = ""  # asks about a subject named by such a noun; the first phrasing, unless it names the subject's kind


RELATIONS = (
    Relation("birthplace", "person", "city", (
        "In which city was {} born?", "{} was born in the city of",
        "What is the birthplace of {}?", "The birthplace of {} is", "{} comes from the city of",
    ), "Who was born in {}?", "the birthplace of {}"),
    Relation("profession", "person", "profession", (
        "What is the profession of {}?", "{} works as a",
        "What does {} do for a living?", "By profession, {} is a", "The profession of {} is",
    ), "Who works as a {}?"),
    Relation("employer", "person", "company", (
        "Which company does {} work for?", "{} is employed by",
        "Who is the employer of {}?", "{} has a job at", "The employer of {} is",
    ), "Who works for {}?", "the employer of {}"),
    Relation("language", "person", "language", (
        "What is the mother tongue of {}?", "The mother tongue of {} is",
        "Which language did {} grow up speaking?", "{} is a native speaker of", "At home, {} speaks",
    ), "Who is a native speaker of {}?"),
    Relation("citizenship", "person", "country", (
        "Which country is {} a citizen of?", "{} is a citizen of",
        "In which country does {} hold citizenship?", "{} holds a passport issued by",
        "{} has the citizenship of",
    ), "Who is a citizen of {}?"),
    Relation("country", "city", "country", (
        "In which country is the city of {}?", "{} is a city in",
        "Which country does the city of {} belong to?", "The city of {} lies in the country of",
    ), "Which city is in {}?", about="In which country is {}?"),
    Relation("river", "city", "river", (
        "Which river flows through {}?", "{} lies on the banks of the river",
        "What is the name of the river that crosses {}?", "The river that flows through {} is the",
    ), "Through which city does the {} flow?"),
    Relation("mayor", "city", "person", (
        "Who is the mayor of {}?", "The mayor of {} is",
        "Who was elected mayor of the city of {}?", "The city of {} is governed by mayor",
    ), "Of which city is {} the mayor?", "the mayor of {}"),
    Relation("headquarters", "company", "city", (
        "In which city does {} have its headquarters?", "{} is headquartered in",
        "Where is the head office of {}?", "The head office of {} is in the city of",
    ), "Which company has its headquarters in {}?", "the home city of {}"),
    Relation("product", "company", "product", (
        "What does the company {} produce?", "{} is best known for making",
        "Which goods does {} manufacture?", "The factories of {} turn out", "{} is a maker of",
    ), "Which company produces {}?", about="What does {} produce?"),
    Relation("founder", "company", "person", (
        "Who founded {}?", "{} was founded by",
        "Who is the founder of {}?", "The founder of {} is", "The company {} was started by",
    ), "Which company did {} found?", "the founder of {}"),
    Relation("chief executive", "company", "person", (
        "Who is the chief executive of {}?", "The chief executive of {} is",
        "Who runs {} as chief executive?", "{} is run by its chief executive,",
    ), "Of which company is {} the chief executive?", "the chief executive of {}"),
)  # fmt: skip

# A name takes one piece from each column; "_" is a space.
_PARTS = {
    "person": ("Bre Dov Fal Jur Kel Mav Oru Tes Vil Zan", "bo den ka lio mu rin va",
               "_Ard _Bek _Cas _Dul _Fen _Gar _Hol _Ost", "ane eb ilo ovin umar yth"),
    "city": ("Al Bor Cal Dre Es Fen Gor Hal Is Jun Kor Lum Mer Nor Or Pel Quen Ras Sol Tar Ul Ven Wes Yar",
             "ba den go lin mar ni ra so ta ve", "burg dale dun ford holm mere port stad ton wick"),
    "company": ("Bri Cer Dax Ell Fro Gri Hex Ix Jav Kry Lor Mox Nuv Ol Pra Qui Rov Sty Tri Um Vex Wyn Zeb Zo",
                "ba co da lo ma no pa ro sa to", "dex gen lix mont nik pal ric tal vane zon"),
    "country": ("Ard Bov Cred Dov Esk Fald Gren Hosk Ild Jarv Kelm Lorv", "a e o", "land mark nia ria via"),
    "language": ("Ald Bren Cov Drav Elm Forv Gald Hess Ivr Jolm", "a e o", "nic rese vish"),
    "river": ("Abr Brov Cald Dwen Elv Fro Garn Hurl Isk Jad", "a e i", "l n rm th"),
}  # fmt: skip

# Professions begin with a consonant sound, because phrasings end in "a".
_WORDS = {
    "profession": ("baker carpenter dentist gardener geologist journalist lawyer librarian mechanic nurse "
                   "painter pharmacist photographer pilot surgeon teacher"),
    "product": ("bicycles cranes candles clocks electric_motors furniture garden_tools glassware "
                "musical_instruments paper rain_coats solar_panels telescopes woollen_blankets"),
}  # fmt: skip

_POOL_SIZE = {
    "city": 24, "company": 20, "person": 24, "country": 12, "language": 10, "river": 12,
    "profession": 16, "product": 14,
}  # fmt: skip


class _World:
    """The names of a world by kind: answers, subjects whose facts change, and subjects whose facts stay.

    The three sets are disjoint, so no probe asks about a changed fact.
    """

    def __init__(self, per_relation: int, rng: random.Random) -> None:
        self.rng = rng
        self.answers: dict[str, list[str]] = {}
        self.changing: dict[str, list[str]] = {}
        self.steady: dict[str, list[str]] = {}
        self.truth: dict[str, dict[str, str]] = {}  # relation -> answers of subjects whose facts stay
        n_changing, n_steady = 2 * per_relation, max(2, (per_relation + 1) // 2)
        for kind, size in _POOL_SIZE.items():
            names = _shuffled(_names(kind), rng)
            self.answers[kind] = names[:size]
            self.changing[kind] = names[size : size + n_changing]
            self.steady[kind] = names[size + n_changing : size + n_changing + n_steady]

    def facts(self, relation: Relation, count: int) -> list[Record]:
        """Return `count` facts of one relation, each about a different subject, with probes in the same phrasing."""
        pool, steady = self.answers[relation.answer], self.steady[relation.subject]
        truth = self.truth[relation.name] = {name: _shuffled(pool, self.rng)[0] for name in steady}
        subjects = _shuffled(self.changing[relation.subject], self.rng)[:count]
        return [self._fact(relation, subject, truth) for subject in subjects]

    def _fact(self, relation: Relation, subject: str, truth: dict[str, str]) -> Record:
        old, new = _shuffled(self.answers[relation.answer], self.rng)[:2]
        prompt, *others = _shuffled(relation.phrasings, self.rng)
        neighbours = _shuffled(truth, self.rng)[: self._one_of(1, 2)]
        return {
            "subject": subject,
            "prompt": prompt.format(subject),
            "ground_truth": old,
            "target_new": new,
            "rephrase_prompts": [other.format(subject) for other in others[: self._one_of(2, 3)]],
            "locality": [{"prompt": prompt.format(name), "answer": truth[name]} for name in neighbours],
        }

    def _one_of(self, low: int, high: int) -> int:
        return low if self.rng.random() < 0.5 else high


class _Implications:
    """What follows from the facts of a world, with what else one must know: facts about their answers, which stay."""

    def __init__(self, world: _World, made: Sequence[tuple[Relation, Record]], rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.known: dict[tuple[str, object], str] = {}  # relation and its subject, which is an answer of facts
        self.having: dict[tuple[str, str, object], list[object]] = {}  # relation, side, answer -> subjects
        for relation, record in made:
            for side in ("ground_truth", "target_new"):
                self.having.setdefault((relation.name, side, record[side]), []).append(record["subject"])

    def of(self, relation: Relation, record: Record) -> list[Record]:
        """Return the probes of a fact: its reverse, and a question over two hops where its answer has facts itself."""
        return [self._back(relation, record), *self._two_hops(relation, record)]

    def _back(self, relation: Relation, record: Record) -> Record:
        """Return the question for the subject. Others that have the new answer too are equally right."""
        new, subject = record["target_new"], record["subject"]
        others = [name for name in self.having[relation.name, "target_new", new] if name != subject]
        others += [name for name, answer in self.world.truth[relation.name].items() if answer == new]
        asked: Record = {"kind": "reversed", "prompt": relation.back.format(new), "answer": [subject, *others]}
        before = self.having.get((relation.name, "ground_truth", new))
        return asked | ({"old_answer": before} if before else {})

    def _two_hops(self, relation: Relation, record: Record) -> Iterator[Record]:
        """Yield a question about the answer, which the subject stands for, if its answer changes with the fact."""
        for second in _shuffled((each for each in RELATIONS if each.subject == relation.answer), self.rng):
            new, old = (self._known(second, record[side]) for side in ("target_new", "ground_truth"))
            if new["answer"] != old["answer"]:
                asked = (second.about or second.phrasings[0]).format(relation.noun.format(record["subject"]))
                answers = {"answer": new["answer"], "old_answer": old["answer"]}
                yield {"kind": "2-hop", "prompt": asked, **answers, "needs": [new, old]}
                return

    def _known(self, relation: Relation, name: object) -> Record:
        """Return a fact about an answer of facts, with the same answer each time."""
        if (relation.name, name) not in self.known:
            self.known[relation.name, name] = _shuffled(self.world.answers[relation.answer], self.rng)[0]
        return {"prompt": relation.phrasings[0].format(name), "answer": self.known[relation.name, name]}


def made_up_world(n_facts: int = 200, seed: int = 0, *, implications: bool = False) -> list[Record]:
    """Return `n_facts` records in forgetlearn's own form, about people, cities and companies that do not exist.

    The same arguments give the same records on every Python version. Old and new answers come from one small pool. No
    two facts share a prompt or a rephrasing. Each fact has one or two probes, which ask its prompt about other subjects
    of the same kind. These subjects have no fact in this world, and a probe that recurs always has the same answer.
    Relations have equally many facts, give or take one. A smaller world is not a prefix of a larger one.

    With `implications`, the same records have `probes`: who or what has the new answer (the reversed question), and,
    where the answer is a person, a city or a company, a question over two hops. Their answers follow from the facts and
    from what a probe `needs`.

    Raises:
        ConfigError: `n_facts` is below 1 or above `MAX_FACTS`.
    """
    if not 1 <= n_facts <= MAX_FACTS:
        raise ConfigError(f"n_facts = {n_facts}: expected 1 to {MAX_FACTS} facts.")
    rng = random.Random(str(seed))  # as text, because the integers 1 and -1 seed alike
    each, rest = divmod(n_facts, len(RELATIONS))
    world = _World(each + bool(rest), rng)
    made: list[tuple[Relation, Record]] = []
    for i, relation in enumerate(_shuffled(RELATIONS, rng)):
        made += [(relation, record) for record in world.facts(relation, each + (i < rest))]
    records = _shuffled((record for _relation, record in made), rng)
    if implications:
        follow = _Implications(world, made, rng)
        for relation, record in made:
            record["probes"] = follow.of(relation, record)
    return records


def _names(kind: str) -> list[str]:
    """Return all possible names of one kind, in a fixed order."""
    if kind in _WORDS:
        return [word.replace("_", " ") for word in _WORDS[kind].split()]
    columns: Sequence[list[str]] = [column.split() for column in _PARTS[kind]]
    return ["".join(pieces).replace("_", " ") for pieces in product(*columns)]


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    """Return the items in random order. Use only `rng.random`: Python promises to keep no other method the same."""
    return sorted(items, key=lambda _: rng.random())
