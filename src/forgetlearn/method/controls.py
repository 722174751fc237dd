"""Controls: changes of the weights as large as forgetting, without what it is said to do, or without a part of it.

Whatever a control gains as well is not an effect of forgetting the old answers (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from forgetlearn.config.schema import Control
from forgetlearn.weights.task_vector import StateDict


def controlled(
    base: StateDict, forgotten: Iterable[tuple[str, Tensor]], control: Control, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """`forgotten`, name by name, with the change from `base` replaced by that of a control.

    random: of the same norm per tensor, in a random direction, in the rows that change. reinforce: the same, added
    instead of subtracted. row-norms: every row of `base` keeps its direction and gets the length that it has in
    `forgotten`. directions: every row of `forgotten` gets the length that it has in `base`. centred: without the mean
    over rows, which are tokens in the embeddings and in the head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, moved in forgotten:
        start = base[name].to(moved.device, moved.dtype)
        yield name, moved if control == "none" else _replaced(start, moved, control, generator)


def _replaced(start: Tensor, moved: Tensor, control: Control, generator: torch.Generator) -> Tensor:
    if control == "reinforce":
        return 2 * start - moved
    if control in ("row-norms", "directions"):
        rows, like = (start, moved) if control == "row-norms" else (moved, start)
        lengths, wanted = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (rows, like))
        return torch.where(lengths > 0, rows * (wanted / lengths), start)
    if control == "centred":
        return moved - (moved - start).mean(0, keepdim=True)
    noise: Tensor = torch.randn(start.shape, generator=generator).to(start.device, start.dtype)
    noise *= (moved != start).any(-1, keepdim=True)  # a row that stays stays
    noise *= torch.linalg.vector_norm(moved - start) / torch.linalg.vector_norm(noise)
    return start + noise.nan_to_num()  # where nothing changes
