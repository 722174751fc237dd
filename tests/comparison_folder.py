"""A comparison's folder made by hand: cells that look as `compare` leaves them, without a model or training."""

from __future__ import annotations

import random
from pathlib import Path

from forgetlearn.comparison.grid import CELLS, SHARED, Cell, CompareSettings, cells_of
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.storage import disk, run_folder
from written_by_hand import fact_counts

NASTY = '<script>document.title = "run"</script> & \'q\' "r"'


def make_comparison(path: Path, settings: CompareSettings, count: int, *, forget_epochs: int = 3) -> Path:
    """A finished comparison of `count` facts, the second of them nasty: more epochs give more new answers, methods
    that forget some more, and lose locality with the coefficient."""
    config = load_config(None, {"model.name": "base", "forget.epochs": forget_epochs, "learn.epochs": 3})
    whole = {"run": config.model_dump(mode="json"), "compare": settings.model_dump(mode="json")}
    run = run_folder.RunFolder.create(path, whole, {"facts_sha256": "0" * 64, "base_sha256": "1" * 64})
    inputs = [
        {"id": f"{n:016x}", "prompt": f"The capital of the country number {n} is called"}
        | {"target_new": f"new {n}", "ground_truth": f"old {n}"}
        for n in range(count)
    ]
    inputs[1] |= {"prompt": NASTY, "target_new": NASTY}
    for cell in cells_of(settings, config):
        _make_cell(path / CELLS / cell.name, cell, inputs)
    for seed in settings.seeds:
        (path / SHARED / f"old-lora-seed{seed}").mkdir(parents=True)
        disk.write_rows(path / SHARED / f"old-lora-seed{seed}" / "steps.jsonl", _losses(20))
    run.finish()
    return path


def _make_cell(path: Path, cell: Cell, inputs: list[dict]) -> None:
    run = run_folder.RunFolder.create(path, {}, {})
    chance = random.Random(cell.name)
    forgets = bool(METHODS[cell.method].forgets)
    learned = min(0.95, 0.3 + 0.05 * cell.epochs + 0.3 * forgets)
    rows = []
    for place, fact in enumerate(inputs):
        new = chance.random() < learned
        errors = {"reliability": "too long"} if place == 2 else {}
        rows += _rows(fact, "base", 0.0, 1.0, 1.0, f"old {place}", {})
        if forgets:
            rows += _rows(fact, "forgotten", 0.0, 1 - (cell.coef or 0) / 2, 1 - (cell.coef or 0) / 10, "?", {})
        said = fact["target_new"] if new else f"old {place}" if place % 2 else "something"
        old = 0.0 if new else float(place % 2)
        rows += _rows(fact, "updated", None if errors else float(new), old, 1 - 0.02 * cell.epochs, said, errors)
    facts = fact_counts(len(inputs))
    disk.write_rows(path / "facts.jsonl", rows)
    disk.write_rows(path / "inputs.jsonl", inputs)
    told = {"method": cell.method, "coef": cell.coef, "seed": cell.seed, "phases": {}, "product": None}
    disk.write_json(path / "summary.json", told | {"facts": facts})
    (path / "logs").mkdir()
    disk.write_rows(path / "logs" / "learn.jsonl", _losses(10 * cell.epochs))
    run.finish()


def _rows(
    fact: dict, phase: str, new: float | None, old: float, local: float, said: str, errors: dict[str, str]
) -> list[dict]:
    row = {"fact": fact["id"], "phase": phase, "errors": {}}
    asked = row | {"reliability": new, "generality": new, "residue": old, "errors": errors}
    return [
        asked | {"protocol": "token"},
        asked | {"protocol": "generate", "said": said},
        asked | {"protocol": "contains"},
        row | {"protocol": "agreement", "locality": local},
    ]


def _losses(steps: int) -> list[dict]:
    return [{"step": step, "loss": 4 / step} for step in range(1, steps + 1)]
