"""Scoring under `token`: one forward pass per probe, as EasyEdit defines it, against forgetlearn.scoring.

    python bench/scoring.py --facts ../shared/data/zsre.json --limit 200 --pairs 5

Three quantities of every fact (reliability, generality, locality), one thread, CPU seconds. The scores of
both sides must be equal, fact by fact. The floor is the forward passes alone: texts that are encoded and
sorted beforehand, in batches of 64, logits at the answers only. The last line is the ratio.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics

import torch
from torch import nn

from common import arguments, machine, paired, ratio, small_llama, spread, tokenizer_of
from forgetlearn.config import EvaluateSettings, StageSettings
from forgetlearn.encoding import Encoder
from forgetlearn.facts import Fact, read_facts
from forgetlearn.finetune import finetune
from forgetlearn.forward import answer_logits, pad_left
from forgetlearn.models import LanguageModel, wrap
from forgetlearn.scoring import locality_predictions, score

QUANTITIES = ("reliability", "generality", "locality")
Scores = dict[str, tuple[float, ...]]


def main() -> None:
    args = arguments(__doc__.splitlines()[0], limit=200, pairs=5).parse_args()
    torch.set_num_threads(1)
    whole, facts = read_facts(args.facts), list(read_facts(args.facts, limit=args.limit))
    tokenizer = tokenizer_of(whole)
    before, after = prepared(tokenizer, facts)
    # Residue (does it still give the old answer) is a fourth quantity that EasyEdit does not have.
    three = [dataclasses.replace(fact, ground_truth=None) for fact in facts]
    settings = EvaluateSettings(protocols=("token",))
    lm = wrap(after, tokenizer)
    was = {fact.id: [predicted_ids(before, tokenizer, p.prompt, p.answer)[0] for p in fact.locality] for fact in facts}
    reference = locality_predictions(score(wrap(before, tokenizer), three, phase="base", settings=settings))
    assert reference == was, "the two disagree about the model before the update"

    def one_by_one() -> Scores:
        return {fact.id: scores_one_by_one(after, tokenizer, fact, was[fact.id]) for fact in facts}

    def ours(asked: list[Fact]) -> Scores:
        rows = score(lm, asked, phase="updated", settings=settings, reference=reference)
        found: dict[str, dict[str, float]] = {fact.id: {} for fact in asked}
        for row in rows:
            if row["protocol"] in ("token", "agreement"):
                found[row["fact"]] |= {quantity: row[quantity] for quantity in QUANTITIES if quantity in row}
        return {key: tuple(values[quantity] for quantity in QUANTITIES) for key, values in found.items()}

    expected = one_by_one()
    for asked in (three, facts):
        found = ours(asked)
        differing = [key for key in expected if found[key] != expected[key]]
        assert not differing, f"{len(differing)} of {len(facts)} facts have other scores, the first is {differing[0]}"
    means = [100 * statistics.mean(values[index] for values in expected.values()) for index in range(3)]

    batches = encoded_batches(lm, three, settings.batch_size)
    times = paired(
        {
            "one forward per probe": lambda: one_by_one,
            "forgetlearn.scoring": lambda: lambda: ours(three),
            "forgetlearn.scoring, with residue": lambda: lambda: ours(facts),
            "floor: the forwards alone": lambda: lambda: forwards(after, batches),
        },
        args.pairs,
    )
    slow, own, more, floor = times.values()
    probes = len(facts) + sum(len(fact.rephrase_prompts) + len(fact.locality) for fact in facts)
    print(machine())
    print(
        f"{len(facts)} facts, {probes} probes, {sum(len(texts) for texts in batches)} of them distinct; "
        f"{sum(p.numel() for p in after.parameters()):,} parameters, {len(tokenizer)} tokens; {args.pairs} rounds"
    )
    print(
        "equal scores on all facts; means "
        + ", ".join(f"{name} {mean:.1f}" for name, mean in zip(QUANTITIES, means, strict=True))
    )
    print(f"{'':36}{'CPU s':>8}{'facts / CPU s':>15}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:36}{median:8.2f}{len(facts) / median:15.0f}")
    print(f"forgetlearn / floor: {spread(own, floor)}")
    print(f"one forward per probe / forgetlearn with residue too: {spread(slow, more)}")
    print(f"one forward per probe / forgetlearn: {spread(slow, own)}")
    print(f"ratio {ratio(slow, own):.2f}")


def prepared(tokenizer: object, facts: list[Fact]) -> tuple[nn.Module, nn.Module]:
    """A model that half knows the old answers, and the same tuned on the new: scores between 0 and 1, not 0."""
    model = small_llama(tokenizer)
    encoder = Encoder(tokenizer, "off")
    stage = StageSettings(epochs=15, batch_size=16, learning_rate=2e-3)
    old = [(fact.prompt, fact.ground_truth) for fact in facts if fact.ground_truth]
    old += [(probe.prompt, probe.answer) for fact in facts for probe in fact.locality]
    new = [(fact.prompt, fact.target_new) for fact in facts]
    stages = []
    for pairs in (old, new):
        texts = [encoder.encode(*pair, end=True) for pair in pairs]
        finetune(model, texts, stage, seed=0, pad_id=tokenizer.pad_token_id, device=torch.device("cpu"))
        stages.append(copy.deepcopy(model))
    return stages[0], stages[1]


@torch.no_grad()
def predicted_ids(model: nn.Module, tokenizer: object, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Most likely id at every answer position, and the answer's own ids (protocols.md, `token`).

    The whole text goes through the model alone; where the answer begins is the length of the prompt's ids.
    """
    whole = tokenizer(f"{prompt} {answer}", return_tensors="pt", return_token_type_ids=False)
    n_prompt = len(tokenizer(prompt)["input_ids"])
    best = model(**whole).logits.argmax(dim=-1)[0].tolist()
    return best[n_prompt - 1 : -1], whole["input_ids"][0].tolist()[n_prompt:]


def scores_one_by_one(model: nn.Module, tokenizer: object, fact: Fact, was: list[list[int]]) -> tuple[float, ...]:
    """Reliability, generality, locality of one fact."""

    def accuracy(prompt: str) -> float:
        predicted, wanted = predicted_ids(model, tokenizer, prompt, fact.target_new)
        return equal_share(predicted, wanted)

    rephrased = [accuracy(prompt) for prompt in fact.rephrase_prompts]
    kept = [
        equal_share(predicted_ids(model, tokenizer, probe.prompt, probe.answer)[0], ids)
        for probe, ids in zip(fact.locality, was, strict=True)
    ]
    return accuracy(fact.prompt), statistics.mean(rephrased), statistics.mean(kept)


def equal_share(ids: list[int], others: list[int]) -> float:
    return sum(a == b for a, b in zip(ids, others, strict=True)) / len(ids)


def encoded_batches(lm: LanguageModel, facts: list[Fact], size: int) -> list[list]:
    """The distinct texts of the three quantities, encoded, sorted by length, in batches."""
    pairs = {}
    for fact in facts:
        pairs |= dict.fromkeys((prompt, fact.target_new) for prompt in (fact.prompt, *fact.rephrase_prompts))
        pairs |= dict.fromkeys((probe.prompt, probe.answer) for probe in fact.locality)
    texts = sorted((lm.encoder.encode(*pair) for pair in pairs), key=lambda text: len(text.ids))
    return [texts[start : start + size] for start in range(0, len(texts), size)]


@torch.inference_mode()
def forwards(model: nn.Module, batches: list[list]) -> None:
    pad = model.config.pad_token_id
    for texts in batches:
        batch = pad_left(texts, pad)
        answer_logits(model, batch.inputs, batch.positions).argmax(dim=-1)


if __name__ == "__main__":
    main()
