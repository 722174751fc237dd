"""The tables of methods and of their kinds of stages. They are data only: `method.kinds` implements the kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

KindName = Literal[
    "all weights",
    "lora",
    "one module",
    "bounded",
    "ascent",
    "ascent until gone",
    "lora ascent",
    "npo",
    "lora npo",
    "simnpo",
    "lora simnpo",
    "rome",
    "memit",
    "alphaedit",
    "in context",
    "retrieval",
]


@dataclass(frozen=True)
class KindTraits:
    """What is known of a kind of stage without a model: which weights it trains, and which settings it supports."""

    name: KindName
    adapter: bool = False  # trains a LoRA adapter beside the base; otherwise weights of the base itself
    subtracts: bool = False  # forgetting subtracts what training added; otherwise the training itself forgets
    chooses_weights: bool = False  # learn.modules and learn.rows restrict what it trains
    bounded: bool = False  # no weight changes by more than learn.max_change
    until_gone: bool = False  # forgets by a loss of its own, until the answers are gone
    closed_form: bool = False  # writes each fact's bare answer by a formula; nothing is fine-tuned or kept
    in_context: bool = False  # no weight changes at all: a new fact stands before what is asked

    @property
    def changes_base(self) -> bool:
        """True if the stage changes the base's own weights, which are then in float32."""
        return not (self.adapter or self.in_context)

    @property
    def subtracts_from_base(self) -> bool:
        """True if forgetting subtracts from the base's own weights, and so needs a copy of them."""
        return self.subtracts and not self.adapter


KINDS: Mapping[str, KindTraits] = {
    kind.name: kind
    for kind in (
        KindTraits("all weights", subtracts=True, chooses_weights=True),
        KindTraits("lora", adapter=True, subtracts=True),
        KindTraits("one module"),
        KindTraits("bounded", chooses_weights=True, bounded=True),
        KindTraits("ascent"),
        KindTraits("ascent until gone", until_gone=True),
        KindTraits("lora ascent", adapter=True, until_gone=True),
        KindTraits("npo", until_gone=True),
        KindTraits("lora npo", adapter=True, until_gone=True),
        KindTraits("simnpo", until_gone=True),
        KindTraits("lora simnpo", adapter=True, until_gone=True),
        KindTraits("rome", closed_form=True),
        KindTraits("memit", closed_form=True),
        KindTraits("alphaedit", closed_form=True),
        KindTraits("in context", in_context=True),
        KindTraits("retrieval", in_context=True),
    )
}


@dataclass(frozen=True)
class Method:
    """The kinds of stages that a method forgets and learns with. One of them may be None: it does only the other."""

    forgets: KindName | None
    learns: KindName | None
    source: str = "Ni et al. 2023, arXiv:2311.08011"

    @property
    def last(self) -> KindTraits:
        """The kind of the last stage, which makes the product."""
        return KINDS[self.learns or str(self.forgets)]

    @property
    def makes_adapter(self) -> bool:
        """True if the product is an adapter; otherwise it is a whole model."""
        return self.last.adapter

    @property
    def closed_form(self) -> bool:
        """True if learning writes the facts by a formula."""
        return self.last.closed_form

    @property
    def in_context(self) -> bool:
        """True if the method changes no weight, and so makes no product: it shows the model the new facts."""
        return self.last.in_context

    @property
    def fine_tunes(self) -> bool:
        """True if its stages train on texts."""
        return not (self.closed_form or self.in_context)

    @property
    def plain(self) -> str:
        """The method to compare this one with: it learns in a similar way, but does not forget."""
        return "lora" if self.makes_adapter else "ft"

    @property
    def subtracts(self) -> bool:
        """True if forgetting subtracts, so that the method has a coefficient."""
        return self.forgets is not None and KINDS[self.forgets].subtracts

    @property
    def subtracts_from_base(self) -> bool:
        """True if forgetting subtracts from the base's own weights."""
        return self.forgets is not None and KINDS[self.forgets].subtracts_from_base


ASCENT = "Jang et al. 2023, arXiv:2210.01504: gradient ascent on the answers, here with KL on what is kept"
NPO = "Zhang et al. 2024, arXiv:2404.05868: negative preference optimisation"
SIMNPO = "Fan et al. 2024, arXiv:2410.07163: negative preference optimisation without a reference model"
METHODS: Mapping[str, Method] = {
    "ft": Method(None, "all weights"),
    "lora": Method(None, "lora", "Hu et al. 2021, arXiv:2106.09685"),
    "f-ft": Method("all weights", "all weights"),
    "f-lora": Method("lora", "lora"),
    "f-lora-ft": Method("lora", "all weights"),
    # Other ways of updating, for comparison.
    "locft": Method(None, "one module", "LocFT-BF, ICLR 2026: breadth-first fine-tuning of one module"),
    "ft-c": Method(None, "bounded", "Zhu et al. 2020, arXiv:2012.00363: within an L-infinity ball"),
    "ga": Method("ascent", "all weights", "Jang et al. 2023, arXiv:2210.01504: gradient ascent on the old answers"),
    "rome": Method(None, "rome", "Meng et al. 2022, arXiv:2202.05262: one fact after the other, in one layer"),
    "memit": Method(None, "memit", "Meng et al. 2023, arXiv:2210.07229: all facts at once, in several layers"),
    "alphaedit": Method(None, "alphaedit", "Fang et al. 2025, arXiv:2410.02355: MEMIT in the null space of its keys"),
    # What can be done without changing the model.
    "in-context": Method(None, "in context", "Cohen et al. 2023, arXiv:2307.12976: the new fact in the prompt"),
    "retrieval": Method(None, "retrieval", "Zhong et al. 2023, arXiv:2305.14795: the nearest of all new facts"),
    # Forgetting without learning; -ft: all weights instead of an adapter.
    "subtract": Method("lora", None),
    "subtract-ft": Method("all weights", None),
    "ascent": Method("lora ascent", None, ASCENT),
    "ascent-ft": Method("ascent until gone", None, ASCENT),
    "npo": Method("lora npo", None, NPO),
    "npo-ft": Method("npo", None, NPO),
    "simnpo": Method("lora simnpo", None, SIMNPO),
    "simnpo-ft": Method("simnpo", None, SIMNPO),
}
PLAIN_METHODS = tuple(name for name, method in METHODS.items() if method.plain == name)
FORGETTING_METHODS = tuple(name for name, method in METHODS.items() if method.learns is None)
UPDATING_METHODS = tuple(name for name, method in METHODS.items() if method.learns and not method.in_context)
PAPER_METHODS = ("ft", "lora", "f-ft", "f-lora", "f-lora-ft")

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]  # so that pydantic checks names without a second list of them
