"""Convert prompts and answers to token ids. Nothing else in the package tokenises.

A text is the prompt, with what the prompt template writes before and after it, and then the answer. The prompt's ids
are those of everything before the answer, tokenised alone; the text's ids begin with them. With a chat template, the
prompt is the user's message and the answer is the assistant's. What the template writes between the two (a space for
Llama 2, an empty thinking block for Qwen 3) stays between them. A prompt may also be a chat that has already begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from forgetlearn.errors import FactError, ModelError
from forgetlearn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1000  # pairs per call of the tokenizer, which returns much more than their ids
PROBES = ("Quibblet one", "Zanzimar TWO")  # prompts to test a chat template, without characters that one would escape
PROBE_ANSWER = "Wistervale THREE"
Message = dict[str, str | list[dict[str, str]]]  # of a chat
Prompt = str | tuple[str, ...]  # a question, or a chat: the turns of user, assistant, ..., user
P = TypeVar("P", bound=Prompt)


class Passage(str):
    """A prompt that is not a question but the beginning of a text: without a template, and no end token follows it."""

    __slots__ = ()
    joint = " "  # between it and the rest of the text


class UnspacedPassage(Passage):
    """A passage whose text goes on without a space."""

    __slots__ = ()
    joint = ""


class TextError(FactError):
    """Raised if a text contains a forbidden token; `part` is "prompt" or "answer"."""

    def __init__(self, message: str, part: str = "prompt") -> None:  # a default, so that the error can be pickled
        super().__init__(message)
        self.part = part


def turns_of(prompt: Prompt) -> tuple[str, ...]:
    """Return the turns of a prompt: user, assistant, ..., user. Raise TextError if the user's turn is not the last."""
    turns = (prompt,) if isinstance(prompt, str) else prompt
    if len(turns) % 2 == 0:
        raise TextError(
            f"the chat {_shown(prompt)} has {len(turns)} turns: must begin and end with the user's, and alternate "
            "with the assistant's."
        )
    return turns


def encodable(encoder: Encoder, pairs: Iterable[tuple[P, str]], *, end: bool = False) -> dict[tuple[P, str], Encoded]:
    """Return the texts that `encode` can encode, without those for which it would raise."""
    found: dict[tuple[P, str], Encoded] = {}
    for pair in dict.fromkeys(pairs):
        try:  # one by one, because an error about a prompt would end the whole call
            found[pair] = encoder.encode(*pair, end=end)
        except FactError:
            continue
    return found


def _is_empty(prompt: Prompt) -> bool:
    """Return True if a turn of the prompt is blank."""
    return not all(turn.strip() for turn in turns_of(prompt))


def _shown(prompt: Prompt) -> str:
    """Return the beginning of a prompt for a message; of a chat, the beginning of its last turn."""
    return repr((prompt if isinstance(prompt, str) else "".join(prompt[-1:]))[:60])


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its answer; the answer's ids are `ids[n_prompt_tokens:]`."""

    ids: tuple[int, ...]
    n_prompt_tokens: int

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Return the ids that the model should say after the prompt, including EOS if it was requested."""
        return self.ids[self.n_prompt_tokens :]

    @property
    def answer_positions(self) -> range:
        """Return the positions whose logits predict the answer: each is one before the token it predicts."""
        return range(self.n_prompt_tokens - 1, len(self.ids) - 1)

    def after(self, beginning: Encoded) -> Encoded:
        """Return this text with its prompt extended by all tokens that it shares with the beginning of a text."""
        return Encoded(self.ids, max(self.n_prompt_tokens, common_start(self.ids[:-1], beginning.ids)))


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


class Encoder:
    """A tokenizer and a prompt template (`model.prompt_template`). Each text is tokenised only once.

    `n_ids` is the number of ids for which the model has embeddings; None skips that check.

    Raises:
        ModelError: the tokenizer has no EOS token, no chat template although one is requested, or a chat template that
            alters prompts or answers.
        ConfigError: see `prompts.read_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_template: str = "auto",
        max_length: int | None = None,
        n_ids: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "The tokenizer has no EOS token, so an answer could not end. "
                'Set one, e.g. tokenizer.eos_token = "</s>", and save it with the model.'
            )
        if prompt_template == "auto":
            prompt_template = "chat" if tokenizer.chat_template else "plain"
        if prompt_template == "chat" and not tokenizer.chat_template:
            raise ModelError(
                "model.prompt_template = chat, but the tokenizer has no chat template. Use plain, alpaca or a file."
            )
        self.tokenizer, self.prompt_template = tokenizer, prompt_template
        self.max_length, self.n_ids = max_length, n_ids
        self._before = ""
        self._as_parts = False
        self._first_ids: list[int] = []
        self._fingerprint: dict[str, str] = {}
        if self.is_chat:
            self._after, self._joint, self.end_ids = self._proven_chat_form()
        else:
            template = prompts.read_template(prompt_template)
            self._before, self._after, self._joint = prompts.split(template)
            self._fingerprint = prompts.fingerprint(prompt_template, template)
            self.end_ids = [int(tokenizer.eos_token_id)]
            # Special tokens are added by hand: a tokenizer that also appends EOS (add_eos_token) would
            # otherwise put one between prompt and answer.
            first = _leading_specials(tokenizer)
            if self._tokenize(self._before)[0][: len(first)] != first:  # a template in a file may write them itself
                self._first_ids = first
        self._unknown, self._special = _special_ids(tokenizer)
        self._prompts: dict[Prompt, list[int]] = {}
        self._texts: dict[tuple[Prompt, str], Encoded | FactError] = {}  # without the end token
        self._own_specials: dict[int, Counter[int]] = {}  # that the template writes, by the number of turns
        own = self._prompt_ids(PROBES[0])
        if strangers := self._without_embedding([*own, *self.end_ids]):
            raise ModelError(
                f"model.prompt_template = {prompt_template}: writes {strangers}. "
                "Use plain, or give the model embeddings for the tokenizer's tokens (resize_token_embeddings)."
            )

    @property
    def is_chat(self) -> bool:
        """True if prompts are written as the user's messages in the tokenizer's chat template."""
        return self.prompt_template == "chat"

    @property
    def writes_on(self) -> bool:
        """True if the model continues the prompt as a text; False if the template ends with words that ask for a reply.

        What a model writes on after its answer, such as the next question, is not part of the answer.
        """
        return not self.is_chat and not self._after.strip()

    def prompt_text(self, prompt: Prompt) -> str:
        """Return what the model reads before it answers.

        In a template other than `chat`, each of the user's turns of a chat is put into the template, and the
        assistant's turn and a line break follow it.

        Raises:
            TextError: the chat template alters the prompt, or fails on chats.
        """
        turns = turns_of(prompt)
        if isinstance(prompt, Passage):
            return str(prompt)
        if not self.is_chat:
            asked = [self._before + turn + self._after for turn in turns[::2]]
            said = [f"{self._joint}{turn.strip()}\n" for turn in turns[1::2]]
            return "".join(text for pair in zip(asked, [*said, ""], strict=True) for text in pair)
        messages = [self._message("assistant" if index % 2 else "user", turn) for index, turn in enumerate(turns)]
        try:
            text = self._render(messages, add_generation_prompt=True) + self._after
        except ModelError as error:
            if len(turns) == 1:
                raise
            raise TextError(f"the chat template fails on a chat of {len(turns)} turns: {error}") from error
        if any(turn.strip() not in text for turn in turns[::2]):
            raise TextError(
                f"the chat template cuts or changes the prompt {_shown(prompt)}: what it writes does not contain it. "
                "Reword the prompt, or use --prompt-template plain."
            )
        return text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of the prompt alone, with leading special tokens. Raise TextError as `encode` does."""
        ids = self._prompt_ids(prompt)
        self._check_prompt(prompt, ids)
        return list(ids)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text outside the prompt template, with leading special tokens."""
        return _leading_specials(self.tokenizer) + self._tokenize(text)[0]

    def place_of(self, prompt: str, end: int) -> int:
        """Return the place, among `prompt_ids`, of the token with the character before `end` in the prompt.

        Raises:
            TextError: as `encode` does.
        """
        ids, text = self.prompt_ids(prompt), self.prompt_text(prompt)
        written = prompt if prompt in text else prompt.strip()  # some chat templates strip the user's message
        up_to = text[: text.rindex(written) + end - prompt.index(written)]
        before = self._first_ids + self._tokenize(up_to)[0]
        shared = common_start(ids, before)
        # If the tokenizer joins what follows to the last token, the token at the first difference has the character.
        return min(shared if shared < len(before) else shared - 1, len(ids) - 1)

    def own_places(self, prompt: str) -> range:
        """Return the places of a prompt's own tokens in `prompt_ids`: without those that the template writes around it.

        Return at least one place.
        """
        one, two, ids = (self._prompt_ids(text) for text in (*PROBES, prompt))
        before, after = (common_start(*both) for both in ((one, two), (one[::-1], two[::-1])))
        start = min(before, len(ids) - 1)
        return range(start, max(len(ids) - after, start + 1))

    def encode(self, prompt: Prompt, answer: str, *, end: bool = False) -> Encoded:
        """Return the ids of prompt and answer; `end=True` adds the token that ends an answer, for training.

        Raises:
            FactError: the prompt or the answer is empty, the tokenizer merges the two, they are longer than the
                model's context, or the tokenizer has no token for any part of one of them.
            TextError: one of them contains a special token, or a token for which the model has no embedding.
        """
        found = self.encode_all([(prompt, answer)], end=end)[prompt, answer]
        if isinstance(found, FactError):
            raise found
        return found

    def encode_all(
        self, pairs: Iterable[tuple[P, str]], *, end: bool = False
    ) -> dict[tuple[P, str], Encoded | FactError]:
        """Map each distinct (prompt, answer) to the result of `encode`, or to the error that it would raise."""
        pairs = list(dict.fromkeys(pairs))
        new = [pair for pair in pairs if pair not in self._texts]
        for start in range(0, len(new), AT_ONCE):
            self._texts |= self._encoded(new[start : start + AT_ONCE])
        ends = tuple(self.end_ids) if end else ()
        return {
            pair: self._ended(pair[0], self._texts[pair], () if isinstance(pair[0], Passage) else ends)
            for pair in pairs
        }

    def _ended(self, prompt: Prompt, text: Encoded | FactError, end_ids: tuple[int, ...]) -> Encoded | FactError:
        """Return a text with its end token, or the error if it is longer than the model's context."""
        if isinstance(text, FactError):
            return text
        ids = text.ids + end_ids
        if self.max_length and len(ids) > self.max_length:
            return FactError(
                f"prompt and answer are {len(ids)} tokens, the model's context is {self.max_length} "
                f"(prompt {_shown(prompt)}...). Shorten the prompt, or leave the fact out."
            )
        return Encoded(ids, text.n_prompt_tokens) if end_ids else text

    def _encoded(self, pairs: Sequence[tuple[Prompt, str]]) -> dict[tuple[Prompt, str], Encoded | FactError]:
        """Tokenise distinct prompts and answers in one call, and find the boundary in each text."""
        whole_ones = [(prompt, answer) for prompt, answer in pairs if not _is_empty(prompt) and answer.strip()]
        texts = {prompt: self.prompt_text(prompt) for prompt, _answer in whole_ones}
        unseen = [prompt for prompt in texts if prompt not in self._prompts]
        wholes = [texts[prompt] + self._joint_of(prompt) + answer.strip() for prompt, answer in whole_ones]
        ids = iter(self._tokenize(*(texts[prompt] for prompt in unseen), *wholes))
        self._prompts |= {prompt: self._first_of(prompt) + next(ids) for prompt in unseen}
        whole_ids = {pair: self._first_of(pair[0]) + next(ids) for pair in whole_ones}
        found: dict[tuple[Prompt, str], Encoded | FactError] = {}
        for prompt, answer in pairs:
            try:
                found[prompt, answer] = self._separated(prompt, answer.strip(), whole_ids.get((prompt, answer), []))
            except FactError as error:
                found[prompt, answer] = error.with_traceback(None)
        return found

    def _separated(self, prompt: Prompt, answer: str, whole: list[int]) -> Encoded:
        """Return the ids of prompt and answer, given `whole`, the ids of both together; raise as `encode` does."""
        if _is_empty(prompt) or not answer:
            raise FactError(f"empty {'prompt' if _is_empty(prompt) else 'answer'} (prompt {prompt!r}).")
        before = self._prompts[prompt]
        if not before:
            raise FactError(f"the tokenizer has no token for any part of the prompt {prompt!r}.")
        self._check_prompt(prompt, before)
        answer_ids = self._answer_ids(prompt, answer, before, whole)
        self._check_ids("answer", repr(answer[:60]), answer_ids)
        if self.has_unknown(answer_ids):
            known = [token for token in answer_ids if token != self._unknown]
            if not self._tokenizer_text(known).strip():
                raise FactError(f"the tokenizer has no token for any part of the answer {answer!r}.")
        return Encoded((*before, *answer_ids), len(before))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def has_unknown(self, ids: Sequence[int]) -> bool:
        """Return True if one of the ids is <unk>, the tokenizer's token for text that it cannot encode."""
        return self._unknown is not None and self._unknown in ids

    def check_embedded(self, ids: Sequence[int], where: str) -> None:
        """Raise FactError, naming `where`, if the model has no embedding for one of the ids."""
        if strangers := self._without_embedding(ids):
            raise FactError(f"{where}: contains {strangers}. Remove it.")

    def fingerprint(self) -> dict[str, str]:
        """Return `prompts.fingerprint` of the template that was read."""
        return self._fingerprint

    def _check_prompt(self, prompt: Prompt, ids: Sequence[int]) -> None:
        """Raise TextError if a prompt has an id without an embedding, or a special token not from the template."""
        if isinstance(prompt, Passage):
            self._check_ids("prompt", _shown(prompt), ids, Counter(_leading_specials(self.tokenizer)))
            return
        n_turns = len(turns_of(prompt))
        if n_turns not in self._own_specials:
            own = self._prompt_ids(PROBES[0] if n_turns == 1 else (PROBES[0],) * n_turns)
            self._own_specials[n_turns] = Counter(token for token in own if token in self._special)
        self._check_ids("prompt", _shown(prompt), ids, self._own_specials[n_turns])

    def _check_ids(self, part: str, shown: str, ids: Sequence[int], expected: Counter[int] | None = None) -> None:
        """Raise TextError if a text has an id without an embedding, or a special token that is not expected."""
        if strangers := self._without_embedding(ids):
            raise TextError(f"the {part} {shown} holds {strangers}. Take it out of the text.", part)
        if not expected and self._special.isdisjoint(ids):
            return
        held = Counter(token for token in ids if token in self._special)
        if foreign := held - (expected or Counter()):
            raise TextError(
                f"the {part} {shown} holds {self._name(min(foreign))}, a special token of the tokenizer, which "
                "the model would not read as text. Take it out of the text, or write it in another way.",
                part,
            )

    def _without_embedding(self, ids: Sequence[int]) -> str:
        """Describe the first id for which the model has no embedding; return "" if there is none."""
        if self.n_ids is None or max(ids, default=0) < self.n_ids:
            return ""
        stranger = next(token for token in ids if token >= self.n_ids)
        return (
            f"the token {self._name(stranger)} (id {stranger}), and the model has embeddings for ids 0 to "
            f"{self.n_ids - 1} only"
        )

    def _name(self, token: int) -> str:
        return repr(self.tokenizer.convert_ids_to_tokens(token))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt not in self._prompts:
            self._prompts[prompt] = self._first_of(prompt) + self._tokenize(self.prompt_text(prompt))[0]
        return self._prompts[prompt]

    def _first_of(self, prompt: Prompt) -> list[int]:
        """Return the special ids before a prompt that its template does not write itself."""
        return _leading_specials(self.tokenizer) if isinstance(prompt, Passage) else self._first_ids

    def _joint_of(self, prompt: Prompt) -> str:
        """Return what stands between a prompt and its answer, and is tokenised with the answer."""
        return prompt.joint if isinstance(prompt, Passage) else self._joint

    def _answer_ids(self, prompt: Prompt, answer: str, before: list[int], whole: list[int]) -> list[int]:
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        # The tokenizer merged the prompt's last token with the answer's first. Tokenised separately they give the same
        # text, and during generation the model sees the prompt's own tokens too.
        for part in (self._joint_of(prompt) + answer, answer):
            (ids,) = self._tokenize(part)
            if ids and self._tokenizer_text(before + ids) == self._tokenizer_text(whole):
                return ids
        if isinstance(prompt, UnspacedPassage):  # SentencePiece puts a space before each text, so there is one here
            return self._tokenize(answer)[0]
        raise FactError(
            f"the tokenizer merges the end of the prompt with the answer, so they cannot be tokenised separately "
            f"(prompt {prompt!r}, answer {answer!r}). End the prompt with a whole word."
        )

    def _tokenize(self, *texts: str) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def _tokenizer_text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _message(self, role: str, content: str) -> Message:
        return {"role": role, "content": [{"type": "text", "text": content}] if self._as_parts else content}

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja2 errors of many kinds: the template is the model's, not ours
            raise _bad_chat_template(f"fails on a single question: {error}") from error
        return text

    def _proven_chat_form(self) -> tuple[str, str, list[int]]:
        """Return `_chat_form()`, with messages as texts, or as lists of parts if the template accepts only those."""
        try:
            return self._chat_form()
        except ModelError as error:
            self._as_parts = True
            try:
                return self._chat_form()
            except ModelError:
                raise error from None

    def _chat_form(self) -> tuple[str, str, list[int]]:
        """Return the text that ends the prompt, the spaces that begin the answer, and the ids of the end token.

        Spaces go with the answer, since tokenizers join them to the next word. The end token is the one with which the
        template ends an assistant's turn, or EOS if it writes none.
        """
        messages = [self._message("user", probe) for probe in PROBES]
        asked, other = (self._render([message], add_generation_prompt=True) for message in messages)
        if asked == other:
            raise _bad_chat_template("drops the question: two different prompts render alike")
        written_out = self._as_parts and str(messages[0]["content"][0]) in asked  # the repr of a part
        if PROBES[0] not in asked or PROBES[1] not in other or written_out:
            raise _bad_chat_template("alters the question: what it writes does not contain the prompt")
        turn = [messages[0], self._message("assistant", PROBE_ANSWER)]
        before, found, after = self._render(turn, add_generation_prompt=False).rpartition(PROBE_ANSWER)
        if not found:
            raise _bad_chat_template("drops or alters the assistant's answer, so it cannot tell how one ends")
        between = before[len(asked) :] if before.startswith(asked) else ""
        opening = between.rstrip(" ")
        end = self._tokenize(after.lstrip())[0][:1]
        if not set(end) <= {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}:
            end = []
        return opening, between[len(opening) :], end or [int(self.tokenizer.eos_token_id)]


def _bad_chat_template(what: str) -> ModelError:
    return ModelError(f"The tokenizer's chat template {what}. Try --prompt-template plain.")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, frozenset[int]]:
    """Return the id of <unk> (None if there is none) and the ids of all other special tokens."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2's unknown token is its end token
        unknown = None
    return unknown, frozenset({*added, *tokenizer.all_special_ids} - {unknown})


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special ids that the tokenizer puts before a text, such as BOS."""
    with_specials: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_specials) - len(plain) + 1):
        if with_specials[start : start + len(plain)] == plain:
            return with_specials[:start]
    return []
