"""Compare forgetlearn's scoring under `token` with scoring record by record, as EasyEdit's compute_edit_quality does.

    python bench/scoring.py --facts ../shared/data/zsre.json --limit 200 --pairs 5

Both sides score three quantities of every fact (reliability, generality, locality) in one thread, and are timed in CPU
seconds. Their scores must be equal for every fact. The other side reimplements EasyEdit's definition with its work per
record: for each of the three probes it tokenises the whole text twice and the prompt once, counts the padding, computes
the logits at all positions in one forward pass, and cuts their argmax to the answer. EasyEdit scores the model before
the update at another time, so neither side includes that.

The floors are forward passes alone over the distinct texts, which are encoded and batched beforehand. Attention is
computed text by text, and logits only at the answers. One floor has forgetlearn's rows, in which texts share a common
beginning; the other has packed rows of 48 whole texts (the fastest of 16, 32 and 48). The last line is the ratio.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics

import numpy as np
import torch
from torch import nn

from common import arguments, machine, paired, ratio, small_llama, spread, tokenizer_of
from forgetlearn.config.schema import EvaluateSettings, StageSettings
from forgetlearn.evaluation.scoring import locality_predictions, score
from forgetlearn.facts import Fact, read_facts
from forgetlearn.models import attention
from forgetlearn.models.attention import places
from forgetlearn.models.batches import ROW_TOKENS, answer_logits, by_text, computing, pack, share, shared_rows
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.models.language_model import LanguageModel, wrap
from forgetlearn.training.finetune import finetune

MAX_LENGTH = 40  # of EasyEdit's settings for fine-tuning
QUANTITIES = ("reliability", "generality", "locality")
Scores = dict[str, tuple[float, ...]]
Forward = tuple[dict[str, torch.Tensor], torch.Tensor]  # inputs, and the positions of the logits that are wanted


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
            if row.protocol in ("token", "agreement"):
                found[row.fact] |= {quantity: row.score(quantity) for quantity in QUANTITIES if row.has(quantity)}
        return {key: tuple(values[quantity] for quantity in QUANTITIES) for key, values in found.items()}

    expected = one_by_one()
    for asked in (three, facts):
        found = ours(asked)
        differing = [key for key in expected if found[key] != expected[key]]
        assert not differing, f"{len(differing)} of {len(facts)} facts have other scores, the first is {differing[0]}"
    means = [100 * statistics.mean(values[index] for values in expected.values()) for index in range(3)]

    texts = distinct_texts(lm, three)
    shared, packed = shared_batches(texts), packed_batches(texts)
    times = paired(
        {
            "one record at a time": lambda: one_by_one,
            "forgetlearn.evaluation.scoring": lambda: lambda: ours(three),
            "forgetlearn.evaluation.scoring, with residue": lambda: lambda: ours(facts),
            "floor: forwards of shared rows": lambda: lambda: forwards(lm, shared),
            "floor: forwards of packed rows": lambda: lambda: forwards(lm, packed),
        },
        args.pairs,
    )
    slow, own, more, floor, whole_texts = times.values()
    probes = len(facts) + sum(len(fact.rephrase_prompts) + len(fact.locality) for fact in facts)
    print(machine())
    print(
        f"{len(facts)} facts, {probes} probes, "
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
    print(f"forgetlearn / floor of shared rows: {spread(own, floor)}")
    print(f"forgetlearn / floor of packed rows: {spread(own, whole_texts)}")
    print(f"one record at a time / forgetlearn with residue too: {spread(slow, more)}")
    print(f"one record at a time / forgetlearn: {spread(slow, own)}")
    print(f"ratio {ratio(slow, own):.2f}")


def prepared(tokenizer: object, facts: list[Fact]) -> tuple[nn.Module, nn.Module]:
    """Return a model that half knows the old answers, and that model tuned on the new ones, so that no score is 0."""
    model = small_llama(tokenizer)
    encoder = Encoder(tokenizer, "plain")
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
    """Return the most likely id at every answer position, and the answer's own ids (protocols.md, `token`).

    The steps and their order are the same as in EasyEdit's `test_prediction_acc` for a single prompt.
    """
    text = f"{prompt} {answer}"
    room = max(MAX_LENGTH, len(tokenizer.encode(text)) + 1)
    form = {"padding": True, "truncation": True, "max_length": room, "return_tensors": "pt"}
    whole = tokenizer([text], **form)
    before = tokenizer([prompt], **form)
    n_prompt = int((before["input_ids"][0] != tokenizer.pad_token_id).sum())
    n_prompt += int((whole["input_ids"][0] == tokenizer.pad_token_id).sum())
    whole.pop("token_type_ids", None)
    best = model(**whole).logits.argmax(dim=-1).squeeze().numpy().tolist()
    return best[n_prompt - 1 : -1], whole["input_ids"].squeeze().numpy().tolist()[n_prompt:]


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
    return float(np.mean(np.equal(ids, others)))


def distinct_texts(lm: LanguageModel, facts: list[Fact]) -> list[Encoded]:
    """Return the distinct texts of the three quantities, encoded and sorted by length."""
    pairs = {}
    for fact in facts:
        pairs |= dict.fromkeys((prompt, fact.target_new) for prompt in (fact.prompt, *fact.rephrase_prompts))
        pairs |= dict.fromkeys((probe.prompt, probe.answer) for probe in fact.locality)
    return sorted((lm.encoder.encode(*pair) for pair in pairs), key=lambda text: len(text.ids))


def packed_batches(texts: list[Encoded]) -> list[Forward]:
    batches = [by_text(pack(texts[start : start + 48])) for start in range(0, len(texts), 48)]
    return [(batch.inputs, batch.positions) for batch in batches]


def shared_batches(texts: list[Encoded]) -> list[Forward]:
    by_index = dict(enumerate(texts))
    rows = [share([by_index[index] for index in row]) for row in shared_rows(by_index, 64, ROW_TOKENS["cpu"])]
    return [(row.inputs() | places(row.paths), row.positions) for row in rows]


@torch.inference_mode()
def forwards(lm: LanguageModel, batches: list[Forward]) -> None:
    with computing(lm.model, lm.device), attention.by_text(lm.model):
        for inputs, positions in batches:
            answer_logits(lm.model, inputs, positions).argmax(dim=-1)


if __name__ == "__main__":
    main()
