"""A tokenizer as the metadata of a GGUF file: its tokens and merges, how it splits text, special tokens, chat template.

llama.cpp has the code that splits text before merging, and knows each way by a name. So a tokenizer that splits in
another way is refused: with a wrong name every answer would be computed from wrong tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from forgetlearn.errors import ModelError, plain, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
BLANK = "\u2581"  # how SentencePiece writes a blank
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = "GPT-2's expression"  # the one that is built into the step ByteLevel


@dataclass(frozen=True)
class Splitting:
    """How byte-level BPE splits text: the steps before ByteLevel, and whether a whole word in the vocabulary wins."""

    steps: tuple[str, ...]
    ignore_merges: bool = False


# By llama.cpp's name for it (tokenizer.ggml.pre).
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting((GPT2,)),
    "smollm": Splitting(("each digit", GPT2)),
    "llama-bpe": Splitting((ENGLISH + r"|\p{N}{1,3}" + REST,), ignore_merges=True),
    "qwen2": Splitting((ENGLISH + r"|\p{N}" + REST,)),
    "tekken": Splitting((TEKKEN,), ignore_merges=True),
}


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, n_rows: int, name: str) -> dict[str, object]:
    """Return a tokenizer as metadata of a GGUF file, for a model whose embedding has `n_rows` rows.

    Rows beyond the vocabulary become unused tokens. Special tokens beyond the rows, which transformers adds to a
    tokenizer that it reads from GGUF, are left out: the model cannot read them. `name` is the model's, for errors.

    Raises:
        ModelError: llama.cpp has no such tokenizer, it splits text in a way that has no name there, or it has more
            tokens than the model has rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model") or {}
    if model.get("type") != "BPE":
        _refuse(name, f"is {plain(str(model.get('type') or type(tokenizer).__name__))}, expected BPE")
    tokens, types = _tokens(tokenizer, state, n_rows, name)
    fields: dict[str, object] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    fields |= (_sentence_pieces if model.get("byte_fallback") else _byte_level)(state, tokens, name)
    return fields | _special_tokens(tokenizer, n_rows, name, is_spm=bool(model.get("byte_fallback")))


def _refuse(name: str, what: str) -> NoReturn:
    raise ModelError(
        f"{name}: its tokenizer {what}, so it is not written as GGUF: llama.cpp would read other tokens. Write the "
        "merged model (--to merged) and convert it with llama.cpp's convert_hf_to_gguf.py."
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], n_rows: int, name: str
) -> tuple[list[str], list[int]]:
    """Return a token and its type for each row of the embedding."""
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    by_id = {i: token for token, i in tokenizer.get_vocab().items() if i < n_rows or i not in special}
    if (largest := max(by_id)) >= n_rows:
        _refuse(name, f"has a token of id {largest}, and the model {n_rows} rows")
    types = dict.fromkeys(by_id, NORMAL)
    for added in state["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if state["model"].get("byte_fallback"):
        types |= {index: BYTE for index, token in by_id.items() if _is_byte(token)}
        types |= {index: UNKNOWN for index, token in by_id.items() if token == state["model"].get("unk_token")}
    rows = range(n_rows)
    return [by_id.get(row, f"[PAD{row}]") for row in rows], [types.get(row, UNUSED) for row in rows]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(state: Mapping[str, Any]) -> list[Pair]:
    """Return the pairs of tokens that are merged, the first first."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


# Byte-level BPE -----------------------------------------------------------------------------------


def _byte_level(state: Mapping[str, Any], _tokens: Sequence[str], name: str) -> dict[str, object]:
    """Return the fields of byte-level BPE (GPT-2, Llama 3, Qwen): how it splits text, and its merges."""
    found = Splitting(tuple(_steps(state, name)), bool(state["model"].get("ignore_merges")))
    pre = next((known for known, splitting in SPLITTINGS.items() if splitting == found), None)
    if pre is None:
        how = " then ".join(plain(step)[:80] for step in found.steps) or "nothing"
        how += ", whole words first" if found.ignore_merges else ""
        _refuse(name, f"splits text in a way that is not one of {', '.join(SPLITTINGS)} ({how})")
    merges = [f"{left} {right}" for left, right in _merges(state)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _steps(state: Mapping[str, Any], name: str) -> list[str]:
    """Return the steps by which a byte-level tokenizer splits text; refuse steps that change or merge it."""
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # NFC changes no text that is written as usual, and llama.cpp does without
        _refuse(name, f"changes text first ({normalizer})")
    steps = []
    for step in _flat(state.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += [GPT2] if step["use_regex"] else []
        elif kind == "Digits" and step["individual_digits"]:
            steps.append("each digit")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(str(step["pattern"].get("Regex")))
        else:
            _refuse(name, f"splits text by {plain(json.dumps(step))[:120]}")
    return steps


def _flat(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """Return a step of a tokenizer, or those that a sequence consists of."""
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


# SentencePiece ------------------------------------------------------------------------------------


def _sentence_pieces(state: Mapping[str, Any], tokens: Sequence[str], name: str) -> dict[str, object]:
    """Return the fields of SentencePiece's BPE (Llama 2, Mistral, Gemma): a score per token, from which merges follow.

    llama.cpp merges the two neighbours whose union has the highest score. That is the order of the merges if each
    token's merges stand together, and none is missing; the merges of a converted `tokenizer.model` do.
    """
    steps = _flat(state.get("normalizer"), "normalizers") + _flat(state.get("pre_tokenizer"), "pretokenizers")
    if odd := [step["type"] for step in steps if step["type"] not in ("Prepend", "Replace", "Metaspace", "Split")]:
        _refuse(name, f"changes text first ({some(odd)})")
    ranks: dict[str, int] = {}
    merges = _merges(state)
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    added = {token["content"] for token in state["added_tokens"]}
    if not _follows(merges, ranks, set(state["model"]["vocab"]), added):
        _refuse(name, "merges in an order that does not follow from a score of each token")
    scores = [-float(ranks[token]) if token in ranks else -float(len(ranks)) for token in tokens]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}


def _follows(merges: Sequence[Pair], ranks: Mapping[str, int], vocabulary: set[str], added: set[str]) -> bool:
    """Return True if all ways to make each token, other than an added one, are merges, and stand one after another."""
    places = [ranks[left + right] for left, right in merges]
    ways = {
        (token[:cut], token[cut:])
        for token in vocabulary - added
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    }
    return all(one <= two for one, two in itertools.pairwise(places)) and ways <= set(merges)


# Special tokens -----------------------------------------------------------------------------------


def _special_tokens(tokenizer: PreTrainedTokenizerBase, n_rows: int, name: str, *, is_spm: bool) -> dict[str, object]:
    """Return the ids of special tokens, which of them begin and end a text, and the chat template."""
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {own: getattr(tokenizer, f"{own}_token_id") for own in kinds}
    known = {own: index for own, index in ids.items() if index is not None and index < n_rows}
    fields: dict[str, object] = {f"tokenizer.ggml.{kinds[own]}_token_id": index for own, index in known.items()}
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    begins, ends = framed[:1] != bare[:1], framed[-1:] != bare[-1:]
    if framed != [ids["bos"]] * begins + bare + [ids["eos"]] * ends:
        _refuse(name, f"puts other tokens around a text than its begin and end tokens ({framed})")
    fields |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    if is_spm:
        first = tokenizer.convert_ids_to_tokens(bare)[0]
        fields["tokenizer.ggml.add_space_prefix"] = first.startswith(BLANK)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return fields | ({"tokenizer.chat_template": template} if template else {})
