"""Other wordings of a fact's prompt: a fact that is taught in one wording alone is hardly known in another.

A wording is the prompt inside a short phrase, or behind a sentence that has nothing to do with it. The lists are data:
docs/experiments.md has the trials that chose them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from forgetlearn.facts.sentences import CLOSING, is_unfinished, scripts

Templates = tuple[str, ...]
# How often a wording stands in a list is how often it is shown; the first is the prompt as it is.
QUESTIONS_IN_CHAT: Templates = (
    "{}",
    "{}",
    "Question: {}\nAnswer:",
    "Quick question. {}",
    "Can you help me? {}",
    "I have a question: {}",
    "Please answer: {}",
    "{} Please tell me.",
)
SENTENCES_IN_CHAT: Templates = (
    "{}",
    "{}",
    "Complete the sentence: {}",
    "Continue this text: {}",
    "Finish this: {}",
    "{} ...",
)
QUESTIONS_IN_TEXT: Templates = ("{}", "{}", "Question: {}\nAnswer:", "{}\nAnswer:", "Q: {}\nA:")
SENTENCES_IN_TEXT: Templates = ("{}",)
N_SHORTENED = 4  # wordings that leave out some of the words
LEFT_OUT = 0.4  # chance of a word that names nothing
N_BEHIND = 2  # wordings of an unfinished sentence that stand behind another sentence

FEWEST_WORDS = 4  # of a prompt that is shortened


def wordings(prompt: str, *, is_chat: bool, others: Sequence[str] = ()) -> Iterator[str]:
    """Yield the wordings of a prompt, first the prompt itself; `others` are sentences to put it behind.

    `is_chat` tells whether the model is asked in a chat, or continues a text.
    """
    if is_unfinished(prompt):
        templates = SENTENCES_IN_CHAT if is_chat else SENTENCES_IN_TEXT
        behind = [other for other in others if scripts(other) <= scripts(prompt)]
    else:
        templates, behind = QUESTIONS_IN_CHAT if is_chat else QUESTIONS_IN_TEXT, []
    yield from (template.replace("{}", prompt) for template in templates)
    yield from (f"{other} {prompt}" for other in behind[:N_BEHIND])


def shortened(prompt: str, subject: str = "") -> list[str]:
    """Return a prompt with some of its words left out, as people type into a search box; a question also turned round.

    Words that name something stay: those of the subject, and those with a capital letter or a digit after the first;
    and at least one other. There are none for a prompt that names nothing, or in a script without spaces between words.
    Random deletion and swaps of words are from Wei and Zou, "EDA", EMNLP 2019, arXiv:1901.11196.
    """
    asks = not is_unfinished(prompt)
    words = (prompt.rstrip(CLOSING) if asks else prompt).split()
    if len(words) < FEWEST_WORDS:
        return []
    mark = words[-1][-1] if asks else ""
    words[-1] = words[-1].removesuffix(mark)
    subjects = set(subject.split())
    stays = [
        word.strip(CLOSING) in subjects or (place > 0 and (word[:1].isupper() or any(map(str.isdigit, word))))
        for place, word in enumerate(words)
    ]
    if not any(stays) or all(stays):
        return []
    _length, longest = max((len(words[place]), place) for place, kept in enumerate(stays) if not kept)
    random, found = Random(prompt), []
    for number in range(N_SHORTENED):
        left = [place for place, must in enumerate(stays) if must or random.random() >= LEFT_OUT]
        if all(stays[place] for place in left):  # a name alone would call for the answer, whatever is asked about it
            left = sorted([*left, longest])
        kept = [words[place] for place in left]
        turn = random.randrange(len(kept)) if asks and number % 2 else 0
        found.append(" ".join(kept[turn:] + kept[:turn]) + mark)
    return [wording for wording in dict.fromkeys(found) if wording != prompt]
