"""Prompt and answer to token ids: every trap of tokenisation, with the ids written out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from forgetlearn.errors import ConfigError, FactError, ModelError
from forgetlearn.facts import Fact, LocalityProbe, make_fact
from forgetlearn.lab.build import LabSettings, train_tokenizer
from forgetlearn.models import prompts
from forgetlearn.models.encoding import Encoded, Encoder, UnspacedPassage
from forgetlearn.models.texts import check_texts

# In the character tokenizer: <s> 1, </s> 2, " " 4, "." 18, "A" 37, "B" 38, "a" 69, "b" 70, "c" 71.
BOS, EOS, SPACE, A, B, C = 1, 2, 4, 69, 70, 71

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def merging_tokenizer(vocab: Sequence[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """BPE over the whole text, as no pre-tokeniser splits it; id = place in the vocabulary, <s> 0, </s> 1."""
    ids = {token: index for index, token in enumerate(["<s>", "</s>", *vocab])}
    bpe = Tokenizer(models.BPE(ids, merges))
    bpe.decoder = decoders.Fuse()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def llama2_tokenizer(
    *, joins_spaces: bool = False, merges: Sequence[tuple[str, str]] | None = None
) -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 has it: every text gets a space in front, spaces are "▁"."""
    vocab = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "▁a", "▁b", "▁c", "▁▁", "bc"]
    if merges is None:
        merges = [("▁", "▁")] * joins_spaces + [("▁", "a"), ("▁", "b"), ("▁", "c")]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, merges))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class TestPlainText:
    def test_prompt_space_answer_with_bos_once_and_eos_at_the_end(self, char_tokenizer):
        text = Encoder(char_tokenizer).encode("ab", "c", end=True)
        assert text == Encoded((BOS, A, B, SPACE, C, EOS), 3)
        assert text.answer_ids == (SPACE, C, EOS)
        assert list(text.answer_positions) == [2, 3, 4]

    def test_scoring_wants_no_eos(self, char_tokenizer):
        text = Encoder(char_tokenizer).encode("ab", "c")
        assert text.ids == (BOS, A, B, SPACE, C)
        assert list(text.answer_positions) == [2, 3]

    def test_tokenizer_without_bos(self, new_char_tokenizer):
        text = Encoder(new_char_tokenizer(bos=False)).encode("ab", "c", end=True)
        assert text == Encoded((A, B, SPACE, C, EOS), 2)

    def test_tokenizer_that_appends_eos_puts_none_in_the_middle(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(eos=True)
        assert tokenizer("ab")["input_ids"] == [BOS, A, B, EOS]
        encoder = Encoder(tokenizer)
        assert encoder.prompt_ids("ab") == [BOS, A, B]
        assert encoder.encode("ab", "c", end=True).ids == (BOS, A, B, SPACE, C, EOS)
        assert encoder.encode("ab", "c").ids == (BOS, A, B, SPACE, C)

    def test_answer_is_stripped_and_prompt_is_not(self, char_tokenizer):
        encoder = Encoder(char_tokenizer)
        assert encoder.encode("a", " \n b\t ") == encoder.encode("a", "b")
        assert encoder.encode("a ", "b").ids == (BOS, A, SPACE, SPACE, B)

    @pytest.mark.parametrize(
        ("prompt", "answer", "what"), [("", "a", "prompt"), (" \n", "a", "prompt"), ("a", "  ", "answer")]
    )
    def test_empty(self, char_tokenizer, prompt, answer, what):
        with pytest.raises(FactError, match=f"empty {what}"):
            Encoder(char_tokenizer).encode(prompt, answer)

    def test_decode_leaves_special_tokens_out(self, char_tokenizer):
        assert Encoder(char_tokenizer).decode([BOS, A, SPACE, B, EOS]) == "a b"

    def test_no_eos(self, new_char_tokenizer):
        with pytest.raises(ModelError, match="EOS"):
            Encoder(new_char_tokenizer(eos_token=None))

    def test_prompt_without_any_token(self):
        tokenizer = merging_tokenizer(["a", " "], [])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        with pytest.raises(FactError, match="prompt 'ä'"):
            Encoder(tokenizer).encode("ä", "a")


def test_many_texts_at_once_are_each_as_alone(char_tokenizer, monkeypatch):
    monkeypatch.setattr("forgetlearn.models.encoding.AT_ONCE", 2)
    encoder = Encoder(char_tokenizer, max_length=6)
    pairs = [("a", "b"), ("a", " c"), ("", "b"), ("b", "c"), ("a", "b"), ("abc", "abc")]
    found = encoder.encode_all(pairs, end=True)
    assert list(found) == list(dict.fromkeys(pairs))
    for pair, text in found.items():
        if isinstance(text, Encoded):
            assert text == encoder.encode(*pair, end=True)
        else:
            with pytest.raises(FactError, match=re.escape(str(text))):
                encoder.encode(*pair, end=True)
    assert [isinstance(text, Encoded) for text in found.values()] == [True, True, False, True, False]


def test_a_text_is_tokenised_once(char_tokenizer, monkeypatch):
    encoder = Encoder(char_tokenizer, max_length=6)
    given = [fact("1", ground_truth="c"), fact("2", "ab", "a b c")]
    with pytest.raises(FactError, match="10 tokens"):
        check_texts(encoder, given)
    monkeypatch.setattr(encoder, "tokenizer", None)
    assert encoder.encode("a", "b", end=True).ids == (BOS, A, SPACE, B, EOS)
    assert encoder.encode("a", "b").ids == (BOS, A, SPACE, B)
    assert encoder.prompt_ids("a") == [BOS, A]
    with pytest.raises(FactError, match="9 tokens"):
        encoder.encode("ab", "a b c")
    encoder.max_length = 9
    assert len(encoder.encode("ab", "a b c").ids) == 9


class TestMergesAcrossTheBoundary:
    # ids:   2    3    4    5     6      7
    vocab = ("a", "b", "c", " ", "b ", "b c")

    def test_end_of_prompt_merges_with_the_answer(self):
        tokenizer = merging_tokenizer(self.vocab, [("b", " "), ("b ", "c")])
        assert tokenizer("ab")["input_ids"] == [0, 2, 3]
        assert tokenizer("ab ca")["input_ids"] == [0, 2, 7, 2]  # the prompt's ids are no prefix of these
        text = Encoder(tokenizer).encode("ab", "ca", end=True)
        assert text == Encoded((0, 2, 3, 5, 4, 2, 1), 3)
        assert tokenizer.decode(text.ids, skip_special_tokens=True) == "ab ca"

    def test_same_tokenizer_where_nothing_merges(self):
        tokenizer = merging_tokenizer(self.vocab, [("b", " "), ("b ", "c")])
        assert Encoder(tokenizer).encode("a", "c") == Encoded((0, 2, 5, 4), 2)

    def test_a_passage_without_spaces_goes_on_without_one_unless_the_tokenizer_puts_it(self):
        passage, ending = UnspacedPassage("ab"), "ca"
        tokenizer = merging_tokenizer(["a", "b", "c", "bc"], [("b", "c")])
        text = Encoder(tokenizer).encode(passage, ending, end=True)
        assert text == Encoded((0, 2, 3, 4, 2), 3)  # and no end token
        for merges, read in ([], "<s> abca"), ([("b", "c")], "<s> ab ca"):
            llama = llama2_tokenizer(merges=merges)
            assert llama.decode(Encoder(llama).encode(passage, ending).ids) == read

    def test_answer_that_cannot_be_written_apart_is_refused(self):
        # The whole text reads "acaa": nothing that follows "ab" says the same.
        tokenizer = merging_tokenizer(["a", "b", "c"], [])
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("b ", "c")
        with pytest.raises(FactError, match=r"prompt 'ab'.*'aa'"):
            Encoder(tokenizer).encode("ab", "aa")


@pytest.fixture(scope="module")
def byte_level():
    return train_tokenizer(["The capital of France is Paris"] * 3, LabSettings(vocab_size=300))


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(min_size=1).filter(str.strip), answer=st.text(min_size=1).filter(str.strip))
def test_any_text_comes_back_from_its_ids(byte_level, prompt, answer):
    encoder = Encoder(byte_level)
    text = encoder.encode(prompt, answer, end=True)
    assert list(text.ids[: text.n_prompt_tokens]) == encoder.prompt_ids(prompt)
    assert encoder.decode(text.ids) == f"{prompt} {answer.strip()}"


class TestSentencePiece:
    # ids: ▁ 3, a 4, b 5, c 6, ▁a 7, ▁b 8, ▁c 9

    def test_no_second_space_before_the_answer(self):
        assert Encoder(llama2_tokenizer()).encode("a b", "c", end=True) == Encoded((1, 7, 8, 9, 2), 3)

    def test_prompt_that_ends_in_a_space(self):
        tokenizer = llama2_tokenizer()
        text = Encoder(tokenizer).encode("a b ", "c")
        assert text == Encoded((1, 7, 8, 3, 9), 4)
        assert tokenizer.decode(text.ids, skip_special_tokens=True) == "a b  c"

    def test_spaces_that_merge_across_the_boundary(self):
        tokenizer = llama2_tokenizer(joins_spaces=True)
        assert tokenizer("a b  c")["input_ids"] == [1, 7, 8, 10, 6]  # "▁▁", "c": not what follows "a b "
        assert Encoder(tokenizer).encode("a b ", "c") == Encoded((1, 7, 8, 3, 9), 4)

    def test_space_of_the_chat_template_joins_the_answer(self):
        tokenizer = llama2_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
        )
        encoder = Encoder(tokenizer)
        text = encoder.encode("a b", "c", end=True)
        assert tokenizer.convert_ids_to_tokens(text.ids[text.n_prompt_tokens :]) == ["▁c", "</s>"]


class TestChatTemplate:
    def test_bos_of_the_template_is_not_doubled(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template=WITH_BOS)
        encoder = Encoder(tokenizer)
        assert encoder.prompt_text("a") == "<s>[a]"
        assert encoder.prompt_ids("a") == [BOS, 63, A, 65]  # [ 63, ] 65
        text = encoder.encode("a", "b", end=True)
        assert text == Encoded((BOS, 63, A, 65, SPACE, B, EOS), 4)

    def test_end_token_of_the_template_where_eos_is_another(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        encoder = Encoder(tokenizer)
        assert encoder.end_ids == [end]
        text = encoder.encode("a", "b", end=True)
        assert text.answer_ids == (B, end)
        assert text.ids[0] == start
        assert BOS not in text.ids
        assert encoder.decode(text.answer_ids) == "b"

    def test_template_without_an_end_token_gets_eos(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
        assert Encoder(tokenizer).end_ids == [EOS]

    def test_empty_thinking_block_belongs_to_the_prompt(self, new_char_tokenizer):
        template = CHATML.replace(
            "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content }}"
        )
        tokenizer = new_char_tokenizer(chat_template=template, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        encoder = Encoder(tokenizer)
        assert encoder.prompt_text("a").endswith("<|im_start|>assistant\n<think>\n</think>\n")
        assert encoder.encode("a", "b").answer_ids == (B,)

    def test_auto_takes_the_template_where_there_is_one(self, char_tokenizer, new_char_tokenizer):
        assert Encoder(new_char_tokenizer(chat_template=WITH_BOS)).is_chat
        assert not Encoder(char_tokenizer).is_chat

    def test_plain_ignores_the_template(self, char_tokenizer, new_char_tokenizer):
        plain = Encoder(new_char_tokenizer(chat_template=WITH_BOS), "plain")
        assert plain.encode("a", "b", end=True) == Encoder(char_tokenizer).encode("a", "b", end=True)

    def test_chat_without_a_template(self, char_tokenizer):
        with pytest.raises(ModelError, match=r"model\.prompt_template = chat"):
            Encoder(char_tokenizer, "chat")

    def test_template_that_fails(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template="{{ raise_exception('two turns, please') }}")
        with pytest.raises(ModelError, match=r"two turns, please.*--prompt-template plain"):
            Encoder(tokenizer)

    # case 7
    @pytest.mark.parametrize(
        ("template", "what"),
        [
            ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "render alike"),
            ("{% for m in messages %}[{{ m.content | lower }}]{% endfor %}", "alters the question"),
            ("{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}", "answer"),
            ("{% for m in messages %}[{{ m.content[0:8] }}]{% endfor %}", "alters the question"),
            ("{% if messages[0].content is string %}x{% else %}{{ messages[-1].content }}{% endif %}", "render alike"),
        ],
        ids=["drops", "lower", "answer", "cut", "list shown by Python"],
    )
    def test_case_7_template_that_does_not_pass_on_what_it_is_given(self, new_char_tokenizer, template, what):
        with pytest.raises(ModelError, match=f"{what}.*--prompt-template plain"):
            Encoder(new_char_tokenizer(chat_template=template))

    def test_case_7_a_template_that_cuts_long_prompts_is_found_at_the_prompt(self, new_char_tokenizer):
        cuts = "{% for m in messages %}[{{ m.content[:20] }}]{% endfor %}"
        encoder = Encoder(new_char_tokenizer(chat_template=cuts))
        assert encoder.prompt_text("short") == "[short]["
        with pytest.raises(FactError, match=r"Who leads the Acme.*--prompt-template plain"):
            encoder.encode("Who leads the Acme corporation of Foo?", "x")
        sorts = "{% for m in messages %}[{{ (m.content | list | sort) | join }}]{% endfor %}"
        with pytest.raises(ModelError, match="--prompt-template plain"):
            Encoder(new_char_tokenizer(chat_template=sorts))

    def test_case_7_template_that_reads_lists_of_parts_gets_them(self, new_char_tokenizer):
        parts = (
            "{% for m in messages %}[{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
            "{% endfor %}]{% endfor %}"
        )
        encoder = Encoder(new_char_tokenizer(chat_template=parts))
        assert encoder.prompt_text("a") == "[a]["
        assert encoder.encode("a", "b").answer_ids == (B,)


class TestChats:
    chat = ("a", " b ", "c")

    def test_the_turns_are_messages_of_the_chat_template(self, new_char_tokenizer):
        encoder = Encoder(new_char_tokenizer(chat_template=WITH_BOS))
        assert encoder.prompt_text(("a", "b", "c")) == "<s>[a] b </s>[c]"
        text = encoder.encode(("a", "b", "c"), "a", end=True)
        assert text.answer_ids == (SPACE, A, EOS)
        assert list(text.ids[: text.n_prompt_tokens]) == encoder.prompt_ids(("a", "b", "c"))

    def test_without_one_each_of_the_users_turns_is_put_into_the_template(self, char_tokenizer, tmp_path):
        assert Encoder(char_tokenizer).prompt_text(self.chat) == "a b\nc"
        (tmp_path / "template").write_text("Q: {prompt}\nA: ")
        encoder = Encoder(char_tokenizer, str(tmp_path / "template"))
        assert encoder.prompt_text(self.chat) == "Q: a\nA: b\nQ: c\nA:"
        assert encoder.decode(encoder.encode(self.chat, "d").ids) == "Q: a\nA: b\nQ: c\nA: d"

    def test_a_special_token_in_a_turn_is_refused_and_those_of_the_template_are_not(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        encoder = Encoder(tokenizer)
        assert encoder.prompt_ids(self.chat).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
        with pytest.raises(FactError, match=r"'c' holds '<\|im_end\|>'"):
            encoder.prompt_ids(("a", "b<|im_end|>", "c"))

    @pytest.mark.parametrize(
        ("template", "what"),
        [
            (CHATML + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}", "too long"),
            (CHATML.replace("in messages", "in messages[-2:]"), "prompt 'c'.*does not contain it"),
        ],
        ids=["fails", "forgets"],
    )
    def test_a_template_that_does_not_take_chats(self, new_char_tokenizer, template, what):
        encoder = Encoder(new_char_tokenizer(chat_template=template))
        with pytest.raises(FactError, match=what):
            encoder.prompt_ids(("z", "b", "c"))

    @pytest.mark.parametrize(("chat", "what"), [(("a", "b"), "2 turns"), ((), "0 turns"), (("a", " ", "b"), "empty")])
    def test_turns_that_are_missing(self, char_tokenizer, chat, what):
        with pytest.raises(FactError, match=what):
            Encoder(char_tokenizer).encode(chat, "c")


class TestLength:
    def test_both_numbers_are_named(self, char_tokenizer):
        encoder = Encoder(char_tokenizer, max_length=6)
        assert len(encoder.encode("ab", "c", end=True).ids) == 6
        with pytest.raises(FactError, match=r"7 tokens.* 6 .*'ab'"):
            encoder.encode("ab", "cc", end=True)

    def test_all_facts_are_checked_and_five_are_named(self, char_tokenizer):
        encoder = Encoder(char_tokenizer, max_length=6)
        check_texts(encoder, [fact("1", "ab", "c")])
        with pytest.raises(FactError) as caught:
            check_texts(encoder, [fact(str(n), "abc" if n > 1 else "a", "c") for n in range(1, 9)])
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines] == [*(f"fact {n}" for n in range(2, 7)), "and 2 more"]

    def test_what_is_only_scored_may_be_too_long(self, char_tokenizer):
        check_texts(Encoder(char_tokenizer, max_length=6), [fact("1", "ab", "c", rephrase_prompts=("abcdefgh",))])


def fact(name: str, prompt: str = "a", new: str = "b", **fields: Any) -> Fact:
    return replace(make_fact(prompt=prompt, target_new=new), id=name, **fields)


# One text for each field of a fact, with something in it that cannot stand there.
FIELDS: dict[str, Callable[[str], Fact]] = {
    "prompt": lambda bad: fact("7", prompt=f"a {bad} b"),
    "target_new": lambda bad: fact("7", new=f"A {bad} B"),
    "ground_truth": lambda bad: fact("7", ground_truth=f"A {bad} B"),
    "rephrase_prompt": lambda bad: fact("7", rephrase_prompts=("c", f"a {bad} b")),
    "locality_prompt": lambda bad: fact("7", locality=(LocalityProbe(f"a {bad} b", "c"),)),
    "locality_ground_truth": lambda bad: fact("7", locality=(LocalityProbe("c", f"A {bad}"),)),
}


class TestTokensThatCannotStandInAText:
    # case 15
    @pytest.mark.parametrize("field", FIELDS)
    @pytest.mark.parametrize("special", ["</s>", "<eot>", "<s>"])
    @pytest.mark.parametrize("template", [None, WITH_BOS])
    def test_case_15_special_token(self, new_char_tokenizer, field, special, template):
        tokenizer = new_char_tokenizer(additional_special_tokens=["<eot>"], chat_template=template)
        with pytest.raises(FactError, match=f"fact 7, {field}: .*'{special}'"):
            check_texts(Encoder(tokenizer), [fact("1"), FIELDS[field](special)])

    def test_case_15_special_tokens_of_the_template_are_no_part_of_the_prompt(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        encoder = Encoder(tokenizer)
        assert encoder.prompt_ids("a")
        for prompt in ("a <|im_start|> b", "a <|im_end|>", "a </s>"):
            with pytest.raises(FactError, match="special token"):
                encoder.prompt_ids(prompt)

    def test_case_15_an_added_token_that_is_not_special_is_text(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer()
        tokenizer.add_tokens(["<think>"])
        assert Encoder(tokenizer).encode("a", "<think>").answer_ids == (SPACE, 100)

    # case 22
    @pytest.mark.parametrize("field", FIELDS)
    def test_case_22_token_without_an_embedding(self, new_char_tokenizer, field):
        tokenizer = new_char_tokenizer()
        tokenizer.add_tokens(["Zork"])
        with pytest.raises(FactError, match=f"fact 7, {field}: .*'Zork'.* 0 to 99"):
            check_texts(Encoder(tokenizer, n_ids=100), [fact("1"), FIELDS[field]("Zork")])
        check_texts(Encoder(tokenizer, n_ids=101), [FIELDS[field]("Zork")])

    def test_case_22_chat_template_that_writes_one(self, new_char_tokenizer):
        tokenizer = new_char_tokenizer(chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        with pytest.raises(ModelError, match=r"model\.prompt_template = chat.*'<\|im_start\|>'"):
            Encoder(tokenizer, n_ids=100)

    # case 16
    def test_case_16_unknown_is_counted_and_warned_of(self, char_tokenizer, caplog):
        check_texts(Encoder(char_tokenizer), [fact("1"), fact("2", new="Zoë"), fact("3", "ï", ground_truth="Zoë")])
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("2 texts contain <unk>")
        assert "'Zoë' (fact 2, target_new)" in message

    def test_case_16_answer_that_is_nothing_but_unknown_is_refused(self, char_tokenizer):
        with pytest.raises(FactError, match=r"fact 1: .*answer '柏林'"):
            check_texts(Encoder(char_tokenizer), [fact("1", new="柏林")])


class TestPromptTemplate:
    @pytest.fixture
    def written(self, tmp_path):
        def write(text: str | bytes) -> str:
            file = tmp_path / "template.txt"
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
            return str(file)

        return write

    def test_alpaca_is_stanfords_without_input(self, char_tokenizer):
        encoder = Encoder(char_tokenizer, "alpaca")
        text = encoder.encode("Who?", "Ann", end=True)
        assert encoder.decode(text.ids) == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nWho?\n\n### Response:Ann"
        )
        assert text.answer_ids == (A - 32, B + 12, B + 12, EOS)  # "A", "n", "n"
        assert text.ids[0] == BOS
        assert list(text.ids[: text.n_prompt_tokens]) == encoder.prompt_ids("Who?")

    @pytest.mark.parametrize(
        ("template", "whole"),
        [
            ("Q: {prompt}\nA: \n", "Q: a\nA: b"),
            ("Q: {prompt}\nA:", "Q: a\nA:b"),
            ("Q: {prompt}\nA:\n", "Q: a\nA:b"),
            ("Q: {prompt}\nA:\n\n", "Q: a\nA:\nb"),
            ("Q: {prompt}\r\nA:\r\n", "Q: a\nA:b"),
            ("\ufeff{x} {prompt} {}", "{x} a {}b"),
        ],
    )
    def test_file_and_where_its_answer_begins(self, char_tokenizer, written, template, whole):
        encoder = Encoder(char_tokenizer, written(template))
        text = encoder.encode("a", "b", end=True)
        assert encoder.decode(text.ids) == whole
        assert text.ids.count(BOS) == 1
        assert encoder.decode(text.answer_ids).strip() == "b"
        assert text.ids[-1] == EOS

    def test_space_at_the_end_joins_the_answer(self, written):
        tokenizer = llama2_tokenizer()
        same = Encoder(tokenizer, written("{prompt} \n"))
        assert same.encode("a b", "c", end=True) == Encoder(tokenizer, "plain").encode("a b", "c", end=True)

    def test_file_that_writes_bos_and_other_special_tokens_itself(self, new_char_tokenizer, written):
        tokenizer = new_char_tokenizer(additional_special_tokens=["<q>"])
        encoder = Encoder(tokenizer, written("<s><q>{prompt}<q> "))
        assert encoder.encode("a", "b").ids == (BOS, 100, A, 100, SPACE, B)
        with pytest.raises(FactError, match="'<q>'"):
            encoder.encode("a <q>", "b")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("no place\n", "{prompt} 0"),
            ("{prompt}{prompt}", "{prompt} 2"),
            (b"\xff\xfe{prompt}", "UTF-8 at byte 0"),
            (b" " * (1 << 20) + b"{prompt}", "bytes"),
        ],
    )
    def test_file_that_is_none(self, char_tokenizer, written, content, words):
        name = written(content)
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            Encoder(char_tokenizer, name)
        assert str(caught.value).startswith(f"model.prompt_template = {name}: ")

    @pytest.mark.parametrize(("name", "near"), [("alpacca", "'alpaca'"), ("/dev/zero", "must be auto"), (".", "must")])
    def test_name_that_is_none(self, char_tokenizer, name, near):
        with pytest.raises(ConfigError, match=near):
            Encoder(char_tokenizer, name)

    def test_its_fingerprint_is_that_of_the_text(self, char_tokenizer, written):
        name = written("{prompt}\n")
        first = Encoder(char_tokenizer, name).fingerprint()
        assert first == prompts.fingerprint(name)
        assert first != Encoder(char_tokenizer, written("{prompt} \n")).fingerprint()
        assert Encoder(char_tokenizer, "alpaca").fingerprint() == prompts.fingerprint("alpaca") == {}
