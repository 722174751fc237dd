"""Records as forgetlearn writes them, made by hand: an update, the file of a chain, a run's manifest and summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forgetlearn.config.schema import RunConfig
from forgetlearn.products import chain
from forgetlearn.storage import digests

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
    (folder / digests.HISTORY).write_text(chain.as_json(list(updates)))
    return folder


def a_manifest(config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The manifest of a finished run of an earlier version, without a hash; `config` holds what differs in it."""
    settings = RunConfig().model_dump(mode="json")
    for name, value in (config or {}).items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    told = {"command": ["forgetlearn", "update"], "config": settings, "inputs": {}, "versions": {"forgetlearn": "0"}}
    return told | {"machine": "Linux", "stages": {}, "finished": True} | changes


def a_summary(**changes: Any) -> dict[str, Any]:
    """The summary of an update."""
    facts = {"source": "f.jsonl", "reader": "own", "old_from": "answers", "read": 4, "used": 4, "known": 3}
    facts |= {"left_out": {}, "left_out_probes": {}}
    told = {"method": "f-ft", "coef": 0.3, "seed": 0, "facts": facts, "product": "model"}
    return told | {"phases": {"updated": {"reliability": {"token": MEAN}}}} | changes


def write_run(folder: Path, manifest: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write both; the folder comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
