"""The tables of methods and of the kinds of stages they are made of. Data only: `method.kinds` has what a kind does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

KindName = Literal["all weights", "lora", "one module", "bounded", "ascent"]


@dataclass(frozen=True)
class Kind:
    """One kind of fine-tuning stage: which weights it trains, and what may be asked of it."""

    name: KindName
    adapter: bool = False  # trains a LoRA adapter beside the base; otherwise weights of the base itself
    subtracts: bool = False  # forgetting subtracts what it added; otherwise the training itself forgets
    chooses_weights: bool = False  # learn.modules and learn.rows restrict what it trains
    bounded: bool = False  # no weight moves further than learn.max_change from where it was

    @property
    def subtracts_from_base(self) -> bool:
        """True if forgetting changes weights of the base, any of them, and needs a copy of them to subtract from."""
        return self.subtracts and not self.adapter


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("all weights", subtracts=True, chooses_weights=True),
        Kind("lora", adapter=True, subtracts=True),
        Kind("one module"),
        Kind("bounded", chooses_weights=True, bounded=True),
        Kind("ascent"),
    )
}


@dataclass(frozen=True)
class Method:
    """The kind of stage a method forgets with (None if it does not forget), and the kind it learns with."""

    forgets: KindName | None
    learns: KindName
    source: str = "Ni et al. 2023, arXiv:2311.08011"

    @property
    def makes_adapter(self) -> bool:
        """True if the product is an adapter; otherwise it is a whole model."""
        return KINDS[self.learns].adapter

    @property
    def plain(self) -> str:
        """The plain method, which only learns, that learns most like this one: what it is compared with."""
        return "lora" if self.makes_adapter else "ft"

    @property
    def subtracts(self) -> bool:
        """True if there is a coefficient of what forgetting subtracts."""
        return self.forgets is not None and KINDS[self.forgets].subtracts

    @property
    def subtracts_from_base(self) -> bool:
        """True if forgetting subtracts from weights of the base itself."""
        return self.forgets is not None and KINDS[self.forgets].subtracts_from_base


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
