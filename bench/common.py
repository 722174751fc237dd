"""Shared by the benchmarks: real facts, a small Llama with random weights, and paired runs."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forgetlearn.cli.main import FEW_PRODUCTS
from forgetlearn.facts import FactSet, read_facts
from forgetlearn.lab.build import LabSettings, train_tokenizer

# The environment that `main` sets, for a process of its own.
AS_THE_COMMAND = os.environ | FEW_PRODUCTS

ROOT = Path(__file__).parents[1]
ZSRE = ROOT.parent / "shared" / "data" / "zsre.json"


def arguments(description: str, *, limit: int, pairs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--facts", type=Path, default=ZSRE)
    parser.add_argument("--limit", type=int, default=limit, help="usable facts of the file")
    parser.add_argument("--pairs", type=int, default=pairs, help="runs of each variant, interleaved")
    return parser


def tokenizer_of(facts: FactSet, vocab_size: int = 8000) -> Any:
    """A BPE tokenizer of all texts of these facts."""
    texts = []
    for fact in facts:
        texts += [f"{prompt} {fact.target_new}" for prompt in (fact.prompt, *fact.rephrase_prompts)]
        texts += [f" {fact.ground_truth}"] if fact.ground_truth else []
        texts += [f"{probe.prompt} {probe.answer}" for probe in fact.locality]
    return train_tokenizer(texts, LabSettings(vocab_size=vocab_size))


def small_llama(tokenizer: Any, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of hidden size 256 and 4 layers: 5.2 M parameters at a vocabulary of 8,000. Random weights."""
    torch.manual_seed(seed)
    return llama(
        tokenizer,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def random_llama(facts: Path, folder: Path) -> Path:
    """A folder with a Llama of 59 M parameters: hidden size 640, 10 layers, a vocabulary of 8,000."""
    tokenizer = tokenizer_of(read_facts(facts))
    shape = {"hidden_size": 640, "intermediate_size": 1720, "num_hidden_layers": 10, "num_attention_heads": 10}
    llama(tokenizer, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(tokenizer: Any, **shape: Any) -> LlamaForCausalLM:
    """A Llama of this shape and random weights, for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return LlamaForCausalLM(config)


def reset_peak() -> None:
    """Reset VmHWM, which would otherwise include earlier work."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> float:
    """Return a value of /proc/self/status (VmRSS, VmHWM) in MB (1e6 bytes)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024 / 1e6


def paired(variants: Mapping[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every variant in every round. A round runs the variants one after the other.

    Every other round runs them in the opposite order. A variant prepares its input and returns a function; only that
    function is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(pairs):
        for name in list(variants) if index % 2 == 0 else reversed(list(variants)):
            run = variants[name]()
            gc.collect()
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of one variant's time divided by the other's in the same round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Return the median ratio and its range over the rounds."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(each):.2f} (rounds {min(each):.2f} to {max(each):.2f})"


def machine() -> str:
    """Describe this machine and the versions of packages in one line."""
    packages = ("torch", "transformers", "accelerate", "peft", "tokenizers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    git = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    commit = git.stdout.strip() or "unknown"
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, {versions}, "
        f"commit {commit}"
    )
