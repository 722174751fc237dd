"""Compare the search for the values that MEMIT writes with how its authors' code does it.

    OMP_NUM_THREADS=1 python bench/editing.py --facts ../shared/data/counterfact.json --pairs 3 [--model MODEL]

That code optimises one fact after the other, and in each step reads whole texts. Here facts are optimised together, and
what stands before the subject's last token is read once. Both sides take the same number of steps; without --model, a
Llama of 59 million parameters with random weights is edited. The unit is CPU seconds per fact. The last line is the
ratio.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from common import arguments, machine, paired, random_llama, ratio, spread
from forgetlearn.config.schema import EditSettings
from forgetlearn.facts import read_facts
from forgetlearn.method import targets
from forgetlearn.models.language_model import layer_list, load_model

STEPS = EditSettings(steps=10)
TOGETHER, ALONE = "together, beginnings read once", "one after the other, whole texts"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=9, pairs=3)
    parser.add_argument("--model", help="folder of a model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lm = load_model(args.model or random_llama(args.facts, Path(scratch)))
    lm.model.requires_grad_(False)
    facts = list(read_facts(args.facts, limit=args.limit))
    wanted = targets.requests(lm.encoder, facts, targets.contexts(lm, STEPS.contexts, 0))
    path, layers = layer_list(lm.model)

    def run(size: int, continues: bool | None) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            search = targets.Search(lm, f"{path}.{len(layers) // 4}", STEPS, 0.75)
            search.continues = continues
            parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
            return lambda: [search.together(part) for part in parts]

        return prepare

    times = paired({ALONE: run(1, False), TOGETHER: run(len(wanted), None)}, args.pairs)
    print(machine())
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds) / len(wanted):.2f} s per fact")
    print(f"{ALONE} / {TOGETHER}: {spread(times[ALONE], times[TOGETHER])}")
    print(f"{ratio(times[ALONE], times[TOGETHER]):.2f}")


if __name__ == "__main__":
    main()
