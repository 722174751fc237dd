"""What the base says to prompts that have nothing to do with the facts: training keeps the model near these answers.

There are general prompts that ship with the package, prompts of the user's own, and neighbours: unfinished sentences of
the facts themselves, put about another subject. `lessons.to_keep` joins them, and `answered` asks the base.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from forgetlearn.config.schema import EvaluateSettings, KeepSettings
from forgetlearn.errors import ConfigError, FactError, some
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.scorer import Failure, Generated, Scorer
from forgetlearn.facts import Fact, matching, read_facts
from forgetlearn.facts.files import SUFFIXES
from forgetlearn.facts.sentences import is_unfinished
from forgetlearn.method.wordings import shortened, wordings
from forgetlearn.models.encoding import Encoded, Encoder, Prompt, turns_of
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.top_logprobs import TopLogprobs
from forgetlearn.storage import digests, disk
from forgetlearn.storage.records import KeptText

log = logging.getLogger("forgetlearn")
GENERAL, QUESTION, REWORDED, OWN, EARLIER, NEIGHBOUR = (
    "general prompts",
    "general questions",
    "reworded general prompts",
    "prompts of keep.source",
    "earlier facts",
    "neighbours",
)
ALL_GENERAL = (GENERAL, QUESTION, REWORDED)
AGAIN = "earlier facts learned again"
# Tokens of an answer.
KEPT_TOKENS: Mapping[str, int] = {GENERAL: 24, QUESTION: 12, REWORDED: 12, OWN: 24, EARLIER: 24, NEIGHBOUR: 8}
SHORT_ANSWERS = ("Answer in a few words: {}", "Short answer only: {}")
TOP_K = 64
NEIGHBOURS_OF_A_FACT, MOST_NEIGHBOURS = 4, 200
MOST_EARLIER = 200  # facts of earlier updates; of a long chain each update draws others
MOST_LETTERS = 60  # of a prompt that is reworded
MOST_TRIED = 50  # other subjects for one question
LONG_WORD = 4  # letters; two kinds of question that share such a word may ask for the same
MOST_BYTES = 1 << 22  # of a file of prompts
Wordings = tuple[str, ...]  # other ways to ask what a prompt asks


def read_source(settings: KeepSettings, facts: Iterable[Fact]) -> tuple[str, ...]:
    """Return the prompts in the file `keep.source`; none if no file is named, or keep.weight is 0.

    Raises:
        ConfigError: the file cannot be read or is empty, or asks in any wording what a fact asks, or a fact's probe.
    """
    if not settings.source or not settings.weight:
        return ()
    facts = list(facts)
    asked = _prompts_in(Path(settings.source), f"keep.source = {settings.source}")
    prompts = tuple(asked)
    if both := changed(asked, facts):
        raise ConfigError(
            f"keep.source = {settings.source}: {len(both)} of {len(prompts)} prompts ask what the facts change, so "
            f"the answer cannot stay: {some(list(both.values()))}. Remove them from the file."
        )
    probes = {matching.normalise(probe.prompt) for fact in facts for probe in fact.locality}
    if scored := [prompt for prompt in prompts if matching.normalise(prompt) in probes]:
        raise ConfigError(
            f"keep.source = {settings.source}: {len(scored)} of {len(prompts)} prompts are locality prompts of "
            f"the facts, which measure damage, so they cannot be trained on: {some(scored)}. Remove them here or there."
        )
    return prompts


def check(settings: KeepSettings, facts: Iterable[Fact]) -> None:
    """Raise the errors of `read_source` for all files that are named, before anything is written."""
    read_source(settings, facts)
    for file in settings.facts if settings.weight else ():
        _prompts_in(Path(file), f"keep.facts = {file}")


def read_kept_facts(settings: KeepSettings, facts: Iterable[Fact]) -> tuple[str, ...]:
    """Return the prompts of the facts in the files `keep.facts` that these facts do not change; see `read_source`."""
    if not settings.weight:
        return ()
    found: dict[str, Wordings] = {}
    for file in settings.facts:
        for prompt, others in _prompts_in(Path(file), f"keep.facts = {file}").items():
            found[prompt] = (*found.get(prompt, ()), *others)
    gone = changed(found, facts)
    if gone:
        log.info("keep.facts: %d of %d facts are not kept: the facts to update change them", len(gone), len(found))
    return tuple(prompt for prompt in found if prompt not in gone)


def wordings_of(facts: Iterable[Fact]) -> dict[str, Wordings]:
    """Return the prompts of facts, each with its rephrasings."""
    return {fact.prompt: fact.rephrase_prompts for fact in facts}


def changed(kept: Mapping[str, Wordings], facts: Iterable[Fact]) -> dict[str, str]:
    """Return those of the prompts that ask what the facts change, in their own words or as one of their rephrasings.

    Each comes with its form for a message, which names the wording that is asked if it is another one.
    """
    asked = _asked(facts)
    found: dict[str, str] = {}
    for prompt, others in kept.items():
        if same := next((text for text in (prompt, *others) if matching.normalise(text) in asked), None):
            found[prompt] = prompt if same == prompt else f"{prompt} (in other words: {same})"
    return found


def rehearsed(earlier: Sequence[Fact], facts: Iterable[Fact], seed: str) -> list[Fact]:
    """Return the facts of earlier updates that these facts do not change, drawn by a seed if there are many.

    The draw depends on the seed and the facts alone, not on their order.
    """
    gone = changed(wordings_of(earlier), facts)
    still = [fact for fact in earlier if fact.prompt not in gone]
    drawn = sorted(still, key=lambda fact: hashlib.sha256(f"{seed}:{fact.id}".encode()).digest())[:MOST_EARLIER]
    if len(drawn) < len(still):
        log.info("%d of the %d facts of earlier updates are kept, drawn by the seed", len(drawn), len(still))
    return drawn


def without_scored(prompts: Mapping[Prompt, str], facts: Iterable[Fact]) -> dict[Prompt, str]:
    """Return the prompts whose answers are not scored as unrelated: a score of what was trained on would be no test."""
    scored = [probe.prompt for fact in facts for probe in fact.locality]
    tests = {matching.normalise(turns_of(prompt)[-1]) for prompt in (*scored, *general_prompts.measuring())}
    kept = {prompt: kind for prompt, kind in prompts.items() if matching.normalise(turns_of(prompt)[-1]) not in tests}
    if left_out := Counter(kind for prompt, kind in prompts.items() if prompt not in kept):
        counted = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        log.warning("not trained on, because their answers are scored: %s", counted)
    return kept


def fingerprint(settings: KeepSettings) -> dict[str, str]:
    """Return the hashes of the files `keep.source` and `keep.facts` as entries of a run's inputs; empty if none."""
    if not settings.weight:
        return {}
    found = {"keep_sha256": digests.sha256_of(Path(settings.source))} if settings.source else {}
    if settings.facts:
        found["keep_facts_sha256"] = digests.hash_of([digests.sha256_of(Path(file)) for file in settings.facts])
    return found


def _prompts_in(file: Path, place: str) -> dict[str, Wordings]:
    """Return the prompts in a file, each with its rephrasings."""
    if file.suffix.lower() in SUFFIXES:
        try:
            return wordings_of(read_facts(file, purpose="forget"))
        except FactError as error:
            raise ConfigError(
                f"{place}: cannot be read as a file of facts: {error}\nA text file with one prompt per line will do."
            ) from None
    if not file.is_file():  # a pipe or a device might never end
        raise ConfigError(f"{place}: is not a file. Give a text file with one prompt per line, or a file of facts.")
    lines = disk.read_given(file, place, "a list of prompts", MOST_BYTES).splitlines()
    prompts: dict[str, Wordings] = dict.fromkeys((line.strip() for line in lines if line.strip()), ())
    if not prompts:
        raise ConfigError(f"{place}: has no prompts. Give a text file with one prompt per line.")
    return prompts


def general(facts: Iterable[Fact]) -> dict[Prompt, str]:
    """Return the general prompts for keeping and their kinds, without those that a fact may change the answer to.

    These ask what a fact's prompt asks, have no long words but those of a fact's prompt, or name what a fact names.
    """
    facts = list(facts)
    asked = _asked(facts)
    words = [_long_words(prompt) for prompt in asked]
    named = {name for fact in facts for name in _named(fact)}
    kinds = dict.fromkeys(general_prompts.keeping(), GENERAL) | dict.fromkeys(general_prompts.questions(), QUESTION)

    def may_change(prompt: str) -> bool:
        own = _long_words(prompt.partition(" ")[2])  # without "What" or "Who", which a fact's sentence does not have
        covered = len(own) > 1 and any(own <= theirs for theirs in words)
        return covered or matching.normalise(prompt) in asked or not named.isdisjoint(_names(prompt))

    return {prompt: kind for prompt, kind in kinds.items() if not may_change(turns_of(prompt)[-1])}


def _asked(facts: Iterable[Fact]) -> set[str]:
    """Return what the facts are asked by, normalised: prompts and rephrasings."""
    return {matching.normalise(prompt) for fact in facts for prompt in fact.prompts}


def _named(fact: Fact) -> Iterator[str]:
    """Yield the names in a fact. A prompt may begin with one if the fact does not say what it is about."""
    for prompt in fact.prompts:
        yield from _names(prompt if fact.subject or not is_unfinished(prompt) else f"_ {prompt}")
    yield from _names(f"_ {fact.subject}")


def reworded(prompts: Iterable[Prompt], *, is_chat: bool) -> list[str]:
    """Return short prompts, each in one of the wordings that facts are taught in, or with a request to be short.

    Otherwise the wordings themselves would call for the facts' bare answers.
    """
    found = []
    for number, prompt in enumerate(each for each in prompts if isinstance(each, str) and len(each) <= MOST_LETTERS):
        asked_short = [short.format(prompt) for short in SHORT_ANSWERS]
        own = dict.fromkeys((*wordings(prompt, is_chat=is_chat), *shortened(prompt), *asked_short))
        others = [wording for wording in own if wording != prompt]
        found.append(others[number % len(others)])
    return found


def neighbours(facts: Sequence[Fact]) -> list[str]:
    """Return unfinished sentences of the facts, each about the subject of another fact.

    What a fact teaches about its own subject must not be contradicted, so a sentence is put about a subject only if
    the subject's own facts are of another kind. A fact whose prompt does not name its subject has no neighbours, and
    neither has a question: there they cost generality and kept little. The draw depends on the texts alone, so that it
    is the same with every seed.
    """
    unfinished = [fact for fact in facts if is_unfinished(fact.prompt)]
    named = [fact for fact in unfinished if _kind(fact)]
    if nameless := len(unfinished) - len(named):
        log.info("%d unfinished sentences have no neighbours to keep: they do not contain the field subject", nameless)
    asked = sorted(named, key=lambda fact: hashlib.sha256(fact.id.encode()).digest())
    kinds: dict[str, set[str]] = {}  # what is asked about each subject: words of all its facts
    for fact in facts:
        kinds.setdefault(fact.subject, set()).update(_long_words(_kind(fact) or fact.prompt))
    taught = _asked(facts)
    found: dict[str, None] = {}
    for place, fact in enumerate(asked):
        own, made = _long_words(_kind(fact)), 0
        for other in (asked[place + 1 :] + asked[:place])[:MOST_TRIED]:
            prompt = fact.prompt.replace(fact.subject, other.subject)
            if (
                other.subject in fact.prompt
                or own & kinds[other.subject]
                or matching.normalise(prompt) in taught
                or _kind(fact) == _kind(other)
            ):
                continue
            found[prompt] = None
            made += 1
            if made == NEIGHBOURS_OF_A_FACT:
                break
        if len(found) >= MOST_NEIGHBOURS:
            break
    return list(found)[:MOST_NEIGHBOURS]


def _kind(fact: Fact) -> str:
    """Return what a fact's prompt asks about its subject: the prompt without the subject, "" if it does not name it."""
    return fact.prompt.replace(fact.subject, "{}") if fact.subject and fact.subject in fact.prompt else ""


def _names(text: str) -> list[str]:
    """Return the words with a capital letter, except the first word."""
    return [word for word in re.findall(r"[^\W\d]+", text)[1:] if word[0].isupper()]


def _long_words(text: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"[^\W_]+", text) if len(word) >= LONG_WORD}


def answered(
    lm: LanguageModel, prompts: Mapping[Prompt, str], settings: EvaluateSettings
) -> tuple[list[KeptText], list[TopLogprobs]]:
    """Return the base's own answers to prompts (prompt -> its kind), and its likeliest tokens at each of their tokens.

    A prompt that the model cannot be asked, or does not answer, is left out and counted in the log.
    """
    scorer = Scorer(lm, settings, "kept answers")
    replies: dict[Prompt, Generated | Failure] = {}
    for tokens in sorted(set(KEPT_TOKENS.values())):  # apart, because a batch takes as long as its longest answer
        own = [prompt for prompt, kind in prompts.items() if KEPT_TOKENS[kind] == tokens]
        replies |= scorer.say(own, dict.fromkeys(own, Room(tokens, lines=tokens)))
    texts = []
    for prompt, kind in prompts.items():
        reply = replies[prompt]
        if isinstance(reply, Generated) and (said := reply.text.removesuffix("\ufffd").strip()):
            shown = prompt if isinstance(prompt, str) else list(prompt)
            texts.append(KeptText(prompt=shown, text=said, ends=not reply.truncated, source=kind))
    read = encoded(lm.encoder, texts)
    if left_out := len(prompts) - len(read):
        log.info("%d prompts to keep are left out: the model cannot be asked them, or says nothing", left_out)
    top = scorer.top(dict(read), TOP_K) if read else {}
    return [texts[number] for number in read], [top[number] for number in read]


def encoded(encoder: Encoder, texts: Sequence[KeptText]) -> dict[int, Encoded]:
    """Return by its number each kept text that can be encoded."""
    found = {}
    for number, kept in enumerate(texts):
        try:
            found[number] = encoder.encode(kept.asked, kept.text, end=kept.ends)
        except FactError:
            continue
    return found
