"""Compute the layers below the first trained one once per text, while a stage trains the layers above.

LoRA on the upper half of the layers, as in the default recipe, leaves what the lower half makes of a text as it is for
the whole stage. `bench/lora_step.py` measures the gain.
Shapes: T tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from forgetlearn.models.attention import LOWER_STATES
from forgetlearn.models.batches import SharedRow, agree, answer_logits, row_inputs, sample_of, shared_rows
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import layer_list, width
from forgetlearn.runtime import sharding

GROUP_TOKENS = 512  # computed together
GROUP_TEXTS = 64
LEAST_BYTES = 100_000_000  # that states may take, and more beside a large model:
OF_WEIGHTS = 0.25

WANTED = torch.empty(0)
LayOut = Callable[[Sequence[Encoded]], SharedRow]


class _Reached(Exception):
    """Stops a forward pass at the first trained layer."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class LowerStates:
    """The states (T, D) that enter the first trained layer, for the texts of a stage.

    Texts are computed in groups, each when one of its texts is first wanted. The groups depend on the texts alone, so a
    stage that is resumed gets the same bits.
    """

    def __init__(self, texts: Sequence[Encoded], compute: Callable[[list[Encoded]], list[Tensor]]) -> None:
        self.compute = compute
        unique = {text.ids[:-1]: text for text in texts}
        self.groups = [[unique[key] for key in row] for row in shared_rows(unique, GROUP_TEXTS, GROUP_TOKENS)]
        self.group_of = {text.ids[:-1]: number for number, group in enumerate(self.groups) for text in group}
        self.states: dict[tuple[int, ...], Tensor] = {}

    def of(self, row: SharedRow) -> Tensor | None:
        """Return the states (1, T, D) of a row; None if no text of the stage is in it.

        They are 0 where they do not matter: at a text's last token, and in the text that fills a row.
        """
        ids = row.input_ids[0].tolist()
        given: Tensor | None = None
        for path in row.paths:
            tokens = tuple(ids[place] for place in path)
            found = self._of_text(tokens if tokens in self.group_of else tokens[:-1])
            if found is not None:
                given = found.new_zeros(1, len(ids), found.shape[-1]) if given is None else given
                given[0, torch.tensor(path[: len(found)], device=found.device)] = found
        return given

    def _of_text(self, tokens: tuple[int, ...]) -> Tensor | None:
        if tokens in self.group_of and tokens not in self.states:
            group = self.groups[self.group_of[tokens]]
            self.states |= {text.ids[:-1]: found for text, found in zip(group, self.compute(group), strict=True)}
        return self.states.get(tokens)


@contextmanager
def computed_once(
    model: nn.Module, texts: Sequence[Encoded], lay_out: LayOut, device: torch.device
) -> Iterator[LowerStates | None]:
    """Within the `with` block, let the model skip the layers below the first trained one in rows with their states.

    Yield None, and change nothing, if no layer lies below, if their states are too large, or if they do not stand for
    the layers: if these are random in training, or if more than their states is used above. Attention must run text by
    text (`attention.by_text`), on rows that `lay_out` makes.
    """
    first = first_trained(model)
    if not first or sharding.is_sharded(model) or not _fits(model, texts):
        yield None
        return

    def compute(group: list[Encoded]) -> list[Tensor]:
        row = lay_out(group)
        try:
            with torch.no_grad():
                answer_logits(model, _to(row_inputs(row), device) | {LOWER_STATES: WANTED}, row.positions.to(device))
        except _Reached as reached:
            return [reached.states[0, path.to(device)] for path in _paths(row, group)]
        return []

    layers = layer_list(model)[1]
    before = [vars(layer).get("forward") for layer in layers[: first + 1]]
    for number, layer in enumerate(layers[: first + 1]):
        layer.forward = _skipping(layer.forward, is_first=number == first)
    try:
        usable = _stand_for_the_layers(model, texts, lay_out, device, compute)
        yield LowerStates(texts, compute) if usable else None
    finally:
        for layer, own in zip(layers, before, strict=False):
            del layer.forward
            if own is not None:
                layer.forward = own


def first_trained(model: nn.Module) -> int:
    """Return the number of the first layer with a trained weight; 0 if a weight outside the layers is trained too."""
    path, layers = layer_list(model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained or not all(name.startswith(f"{path}.") for name in trained):
        return 0
    return next(number for number, layer in enumerate(layers) if any(w.requires_grad for w in layer.parameters()))


def _fits(model: nn.Module, texts: Sequence[Encoded]) -> bool:
    n_bytes = 4 * width(model) * sum(len(text.ids) for text in texts)
    return n_bytes <= max(LEAST_BYTES, OF_WEIGHTS * sum(weight.nbytes for weight in model.parameters()))


def _skipping(own: Callable[..., Any], is_first: bool) -> Callable[..., Any]:
    """Return a layer's forward pass that is left out if states are given.

    Given WANTED, the lower layers compute as usual, and the first trained one reports what reaches it.
    """

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        if LOWER_STATES not in options:
            return own(hidden_states, *args, **options)
        states = options.pop(LOWER_STATES)
        if is_first:
            if not states.numel():
                raise _Reached(hidden_states)
            return own(states, *args, **options)
        return own(hidden_states, *args, **options) if not states.numel() else hidden_states

    return forward


def _stand_for_the_layers(
    model: nn.Module,
    texts: Sequence[Encoded],
    lay_out: LayOut,
    device: torch.device,
    compute: Callable[[list[Encoded]], list[Tensor]],
) -> bool:
    """Return True if states are the same each time, and a row with them has the logits of the row itself."""
    sample = sample_of(texts)
    row = lay_out(sample)
    positions = row.positions.to(device)
    inputs = _to(row_inputs(row), device)
    with torch.random.fork_rng(enabled=device.type == "cpu"), torch.no_grad():
        once, again = compute(sample), compute(sample)
        if not once or not all(torch.equal(one, other) for one, other in zip(once, again, strict=True)):
            return False
        given = LowerStates(sample, compute).of(row)
        assert given is not None
        return agree(
            answer_logits(model, inputs | {LOWER_STATES: given}, positions)[0],
            answer_logits(model, inputs, positions)[0],
        )


def _paths(row: SharedRow, texts: Sequence[Encoded]) -> list[Tensor]:
    """Return the places in a row of each text's tokens but the last, also of a text that is part of another."""
    ids = row.input_ids[0].tolist()
    paths = [(path, tuple(ids[place] for place in path)) for path in row.paths]
    return [
        next(torch.tensor(path[: len(tokens)]) for path, along in paths if along[: len(tokens)] == tokens)
        for tokens in (text.ids[:-1] for text in texts)
    ]


def _to(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}
