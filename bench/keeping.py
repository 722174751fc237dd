"""Compare an epoch of LoRA that also keeps the base's answers to general prompts with one that does not.

    python bench/keeping.py MODEL --facts ../shared/data/zsre.json --limit 40 --pairs 3

MODEL is the folder of a model; give one with a chat template. Both sides learn the same facts in the same order with
one thread, in batches of 8. The unit is CPU milliseconds per step, including set-up. The last line is the ratio:
keeping is meant to cost at most half a step.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import torch

from common import arguments, machine, paired, ratio, spread
from forgetlearn.config.schema import EvaluateSettings, LoraSettings, StageSettings
from forgetlearn.evaluation.general_prompts import keeping
from forgetlearn.evaluation.scorer import Generated, Scorer
from forgetlearn.facts import read_facts
from forgetlearn.models import lora
from forgetlearn.models.language_model import load_model
from forgetlearn.training.finetune import finetune
from forgetlearn.training.schedule import Kept
from forgetlearn.training.trainer import Variant

STAGE = StageSettings(epochs=1, batch_size=8)
PLAIN, KEEPING = "learning alone", "learning and keeping"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=40, pairs=3)
    parser.add_argument("model", help="folder of a model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm = load_model(args.model)
    facts = read_facts(args.facts, limit=args.limit)
    texts = [lm.encoder.encode(fact.prompt, fact.target_new, end=True) for fact in facts]
    scorer = Scorer(lm, EvaluateSettings(max_new_tokens=24))
    said = {prompt: reply for prompt, reply in scorer.say(keeping()).items() if isinstance(reply, Generated)}
    own = {prompt: lm.encoder.encode(prompt, reply.text) for prompt, reply in said.items() if reply.text}
    tops = scorer.top(own, 64)
    kept = Kept(tuple(own.values()), tuple(tops[prompt] for prompt in own), 1.0)
    base = lm.model

    def epoch(variant: Variant) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            model = lora.attach(copy.deepcopy(base), LoraSettings(), lora.LEARN, 0)
            options = {"seed": 0, "pad_id": lm.pad_id, "device": lm.device}
            return lambda: finetune(model, texts, STAGE, variant=variant, **options)

        return prepare

    times = paired({PLAIN: epoch(Variant()), KEEPING: epoch(Variant(kept=kept))}, args.pairs)
    steps = STAGE.epochs * math.ceil(len(texts) / STAGE.batch_size)
    print(machine())
    for name, seconds in times.items():
        print(f"{name}: {1000 * statistics.median(seconds) / steps:.0f} ms per step")
    print(f"{KEEPING} / {PLAIN}: {spread(times[KEEPING], times[PLAIN])}")
    print(f"{ratio(times[KEEPING], times[PLAIN]):.2f}")


if __name__ == "__main__":
    main()
