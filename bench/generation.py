"""Compare greedy answers of 8 tokens: transformers' `generate`, one prompt at a time, and forgetlearn's sorted batches.

    python bench/generation.py --facts ../shared/data/zsre.json --limit 500 --pairs 3

Both run in one thread and are timed in CPU seconds, including tokenising and decoding. They must give the same text for
every prompt. The weights are random, so hardly any answer ends early. With `--epochs` the model is first trained on the
old answers, and answers end by themselves. The last line is the ratio at the default batch size.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import GenerationConfig

from common import arguments, machine, paired, ratio, small_llama, spread, tokenizer_of
from forgetlearn.config.schema import EvaluateSettings, StageSettings
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.facts import Fact, read_facts
from forgetlearn.models.language_model import LanguageModel, wrap
from forgetlearn.training.finetune import finetune

BATCH_SIZES = (16, 64, 128)
NEW_TOKENS = 8


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=500, pairs=3)
    parser.add_argument("--epochs", type=int, default=0, help="of training on the old answers, before all else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole, facts = read_facts(args.facts), list(read_facts(args.facts, limit=args.limit))
    prompts = list(dict.fromkeys(fact.prompt for fact in facts))
    tokenizer = tokenizer_of(whole)
    lm = wrap(small_llama(tokenizer).eval(), tokenizer)
    if args.epochs:
        train(lm, facts, args.epochs)

    def batched(size: int) -> dict[str, str]:
        settings = EvaluateSettings(batch_size=size, max_new_tokens=NEW_TOKENS)
        said = Scorer(lm, settings).say(prompts)
        return {prompt: reply.text for prompt, reply in said.items() if isinstance(reply, Generated)}

    expected = {prompt: answer(lm, prompt) for prompt in prompts}
    for size in BATCH_SIZES:
        found = batched(size)
        differing = [prompt for prompt in prompts if found.get(prompt) != expected[prompt]]
        assert not differing, f"{len(differing)} of {len(prompts)} answers differ (batches of {size}): {differing[0]!r}"

    variants = {"one prompt at a time": lambda: lambda: [answer(lm, prompt) for prompt in prompts]}
    variants |= {f"forgetlearn, batches of {size}": (lambda s=size: lambda: batched(s)) for size in BATCH_SIZES}
    times = paired(variants, args.pairs)
    slow = times["one prompt at a time"]
    print(machine())
    print(f"{len(prompts)} prompts, {NEW_TOKENS} new tokens at most, {args.epochs} epochs; {args.pairs} rounds")
    lengths = [len(tokenizer(text)["input_ids"]) for text in expected.values()]
    print(f"identical texts; about {statistics.mean(lengths):.1f} tokens each")
    print(f"{'':36}{'CPU s':>8}{'answers / CPU s':>17}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:36}{median:8.2f}{len(prompts) / median:17.0f}   {spread(slow, seconds)}")
    default = f"forgetlearn, batches of {EvaluateSettings().batch_size}"
    print(f"ratio {ratio(slow, times[default]):.2f}")


def train(lm: LanguageModel, facts: list[Fact], epochs: int) -> None:
    texts = [lm.encoder.encode(fact.prompt, fact.ground_truth, end=True) for fact in facts if fact.ground_truth]
    stage = StageSettings(epochs=epochs, batch_size=16, learning_rate=2e-3)
    finetune(lm.model, texts, stage, seed=0, pad_id=lm.pad_id, device=lm.device)
    lm.model.eval()


def answer(lm: LanguageModel, prompt: str) -> str:
    """The greedy answer up to a line break, as `generate` gives it for a single prompt."""
    ids = torch.tensor([lm.encoder.prompt_ids(prompt)])
    model: Any = lm.model
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=lm.tokenizer.eos_token_id, pad_token_id=lm.pad_id
        ),
    )
    return lm.encoder.decode(out[0, ids.shape[1] :].tolist()).strip().split("\n", 1)[0].strip()


if __name__ == "__main__":
    main()
