"""Lay encoded texts out as batches, and compute logits at their answer positions.

Five layouts give the same logits:

packed          All texts are in one row, with restarting position ids and no padding. Attention runs text by text, or
                under a block-diagonal mask, which transformers builds only if there is no attention mask and no cache.
shared_by_text  All texts are in one row, and texts that begin alike share their beginning. Attention runs text by text.
shared          The same row, but attention runs under a mask.
padded          Each text has its own row, padded on the left.
single          Each text has its own forward pass.

Shapes: B batch, T tokens, K answer positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from statistics import median
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forgetlearn.errors import ModelError
from forgetlearn.models import attention
from forgetlearn.models.encoding import Encoded, common_start
from forgetlearn.models.onednn import fast_linear_layers

K = TypeVar("K")
Compute = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]
Layout = Literal["packed", "shared_by_text", "shared", "padded", "single"]
IGNORE = -100
# Tokens in a row of shared beginnings. Of 192 to 1,024, 512 were fastest on a CPU, with attention text by text.
ROW_TOKENS = {"cpu": 512}
GPU_ROW_TOKENS = 2048
ROUNDED_TO = 32  # tokens: for every new row length, oneDNN caches 0.2 MB per product
MAX_PACKED_TOKENS = 1024  # in a row whose attention needs a mask, which is quadratic in the row's length
WORTH_SHARING = 0.2  # of the mean length of a text
LONG = 1.5  # times the median length
SMALL_MODEL = 20_000_000  # parameters
# Layouts sum in different orders, which changes the logits. The root mean square of the change, as a share of the
# logits' standard deviation, is 1e-6 in float32 and up to 0.08 in bfloat16 (SmolLM2-135M, 30 layers); for a wrong mask,
# 0.3 to 1.2. A tolerance that rounding exceeds makes a model read text after text, which takes several times as long.
AGREEMENT_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.15


@dataclass(frozen=True)
class Batch:
    """Model inputs, and the token id to be predicted by each logit that comes back.

    `labels` is (B, K), with IGNORE where a row has fewer answer tokens than others. `positions` (K,) are the positions
    in each row whose logits are wanted.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    labels: Tensor


def pack(texts: Sequence[Encoded]) -> Batch:
    """Lay all texts out in one row (1, T), each starting again at position 0."""
    ids = [token for text in texts for token in text.ids]
    restarting = [position for text in texts for position in range(len(text.ids))]
    positions, start = [], 0
    for text in texts:
        positions += [start + position for position in text.answer_positions]
        start += len(text.ids)
    labels = [token for text in texts for token in text.answer_ids]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([restarting])}
    return Batch(inputs, torch.tensor(positions, dtype=torch.long), torch.tensor([labels], dtype=torch.long))


def shared_rows(texts: Mapping[K, Encoded], max_texts: int, max_tokens: int) -> list[list[K]]:
    """Sort the texts by their ids, and return their keys in rows for `share`, each within both limits.

    Texts that are much longer than most get rows of their own: text by text, attention costs as much as if all texts of
    a row were as long as the longest.
    """
    rows: list[list[K]] = []
    size = 0
    before: tuple[int, ...] = ()
    long = LONG * median(len(text.ids) for text in texts.values()) if texts else 0
    for key in sorted(texts, key=lambda key: (len(texts[key].ids) > long, texts[key].ids)):
        ids = texts[key].ids[:-1]
        new = len(ids) - common_start(ids, before)
        if not rows or len(rows[-1]) == max_texts or size + new > max_tokens:
            rows.append([])
            size, new = 0, len(ids)
        rows[-1].append(key)
        size, before = size + new, ids
    return rows


def divided(texts: Mapping[K, Encoded], layout: Layout, max_texts: int, device: torch.device) -> list[list[K]]:
    """Divide keys into batches of texts that share their beginnings, or of texts of similar length."""
    if layout in ("shared", "shared_by_text"):
        return shared_rows(texts, max_texts, ROW_TOKENS.get(device.type, GPU_ROW_TOKENS))
    size = 1 if layout == "single" else max_texts
    order = sorted(texts, key=lambda key: len(texts[key].ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class SharedRow:
    """One row (1, T) of texts, in which a beginning that several texts share occurs only once.

    `paths` are the places in the row of each text's tokens; a text that is part of an earlier one adds no tokens.
    `positions` (K,) are the places whose logits are wanted. `which` (N,) holds, for each answer token (text after
    text), the index of the logits that predict it.
    """

    input_ids: Tensor
    position_ids: Tensor
    paths: list[list[int]]
    positions: Tensor
    which: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Return the model inputs, except those that decide which tokens see each other."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


def share(texts: Sequence[Encoded], multiple: int = 1) -> SharedRow:
    """Lay the texts out as one row, without each text's last token, which predicts nothing.

    The row's length and its number of positions are rounded up to a multiple of `multiple`: one more text, whose logits
    are ignored, fills the row, and the last position is repeated.
    """
    places: dict[tuple[int, int], int] = {}  # (place of the previous token, token) -> place in the row
    ids: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = []
    asked: list[int] = []
    for text in texts:
        path: list[int] = []
        place, known = -1, len(ids)
        for token in text.ids[:-1]:
            place = places.setdefault((place, token), len(ids))
            if place == len(ids):
                ids.append(token)
                depths.append(len(path))
            path.append(place)
        if len(ids) > known:
            paths.append(path)
        asked += path[text.n_prompt_tokens - 1 :]
    positions, which = torch.unique(torch.tensor(asked, dtype=torch.long), return_inverse=True)
    if spare := -len(ids) % multiple:
        paths.append(list(range(len(ids), len(ids) + spare)))
        ids += ids[:1] * spare
        depths += range(spare)
    again = positions[-1:].repeat(-len(positions) % multiple)
    return SharedRow(torch.tensor([ids]), torch.tensor([depths]), paths, torch.cat([positions, again]), which)


def read_logits(
    model: nn.Module, texts: Sequence[Encoded], layout: Layout, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return logits (K, V) and, for each answer token (text after text), the index of its logits (N,)."""
    return _read(answer_logits, model, texts, layout, pad_id, device)


def read_states(
    model: nn.Module, texts: Sequence[Encoded], layout: Layout, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return hidden states (K, D) in the middle of the model and, for each answer token, the index of its own (N,)."""
    return _read(answer_states, model, texts, layout, pad_id, device)


def _read(
    compute: Compute, model: nn.Module, texts: Sequence[Encoded], layout: Layout, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if layout not in ("shared", "shared_by_text"):
        found = _flat(compute, model, pad_left(texts, pad_id), device)
        return found, torch.arange(len(found), device=device)
    row = share(texts, ROUNDED_TO)
    inputs = shared_inputs(model, row, layout, device)
    return compute(model, inputs, row.positions.to(device))[0], row.which.to(device)


def shared_inputs(model: nn.Module, row: SharedRow, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Return all inputs of a row in one of the two shared layouts."""
    if layout == "shared_by_text":
        inputs = row_inputs(row)
    else:
        dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        inputs = row.inputs() | {"attention_mask": _mask(row, dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def _mask(row: SharedRow, dtype: torch.dtype) -> Tensor:
    """Return a mask (1, 1, T, T): 0 for each token itself and those before it in its text, else the minimum."""
    length = row.input_ids.shape[1]
    sees = np.zeros((length, length), dtype=bool)
    for path in row.paths:
        for depth, place in enumerate(path):
            sees[place, path[: depth + 1]] = True
    unseen = ~torch.from_numpy(sees)
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min)[None, None]


def pad_left(texts: Sequence[Encoded], pad_id: int) -> Batch:
    """Lay out one row per text, padded on the left, so that all answers end in the last column."""
    width = max(len(text.ids) for text in texts)
    n_answer = max(len(text.answer_ids) for text in texts)
    rows = [(width - len(text.ids), text.ids) for text in texts]
    inputs = {
        "input_ids": torch.tensor([[pad_id] * pad + list(ids) for pad, ids in rows]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(ids) for pad, ids in rows]),
        "position_ids": torch.tensor([[0] * pad + list(range(len(ids))) for pad, ids in rows]),
    }
    labels = [[IGNORE] * (n_answer - len(text.answer_ids)) + list(text.answer_ids) for text in texts]
    positions = torch.arange(width - 1 - n_answer, width - 1)
    return Batch(inputs, positions, torch.tensor(labels, dtype=torch.long))


def lay_out(texts: Sequence[Encoded], layout: Layout, pad_id: int, max_packed_tokens: int = MAX_PACKED_TOKENS) -> Batch:
    """Lay texts out packed or padded, as `layout` says; pad them if a packed row would be too long."""
    if layout == "packed" and sum(len(text.ids) for text in texts) <= max_packed_tokens:
        return pack(texts)
    return pad_left(texts, pad_id)


def answer_states(model: nn.Module, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Return hidden states (B, K, D) at the given positions, after half of the layers.

    Raises:
        ModelError: the model returns no hidden states.
    """
    states = _forward(model, inputs, positions[:1], output_hidden_states=True).hidden_states
    if not states:
        raise ModelError(f"{type(attention.plain(model)).__name__} returns no hidden states to compare prompts by.")
    middle: Tensor = states[len(states) // 2]
    return middle[:, positions]


def _forward(model: nn.Module, inputs: dict[str, Tensor], positions: Tensor, **options: bool) -> Any:
    """Return the model's output; its head runs on the given positions alone if the model supports that."""
    accepted = forward_parameters(model)
    given: dict[str, Tensor | bool] = {
        name: value for name, value in inputs.items() if name in accepted or name in attention.PLACES
    }
    if "use_cache" in accepted:
        given["use_cache"] = False  # with a cache, transformers would treat the whole row as one text
    if "logits_to_keep" in accepted:
        given["logits_to_keep"] = positions
    return model(**given, **options)


def answer_logits(model: nn.Module, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Return logits (B, K, V) at the given positions, in the dtype of the model.

    The output head runs on these positions alone if the model supports that.
    """
    logits: Tensor = _forward(model, inputs, positions).logits
    if "logits_to_keep" in forward_parameters(model):
        return logits
    return logits[:, positions]


def plain_cache(output: object) -> DynamicCache | None:
    """Return the cache of a forward pass, if every layer keeps the keys and values of all tokens.

    Only such a cache can be repeated for several texts. None stands for a model that keeps anything else, such as a
    state, or the tokens of a window.
    """
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        return None
    return cache if all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers) else None


@contextmanager
def computing(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the `with` block, use the right number of threads and the faster library for linear layers on the CPU.

    A small model computes in one thread. Its operations are so short that a second thread gains nothing; and if another
    process is using that core, each operation waits for it, which made a stage ten times slower.
    """
    before = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    small = on_cpu and sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL
    torch.set_num_threads(1 if small else before)
    try:
        with fast_linear_layers() if on_cpu else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that the causal language model itself accepts, inside any wrapper."""
    return _parameters(type(attention.plain(model)).forward)


@cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


@contextmanager
def _checking(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def choose_layout(
    model: nn.Module,
    texts: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    best: Literal["packed", "shared", "padded"] = "packed",
) -> Layout:
    """Return `best`, or else the next layout that gives each of up to four texts the logits that it gets alone.

    A batch that is too long to be packed is padded, so `packed` means that both layouts are right. For `shared`, return
    `shared_by_text` if the model was switched to that attention (`attention.by_text`).

    Raises:
        ModelError: the model's logits are not finite.
    """
    sample = sample_of(texts)
    if not any(text.answer_ids for text in sample):
        return "single"
    with _checking(model):
        alone = torch.cat([_flat_logits(model, pad_left([text], pad_id), device) for text in sample])
        if not torch.isfinite(alone).all():
            raise ModelError("The model's logits are not finite (NaN or infinite). Are its weights damaged?")
        if best == "shared" and (sharing := _sharing(model, sample, alone, pad_id, device)):
            return sharing
        if not agree(_flat_logits(model, pad_left(sample, pad_id), device), alone):
            return "single"
        if best == "packed" and agree(_flat_logits(model, pack(sample), device), alone):
            return "packed"
        return "padded"


@contextmanager
def rows_for_training(
    model: nn.Module, texts: Sequence[Encoded], layout: Layout, pad_id: int, device: torch.device
) -> Iterator[tuple[Layout, bool]]:
    """Within the `with` block, compute packed rows text by text; yield the layout, and whether that is so.

    Change nothing if `layout` is not packed, or if attention text by text would change the logits of up to four texts.
    On the CPU the layout becomes `shared_by_text` if all texts begin alike, as those of a chat template do. On a GPU,
    gradients of shared tokens would be summed in another order each time.
    """
    with attention.by_text(model) as switched:
        if switched and layout == "packed":
            with _checking(model):
                sample = sample_of(texts)
                right = _flat_logits(model, pad_left(sample, pad_id), device)
                is_right = _agrees_by_text(model, sample, right, device)
                shares = is_right and device.type == "cpu" and _begin_alike(texts)
                shares = shares and _sharing(model, sample, right, pad_id, device) == "shared_by_text"
            if is_right:
                yield ("shared_by_text" if shares else layout), True
                return
    yield layout, False


def _begin_alike(texts: Sequence[Encoded]) -> bool:
    """Return True if texts share enough of their beginnings to be worth it."""
    lengths = [len(text.ids) for text in texts]
    return common_length([text.ids for text in texts]) >= WORTH_SHARING * sum(lengths) / len(lengths)


def common_length(texts: Sequence[Sequence[int]]) -> int:
    """Return how many ids all texts begin with; the last of a text does not count."""
    columns = zip(*(ids[:-1] for ids in texts), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _agrees_by_text(model: nn.Module, sample: Sequence[Encoded], right: Tensor, device: torch.device) -> bool:
    row = row_by_text(sample, "packed")
    inputs = shared_inputs(model, row, "shared_by_text", device)
    return agree(answer_logits(model, inputs, row.positions.to(device))[0], right)


def row_by_text(texts: Sequence[Encoded], layout: Layout, multiple: int = 1) -> SharedRow:
    """Lay texts out as one row for attention text by text, with shared beginnings if `layout` says so.

    `multiple` is that of `share`. A packed row holds each text's last token too.
    """
    if layout == "shared_by_text":
        return share(texts, multiple)
    batch = pack(texts)
    ends = list(accumulate(len(text.ids) for text in texts))
    paths = [list(range(end - len(text.ids), end)) for end, text in zip(ends, texts, strict=True)]
    which = torch.arange(len(batch.positions))
    return SharedRow(batch.inputs["input_ids"], batch.inputs["position_ids"], paths, batch.positions, which)


def row_inputs(row: SharedRow) -> dict[str, Tensor]:
    """Return all inputs of a row whose attention runs text by text."""
    return row.inputs() | attention.places(row.paths)


def sample_of(texts: Sequence[Encoded]) -> list[Encoded]:
    """Return up to four texts of different lengths, with the longest: equal lengths would hide a wrong mask."""
    by_length = sorted(texts, key=lambda text: len(text.ids))
    spread = dict.fromkeys(index * (len(by_length) - 1) // 3 for index in range(4)) if by_length else {}
    return [by_length[index] for index in spread]


def _sharing(
    model: nn.Module, sample: Sequence[Encoded], alone: Tensor, pad_id: int, device: torch.device
) -> Layout | None:
    """Return the shared layout that gives texts with shared beginnings the logits (N, V) that they get `alone`.

    Before each text of the sample comes another that begins alike and ends differently. Return None if no layout
    agrees.
    """
    own = attention.implementation(model)
    layouts: dict[Layout, bool] = {
        "shared_by_text": own == attention.BY_TEXT,
        "shared": own in ("sdpa", "eager", attention.BY_TEXT),  # others do not accept a mask of this form
    }
    siblings = [Encoded(t.ids[: len(t.ids) // 2] + t.ids[len(t.ids) // 2 :][::-1], t.n_prompt_tokens) for t in sample]
    for layout in (layout for layout, possible in layouts.items() if possible):
        try:
            logits, which = read_logits(model, [*siblings, *sample], layout, pad_id, device)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # each model that does not accept this row fails in its own way
        if agree(logits[which[-len(alone) :]], alone):
            return layout
    return None


def agree(together: Tensor, alone: Tensor) -> bool:
    """Return True if two computations (N, V) of the same logits differ only by rounding."""
    tolerance = HALF_PRECISION_TOLERANCE if alone.dtype.itemsize == 2 else AGREEMENT_TOLERANCE
    together, alone = together.float(), alone.float()
    return bool((together - alone).square().mean().sqrt() <= tolerance * alone.std())


def _flat_logits(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the logits (N, V) of the answer tokens of a batch, text after text."""
    return _flat(answer_logits, model, batch, device)


def _flat(compute: Compute, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return what is computed (N, ...) at the answer tokens of a batch, text after text."""
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    found = compute(model, inputs, batch.positions.to(device))
    return found[(batch.labels != IGNORE).to(device)]
