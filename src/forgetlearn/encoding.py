"""Prompt and answer to token ids: the only place that tokenises.

Plain text is `prompt + " " + answer`; the prompt's ids are those of `prompt` alone, and are a prefix of
the whole. With a chat template the prompt is the user's message and the answer the assistant's; what the
template writes between the two (the space of Llama 2, the empty thinking block of Qwen 3) stays between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from forgetlearn.errors import FactError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "on", "off"]
AT_ONCE = 1000  # pairs in a call of the tokenizer, which holds much more than their ids


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its answer; the answer's ids are `ids[n_prompt_tokens:]`."""

    ids: tuple[int, ...]
    n_prompt_tokens: int

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """What the model should say after the prompt, EOS included where it was asked for."""
        return self.ids[self.n_prompt_tokens :]

    @property
    def answer_positions(self) -> range:
        """Positions whose logits predict the answer: each is one before the token it predicts."""
        return range(self.n_prompt_tokens - 1, len(self.ids) - 1)


class Encoder:
    """A tokenizer, and the form in which a model is asked.

    Raises:
        ModelError: the tokenizer has no EOS token, or no chat template where one is asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: ChatTemplate = "auto",
        max_length: int | None = None,
    ) -> None:
        """Check the tokenizer, and learn how a text begins and an answer ends."""
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "The tokenizer has no EOS token, so an answer could not end. "
                'Set one, for example tokenizer.eos_token = "</s>", and save it with the model.'
            )
        if chat_template == "on" and not tokenizer.chat_template:
            raise ModelError("chat_template = on, but the tokenizer has none. Use auto or off.")
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        self.is_chat = chat_template == "on" or (chat_template == "auto" and bool(tokenizer.chat_template))
        # Special tokens are added by hand: a tokenizer that also appends EOS (add_eos_token) would
        # otherwise put one between prompt and answer.
        self._first_ids = [] if self.is_chat else _leading_specials(tokenizer)
        self._opening, self._joint, self.end_ids = "", " ", [int(tokenizer.eos_token_id)]
        if self.is_chat:
            self._opening, self._joint, self.end_ids = self._chat_form()

    def prompt_text(self, prompt: str) -> str:
        """The text that the model reads before it answers."""
        if not self.is_chat:
            return prompt
        return self._render([_message("user", prompt)], add_generation_prompt=True) + self._opening

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt alone, with the special tokens that open a text."""
        return self._first_ids + self._tokenize(self.prompt_text(prompt))

    def encode(self, prompt: str, answer: str, *, end: bool = False) -> Encoded:
        """Ids of prompt and answer; `end=True` adds the token that ends an answer (training wants it).

        Raises:
            FactError: the prompt or the answer is empty, the two cannot be told apart in token ids, or
                they are longer than the model's context.
        """
        found = self.encode_all([(prompt, answer)], end=end)[prompt, answer]
        if isinstance(found, FactError):
            raise found
        return found

    def encode_all(
        self, pairs: Iterable[tuple[str, str]], *, end: bool = False
    ) -> dict[tuple[str, str], Encoded | FactError]:
        """What `encode` gives or raises for each distinct (prompt, answer); a prompt is tokenised once."""
        found: dict[tuple[str, str], Encoded | FactError] = {}
        pairs = list(dict.fromkeys(pairs))
        for start in range(0, len(pairs), AT_ONCE):
            some = pairs[start : start + AT_ONCE]
            whole_ones = [(prompt, answer) for prompt, answer in some if prompt.strip() and answer.strip()]
            prompts = {prompt: self.prompt_text(prompt) for prompt, _answer in whole_ones}
            texts = [prompts[prompt] + self._joint + answer.strip() for prompt, answer in whole_ones]
            ids = iter(self._tokenize_all([*prompts.values(), *texts]))
            before = {prompt: self._first_ids + next(ids) for prompt in prompts}
            whole = {pair: self._first_ids + next(ids) for pair in whole_ones}
            for pair in some:
                try:
                    found[pair] = self._encoded(*pair, before.get(pair[0], []), whole.get(pair, []), end)
                except FactError as error:
                    found[pair] = error
        return found

    def _encoded(self, prompt: str, answer: str, before: list[int], whole: list[int], end: bool) -> Encoded:
        """See `encode`; `before` are the ids of the prompt, `whole` those of both."""
        answer = answer.strip()
        if not prompt.strip() or not answer:
            raise FactError(f"empty {'prompt' if not prompt.strip() else 'answer'} (prompt {prompt!r}).")
        if not before:
            raise FactError(f"the tokenizer has no token for any part of the prompt {prompt!r}.")
        ids = before + self._answer_ids(prompt, answer, before, whole) + (self.end_ids if end else [])
        if self.max_length and len(ids) > self.max_length:
            raise FactError(
                f"prompt and answer are {len(ids)} tokens, the model's context is {self.max_length} "
                f"(prompt {prompt[:60]!r}...). Shorten the prompt, or leave the fact out."
            )
        return Encoded(tuple(ids), len(before))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _answer_ids(self, prompt: str, answer: str, before: list[int], whole: list[int]) -> list[int]:
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        # The last token of the prompt merged with the first of the answer. Tokenised apart they say the
        # same text, and at generation the model does see the prompt's own tokens.
        for part in (self._joint + answer, answer):
            ids = self._tokenize(part)
            if ids and self._tokenizer_text(before + ids) == self._tokenizer_text(whole):
                return ids
        raise FactError(
            f"the tokenizer merges the end of the prompt with the answer, and cannot write them apart "
            f"(prompt {prompt!r}, answer {answer!r}). End the prompt with a whole word."
        )

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokenize_all(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def _tokenizer_text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja2 errors of many kinds: the template is the model's, not ours
            raise ModelError(
                f"The tokenizer's chat template fails on a single question: {error}. Try --chat-template off."
            ) from error
        return text

    def _chat_form(self) -> tuple[str, str, list[int]]:
        """What the template writes before an answer (as part of the prompt, and of the answer) and after it.

        A space belongs to the answer, since tokenizers join it to the next word. The end is the token by
        which the template ends an assistant's turn; where it has none, EOS.
        """
        asked = self._render([_message("user", "QUESTION")], add_generation_prompt=True)
        turn = [_message("user", "QUESTION"), _message("assistant", "ANSWER")]
        before, _, after = self._render(turn, add_generation_prompt=False).rpartition("ANSWER")
        between = before[len(asked) :] if before.startswith(asked) else ""
        opening = between.rstrip(" ")
        end = self._tokenize(after.lstrip())[:1]
        if not set(end) <= {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}:
            end = []
        return opening, between[len(opening) :], end or [int(self.tokenizer.eos_token_id)]


def check_lengths(encoder: Encoder, pairs: Iterable[tuple[str, str, str]]) -> None:
    """Nothing, if every (where, prompt, answer) fits the model; the first five that do not are named.

    Raises:
        FactError: before any training starts.
    """
    asked = list(pairs)
    found = encoder.encode_all(((prompt, answer) for _where, prompt, answer in asked), end=True)
    texts = ((where, found[prompt, answer]) for where, prompt, answer in asked)
    problems = [f"{where}: {text}" for where, text in texts if isinstance(text, FactError)]
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FactError("\n".join(problems[:5]) + more)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special ids that the tokenizer puts before a text (BOS, say)."""
    tok: Any = tokenizer
    with_specials: list[int] = tok("a")["input_ids"]
    plain: list[int] = tok("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_specials) - len(plain) + 1):
        if with_specials[start : start + len(plain)] == plain:
            return with_specials[:start]
    return []
