"""What the fault tests share: a tiny model and facts on the disk, the jobs on them, and the count at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.harness import Job, Tally

TALLY = Tally()
FACTS = 4


def pytest_terminal_summary(terminalreporter):
    if TALLY.tried:
        told = ", ".join(f"{TALLY.tried[kind]} {kind}" for kind in sorted(TALLY.tried))
        terminalreporter.write_line(f"faults: {told}; {len(TALLY.losses)} losses")


@pytest.fixture(scope="session")
def tally() -> Tally:
    return TALLY


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_model, char_tokenizer) -> Path:
    """A folder with `base` (three shards), `tuned` and `facts.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("base", 0), ("tuned", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name, max_shard_size="60KB")
        char_tokenizer.save_pretrained(folder / name)
    lines = [
        {
            "prompt": f"Number {n} is",
            "ground_truth": f"old {n}",
            "target_new": f"new {n}",
            "rephrase_prompts": [f"What is {n}?"],
            "locality": [{"prompt": f"Far {n} is", "answer": "away"}],
        }
        for n in range(FACTS)
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(method: str, **more: object) -> dict[str, object]:
    stage = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    return {
        "method": method,
        "forget": {**stage, "only_known": False, "coef": 1.0},
        "learn": stage,
        "evaluate": {"protocols": ["token"], "general_prompts": False},
        "checkpoint_minutes": 1e-9,
        **more,
    }


@pytest.fixture(scope="session")
def jobs(inputs, tmp_path_factory):
    """`jobs(name)`: update by a method, compare, or subtract; each in a place of its own, done once here before."""
    from forgetlearn.comparison.grid import CompareSettings, fill
    from forgetlearn.comparison.table import write_table
    from forgetlearn.runs.update import update
    from forgetlearn.weights.folder_arithmetic import subtract_folders
    from forgetlearn.weights.streaming import Numbers

    base, facts, root = inputs / "base", inputs / "facts.jsonl", tmp_path_factory.mktemp("jobs")
    compared = CompareSettings(methods=("ft", "f-lora"), coefs=(0.5,), seeds=(0,))

    def compare(output: Path) -> None:
        fill(base, facts, compared, settings("ft"), output=output, resume=True)
        write_table(output)

    acts = {
        "f-ft": lambda out: update(base, facts, configs["f-ft"], output=out, resume=True),
        "f-lora": lambda out: update(base, facts, configs["f-lora"], output=out, resume=True),
        "compare": compare,
        "subtract": lambda out: subtract_folders(
            base, out, 0.5, tuned=inputs / "tuned", numbers=Numbers(threads=1), overwrite=True
        ),
    }
    configs = {"f-ft": settings("f-ft", keep_change=True), "f-lora": settings("f-lora")}
    made: dict[str, Job] = {}

    def job(name: str) -> Job:
        if name not in made:
            place = root / name
            made[name] = Job(
                name,
                place,
                inputs,
                lambda: acts[name](place / "out"),
                configs.get(name),
                in_one_step=name == "subtract",
            )
            made[name].clear()
            made[name].act()  # so that children need no imports
        return made[name]

    return job
