"""Measure the cost of checking and identifying a model, in seconds per GB, against sha256 over the same bytes.

    OMP_NUM_THREADS=1 python bench/checks.py --gb 0.5 --pairs 5

`check_finite` looks for NaN and infinite numbers in every weight that is loaded. `weights_sha256` identifies a model
that is passed in memory. The last line is the median ratio of their total time to that of one sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable
from time import process_time

import torch

from common import llama, machine
from forgetlearn.lab.build import LabSettings, train_tokenizer
from forgetlearn.models.identity import weights_sha256
from forgetlearn.models.language_model import wrap
from forgetlearn.models.loading import check_finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5, help="size of the model's weights")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each, interleaved")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["Who leads Acme? Ada."], LabSettings(vocab_size=300))
    layers = max(1, round(flags.gb * 1e9 / 4 / 12.6e6))  # of 12.6 M parameters each
    model = llama(tokenizer, hidden_size=1024, intermediate_size=2730, num_hidden_layers=layers, num_attention_heads=8)
    lm = wrap(model, tokenizer)
    weights = [weight.detach().view(torch.uint8).numpy().data for weight in model.parameters()]
    gb = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e9

    def plain() -> None:
        whole = hashlib.sha256()
        for weight in weights:
            whole.update(weight)

    print(machine())
    print(f"{gb:.2f} GB in float32, {flags.pairs} interleaved runs, CPU seconds per GB (medians)")
    ways: dict[str, Callable[[], object]] = {
        "sha256": plain,
        "check_finite": lambda: check_finite(model),
        "weights_sha256": lambda: weights_sha256(lm),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _pair in range(flags.pairs):
        for name, way in ways.items():
            start = process_time()
            way()
            took[name].append((process_time() - start) / gb)
    for name, seconds in took.items():
        print(f"{name:16}{statistics.median(seconds):6.2f}")
    both = zip(took["check_finite"], took["weights_sha256"], took["sha256"], strict=True)
    print(f"ratio {statistics.median((finite + own) / floor for finite, own, floor in both):.2f}")


if __name__ == "__main__":
    main()
