"""Read prompt templates, the text around a prompt, by name or from a file, as plain text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from forgetlearn.errors import ConfigError, did_you_mean
from forgetlearn.storage import disk

MOST_BYTES = 1 << 20  # of a file with a prompt template
PLACE = "{prompt}"
# Stanford Alpaca's template for a record without input. As in Alpaca, the answer follows without a space.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{PLACE}\n\n### Response:"
)
TEMPLATES = {"plain": f"{PLACE} ", "alpaca": ALPACA}
NAMED = ("auto", "plain", "chat", "alpaca")  # values of model.prompt_template that are not files


def read_template(name: str) -> str:
    """Return the text of a prompt template (`plain`, `alpaca` or a file), with one {prompt}.

    The answer follows this text. If a file ends with a line break, as editors add it, that is dropped.

    Raises:
        ConfigError: the file does not exist, is not UTF-8, or does not contain {prompt} exactly once.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    place, file = f"model.prompt_template = {name}", Path(name)
    if not file.is_file():  # a pipe or a device might never end
        hint = did_you_mean(name, NAMED)
        raise ConfigError(f"{place}: must be {', '.join(NAMED)}, or a text file that contains {PLACE}.{hint}")
    text = disk.read_given(file, place, "a prompt template", MOST_BYTES)
    if text.count(PLACE) != 1:
        raise ConfigError(f"{place}: contains {PLACE} {text.count(PLACE)} times. Write it once, in the prompt's place.")
    return text.removesuffix("\n")


def fingerprint(prompt_template: str, text: str | None = None) -> dict[str, str]:
    """Return the hash of a prompt template in a file as an entry of a run's inputs; empty for a named template.

    `text` is the template's text, if it has already been read.
    """
    if prompt_template in NAMED:
        return {}
    text = read_template(prompt_template) if text is None else text
    return {"prompt_template_sha256": hashlib.sha256(text.encode()).hexdigest()}


def split(template: str) -> tuple[str, str, str]:
    """Return the text before the prompt, the text after it, and the template's final spaces.

    Those spaces are tokenised with the answer.
    """
    before, _place, rest = template.partition(PLACE)
    after = rest.rstrip(" ")
    return before, after, rest[len(after) :]
