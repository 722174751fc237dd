"""Read what modules get and give at one token of each text. Shapes: B texts, T tokens, D width of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from forgetlearn.models.batches import answer_logits, computing, pad_left
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import LanguageModel

AT_ONCE = 32  # texts in a forward pass
Watch = Callable[[Tensor, Tensor], None]  # gets what a module reads and what it returns, both (B, T, D)


class _Enough(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


def first_output(returned: object) -> Tensor:
    """Return the tensor that a module returns, alone or as the first of several."""
    found = returned[0] if isinstance(returned, tuple) else returned
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def watch(lm: LanguageModel, ids: Sequence[Sequence[int]], watchers: Mapping[str, Watch]) -> Iterator[list[int]]:
    """Let the model read texts, in batches padded on the left; call the watchers of modules, which are named by path.

    Yield the indices of the texts of each batch, after the watchers were called. A pass ends after the last module.
    """
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), AT_ONCE):
        own = order[start : start + AT_ONCE]
        _read(lm, [ids[index] for index in own], watchers)
        yield own


def _read(lm: LanguageModel, ids: Sequence[Sequence[int]], watchers: Mapping[str, Watch]) -> None:
    inputs = pad_left([Encoded(tuple(own), len(own)) for own in ids], lm.pad_id).inputs
    shape = inputs["input_ids"].shape
    waiting = set(watchers)

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def call(_module: nn.Module, read: tuple[Tensor, ...], returned: object) -> None:
            given, gave = (tensor.reshape(*shape, -1) for tensor in (read[0], first_output(returned)))
            watchers[path](given, gave)
            waiting.discard(path)
            if not waiting:
                raise _Enough

        return call

    with hooked(lm.model, {path: hook(path) for path in watchers}), computing(lm.model, lm.device):
        try:
            given = {name: value.to(lm.device) for name, value in inputs.items()}
            answer_logits(lm.model, given, torch.tensor([0], device=lm.device))
        except _Enough:
            pass


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    """Within the `with` block, call a hook after the forward pass of each module that a path names."""
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_last_token(
    lm: LanguageModel, ids: Sequence[Sequence[int]], paths: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by path what each module reads (N, D) and returns (N, D') at the last token of each text, in float32."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}

    def keep(path: str) -> Watch:
        return lambda given, gave: found[path].append((given[:, -1].float(), gave[:, -1].float()))

    order = [index for own in watch(lm, ids, {path: keep(path) for path in paths}) for index in own]
    back = torch.tensor(order, device=lm.device).argsort()
    return {
        path: (torch.cat([given for given, _ in parts])[back], torch.cat([gave for _, gave in parts])[back])
        for path, parts in found.items()
    }
