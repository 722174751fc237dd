"""Compare what probes cost with what the other scores of a phase cost, on a real chat model.

    OMP_NUM_THREADS=1 python bench/probing.py MODEL --facts ../shared/data/halluedit-llama3.jsonl --limit 30 --pairs 3

One side is what `update` scored before there were probes: the facts' own prompts under every protocol, and the general
prompts. The other is all probes, kind by kind. CPU seconds; the last line is the ratio.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from common import arguments, paired, spread
from forgetlearn.config.schema import EvaluateSettings, ModelSettings
from forgetlearn.evaluation import damage, probe_scoring, probes
from forgetlearn.evaluation.scoring import score
from forgetlearn.facts import read_facts
from forgetlearn.models.language_model import load_model


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=30, pairs=3)
    parser.add_argument("model", help="folder of a model")
    args = parser.parse_args()
    facts, settings = list(read_facts(args.facts, limit=args.limit)), EvaluateSettings()
    lm = load_model(ModelSettings(name=args.model))
    asked = probes.questions(facts, lm.encoder, settings, 0)
    kinds = list(dict.fromkeys(each.probe for each in asked))

    def scored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            score(lm, facts, phase="base", settings=settings)
            damage.measure(lm, settings, Path(folder))

    def probed(own: list[probes.Asked]) -> None:
        probe_scoring.score(lm, own, settings, "base")

    sides = {"scores": lambda: scored, "probes": lambda: lambda: probed(asked)}
    for kind in kinds:
        own = [each for each in asked if each.probe == kind]
        sides[f"{kind} ({len(own)})"] = lambda own=own: lambda: probed(own)
    times = paired(sides, args.pairs)
    for name, seconds in times.items():
        print(f"{name:<32}{statistics.median(seconds):8.1f} CPU s")
    print(f"probes / scores: {spread(times['probes'], times['scores'])}")


if __name__ == "__main__":
    main()
