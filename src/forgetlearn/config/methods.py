"""The table of methods: how each forgets and how it learns. Data only: `method.core` runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

How = Literal["all weights", "lora", "one module", "bounded", "ascent"]


@dataclass(frozen=True)
class Method:
    """How a method forgets (None if it does not) and how it learns."""

    forgets: How | None
    learns: How
    source: str = "Ni et al. 2023, arXiv:2311.08011"

    @property
    def plain(self) -> str:
        """The plain method, which only learns, that learns most like this one: what it is compared with."""
        return "lora" if self.learns == "lora" else "ft"


METHODS: Mapping[str, Method] = {
    "ft": Method(None, "all weights"),
    "lora": Method(None, "lora", "Hu et al. 2021, arXiv:2106.09685"),
    "f-ft": Method("all weights", "all weights"),
    "f-lora": Method("lora", "lora"),
    "f-lora-ft": Method("lora", "all weights"),
    # Other ways of updating, to be compared with.
    "locft": Method(None, "one module", "LocFT-BF, ICLR 2026: breadth-first fine-tuning of one module"),
    "ft-c": Method(None, "bounded", "Zhu et al. 2020, arXiv:2012.00363: within an L-infinity ball"),
    "ga": Method("ascent", "all weights", "Jang et al. 2023, arXiv:2210.01504: gradient ascent on the old answers"),
}
PLAIN_METHODS = tuple(name for name, method in METHODS.items() if method.plain == name)
PAPER_METHODS = ("ft", "lora", "f-ft", "f-lora", "f-lora-ft")

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]  # so that pydantic checks names, and no second list of them can differ
