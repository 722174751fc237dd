"""Records as forgetlearn writes them, made by hand: an update, the file of a chain, a run's manifest and summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetlearn.config.schema import RunConfig
from forgetlearn.products import chain
from forgetlearn.storage import digests
from forgetlearn.storage.records import Update

SCORE = {"mean": 50.0, "low": 25.0, "high": 75.0, "n": 4, "errored": 0}
MEAN = SCORE | {"not_asked": 0}


def an_update(**changes: Any) -> dict[str, Any]:
    """An update of a chain."""
    facts = {"source": "f.jsonl", "used": 4, "known": 3, "forgotten": 3, "sha256": "0" * 64}
    return {
        "when": "2026-11-28T12:00:00+00:00",
        "method": "f-ft",
        "coef": 0.3,
        "seed": 0,
        "base": "org/base",
        "base_sha256": "1" * 64,
        "taught_first": False,
        "modules": {"forget": {"mlp": 0.5}, "learn": ["q_proj", "v_proj"]},
        "rows": {"forget": "answers", "learn": "all"},
        "facts": facts | changes.pop("facts", {}),
        "scores": {"reliability": {"token": SCORE}},
        "product": "model",
        "files": {"model.safetensors": "2" * 64},
    } | changes


def write_chain(folder: Path, *updates: dict[str, Any]) -> Path:
    """Write the updates as the chain beside a model, sealed with its hash; its folder comes back."""
    (folder / digests.HISTORY).write_text(chain.as_json([Update.model_validate(update) for update in updates]))
    return folder


def a_manifest(config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The manifest of a finished run; `config` holds what differs in it from the defaults."""
    settings = RunConfig().model_dump(mode="json")
    for name, value in (config or {}).items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    told = {"format": 2, "command": ["forgetlearn", "update"], "config": settings, "inputs": {}}
    told |= {"versions": {"forgetlearn": "0"}, "commit": None, "machine": "Linux", "stages": {}, "finished": True}
    return told | changes


def a_summary(**changes: Any) -> dict[str, Any]:
    """The summary of an update."""
    told = {"method": "f-ft", "coef": 0.3, "seed": 0, "facts": fact_counts(4, known=3), "product": "model"}
    return told | {"phases": {"updated": {"reliability": {"token": MEAN}}}} | changes


def fact_counts(n: int, **changes: Any) -> dict[str, Any]:
    """The counts of a summary, of a file whose `n` facts were all used."""
    counts = {"source": "f.jsonl", "reader": "own", "old_from": "answers", "old_answers": {}, "without_old": {}}
    counts |= {"read": n, "used": n, "set_aside": 0, "scored": n, "left_out": {}, "left_out_probes": {}}
    return counts | {"known": n, "forgotten": n, "not_read": []} | changes


def seal(manifest: dict[str, Any]) -> str:
    """The text of a manifest's file, with a hash that fits."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return json.dumps(told | {"sha256": digests.hash_of(told)})


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's manifest in place, with a hash that fits."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    change(manifest)
    file.write_text(seal(manifest), encoding="utf-8")


def forget_stages(*stages: str) -> Callable[[dict[str, Any]], None]:
    """For `change_manifest`: the run is not finished, and these stages are still to be done."""

    def change(manifest: dict[str, Any]) -> None:
        manifest.pop("finished")
        for stage in stages:
            del manifest["stages"][stage]

    return change


def write_run(folder: Path, manifest: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write both; the folder comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(seal(manifest))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
