"""The chain of updates that made a model: a file beside each product, carried on when the product is updated again.

What stands in it may be published: names without folders, counts, hashes and scores, never facts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forgetlearn._version import __version__
from forgetlearn.errors import RunError, some
from forgetlearn.facts import FactSet, read_facts
from forgetlearn.facts.files import is_hub_id
from forgetlearn.storage import records
from forgetlearn.storage.digests import COMMIT_DIGITS, HISTORY, damaged, hash_of, model_files, sha256_of
from forgetlearn.storage.disk import read_json, write_text
from forgetlearn.storage.run_folder import RunFolder, is_run

log = logging.getLogger("forgetlearn")

Update = dict[str, Any]
TOLD = ("mean", "low", "high", "n", "errored")  # of a score


def carry_on(run: RunFolder, products: Iterable[Path], facts: FactSet) -> None:
    """Write the base's chain and this update beside each product."""
    earlier, own = chain_of_base(run.manifest), _entry(run, facts)
    for product in products:
        update = {**own, "product": product.name, "files": product_files(product)}
        _write_chain(product, [*earlier, update])


def carry_over(product: Path, to: Path, name: str) -> None:
    """Write a product's chain beside what was made of it: merged weights, or a copy with another base named."""
    if chain := read_chain(product):
        chain[-1] |= {"product": name, "files": product_files(to)}
        _write_chain(to, chain)


def _write_chain(product: Path, chain: list[Update]) -> None:
    write_text(product / HISTORY, as_json(chain))


def as_json(chain: list[Update]) -> str:
    """What `forgetlearn.json` holds."""
    told = {"format": 1, "versions": {"forgetlearn": __version__}, "updates": chain, "sha256": hash_of(chain)}
    return json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _adapted(adapter: Path) -> list[str] | None:
    """The modules that an adapter changes, as its config has them; None where there is none."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        return None
    told = read_json(config)
    return sorted([*told["target_modules"], *(told.get("target_parameters") or ())])


def parent_of(base: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's manifest says of its parent: the base, and the run that made it if one did."""
    return {"name": base, "run": _run_around(Path(base)) if inputs.get("base_sha256") else None}


def base_name(manifest: Mapping[str, Any]) -> str | None:
    """Return the folder or hub id of a run's base, or the name of a model in memory; None before a run starts."""
    parent = manifest.get("parent") or {}
    name: str | None = manifest["config"]["model"]["name"] or parent.get("name")
    return name


def _entry(run: RunFolder, facts: FactSet) -> Update:
    config, summary = run.manifest["config"], read_json(run.path / "summary.json")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": summary["method"],
        "coef": summary["coef"],
        "seed": summary["seed"],
        "base": base_id(run.manifest),
        "base_sha256": run.manifest["inputs"].get("base_sha256"),
        "weights_sha256": run.manifest["inputs"].get("weights_sha256"),
        "taught_first": config["teach"]["epochs"] > 0,
        "modules": {
            "forget": None if summary["coef"] is None else config["forget"]["modules"],
            "learn": _adapted(run.path / "adapter") or config["learn"]["modules"],
        },
        "rows": {
            "forget": None if summary["coef"] is None else config["forget"].get("rows", "all"),
            "learn": config["learn"].get("rows", "all"),
        },
        "facts": {
            "source": facts.source if is_hub_id(facts.source) else Path(facts.source).name,
            "used": facts.used,
            "known": summary["facts"]["known"],
            "forgotten": summary["facts"]["forgotten"],
            "sha256": facts.sha256(),
        },
        "scores": {
            quantity: {protocol: {name: cell[name] for name in TOLD} for protocol, cell in cells.items()}
            for quantity, cells in summary["phases"]["updated"].items()
        },
    }


def base_id(manifest: Mapping[str, Any]) -> str | None:
    """The hub id of a run's base, as the user named it; None where only a local folder is known."""
    model = manifest["config"]["model"]
    named: str | None = model["base_model_id"] or (base_name(manifest) if hub_commit(manifest) else None)
    return named


def hub_commit(manifest: Mapping[str, Any]) -> str | None:
    """The commit of a run's base on the hub; None where the base was a folder, or in memory."""
    found: str = manifest["inputs"].get("base_sha256") or ""
    return found if len(found) == COMMIT_DIGITS else None


def base_folder(manifest: Mapping[str, Any]) -> Path | None:
    """Return the folder of a run's base, as named or in the hub's cache; None if there is none.

    A base that was in memory has no folder, whatever its name.
    """
    name, commit = base_name(manifest), hub_commit(manifest)
    if name is None or not manifest["inputs"].get("base_sha256"):
        return None
    if Path(name).is_dir():
        return Path(name)
    if commit is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=commit)
    return Path(config).parent if isinstance(config, str) else None


def product_files(product: Path) -> dict[str, str]:
    """Name to SHA-256 of the files that load the product; not the card, and not the chain itself."""
    return {path.name: sha256_of(path) for path in model_files(product)}


def check_files(model: str | Path, chain: list[Update]) -> None:
    """Raise RunError if files of a model differ from those that its last update wrote.

    Raises:
        RunError: which ones are not, or there is no folder or no update to ask.
    """
    if not chain or not Path(model).is_dir():
        raise RunError(f"{model}: there are no files here that an update wrote, so there is nothing to verify.")
    check_product(product_of(Path(model)))


def check_product(product: Path, suffix: str = "") -> None:
    """Raise RunError if files of a product (with this ending) differ from those its last update recorded.

    Raises:
        RunError: which ones are not.
    """
    chain = read_chain(product)
    written: dict[str, str] = chain[-1]["files"] if chain else {}
    if changed := damaged(product, {name: written[name] for name in written if name.endswith(suffix)}):
        raise RunError(
            f"{product}: {some(changed)}: not as the last update wrote it. Something changed it since. If that was "
            f"meant, remove its {HISTORY}, which tells of another model."
        )


def chain_of(model: str | Path) -> list[Update]:
    """The updates that made a model (its folder, its run folder, or its id on the hub), oldest first; empty for none.

    Raises:
        RunError: there is no such model, the run is not finished, or the file is damaged.
    """
    folder = Path(model)
    if folder.is_dir():
        return read_chain(product_of(folder))
    if folder.exists() or not is_hub_id(str(model)):
        raise RunError(f"{model}: there is no such folder. Give the folder of a model or of a run.")
    return _from_hub(str(model), None)


def chain_of_base(manifest: Mapping[str, Any]) -> list[Update]:
    """Return the updates that made a run's base; none are known for a base that was in memory."""
    name, commit = str(base_name(manifest)), hub_commit(manifest)
    if manifest["inputs"].get("base_sha256") and Path(name).is_dir():
        return read_chain(Path(name))
    return _from_hub(name, commit) if commit else []


def product_of(folder: Path) -> Path:
    """The product's folder of a run folder; any other folder as it is.

    Raises:
        RunError: the run is not finished, only scored, or its product is gone.
    """
    if not is_run(folder):
        return folder
    if not (folder / "summary.json").is_file():
        raise RunError(f"{folder}: the run is not finished. Go on with --resume.")
    name = records.read(records.Summary, folder / "summary.json")["product"]
    if not name:
        raise RunError(f"{folder} holds scores, not an update. Give the folder of a model or of an update.")
    if not (folder / name).is_dir():
        raise RunError(f"{folder}: its product {name}/ is gone.")
    return folder / str(name)


def read_chain(folder: Path) -> list[Update]:
    """The updates that are told beside a model, oldest first.

    Raises:
        RunError: the file is damaged.
    """
    return _updates_in(folder / HISTORY) if (folder / HISTORY).is_file() else []


def _updates_in(file: Path) -> list[Update]:
    told = records.read(records.Chain, file)
    updates: list[Update] = told["updates"]
    if told.get("sha256") not in (None, hash_of(updates)):  # none in chains of earlier versions
        raise RunError(f"{file} was changed or damaged: its hash does not match. Restore it from a backup.")
    return updates


def _from_hub(name: str, revision: str | None) -> list[Update]:
    """The chain of a model on the hub, from its cache where it is there."""
    from huggingface_hub import errors, hf_hub_download

    from forgetlearn.models import hub

    try:
        file = hf_hub_download(name, HISTORY, revision=revision, local_files_only=not hub.is_reachable())
        return _updates_in(Path(file))
    except errors.LocalEntryNotFoundError:
        log.warning("%s: the hub cannot be asked whether updates made this model; its chain is taken as empty", name)
        return []
    except errors.EntryNotFoundError:
        return []
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise RunError(f"{name}: cannot be read from the hub: {str(error).splitlines()[0]}") from error


def _run_around(folder: Path) -> str | None:
    """The run whose product a folder is."""
    parent = folder.resolve().parent
    return str(parent) if folder.is_dir() and is_run(parent) else None


def find_facts(update: Update, places: Iterable[Path]) -> FactSet | None:
    """The facts of an update, from the first of the places (run folders, files of facts) that holds the same ones."""
    told = update["facts"]
    for place in places:
        file = place / "inputs.jsonl" if place.is_dir() else place
        if not file.is_file():
            continue
        found = read_facts(file, limit=told["used"])
        if found.sha256() == told["sha256"]:
            return found
    return None


def runs_before(model: Path) -> list[Path]:
    """The run folders that made a model, as far as they are still where they were: the last one first."""
    found: list[Path] = []
    run = _run_around(model) if not is_run(model) else str(model.resolve())
    while run is not None and is_run(run) and Path(run) not in found:
        found.append(Path(run))
        run = (RunFolder.open(run).manifest.get("parent") or {}).get("run")
    return found


def _listed(modules: str | Sequence[str] | Mapping[str, float]) -> str:
    """Names of modules as the config has them, each with its factor where it has one."""
    if isinstance(modules, str):
        return modules
    return ", ".join(f"{name} x {modules[name]:g}" if isinstance(modules, Mapping) else name for name in modules)


def _base(update: Update) -> str:
    if in_memory := update.get("weights_sha256"):
        return f"a model in memory, and what made it is not known; hash of its weights {in_memory}"
    return f"{update['base'] or 'a local folder'}; hash {update['base_sha256'] or 'unknown'}"


def describe(update: Update) -> list[str]:
    """Describe an update in lines for a terminal."""
    facts, coef, files = update["facts"], update["coef"], update["files"]
    method = f"{update['method']}{'' if coef is None else f', coef {coef}'}, seed {update['seed']}"
    taught = ", taught the old answers first" if update["taught_first"] else ""
    known = "" if facts["known"] is None else f", {facts['known']} known before"
    lines = [
        f"{update['when']}  {method}{taught}",
        f"  facts   {facts['used']} from {facts['source']}{known}; SHA-256 {facts['sha256']}",
        f"  base    {_base(update)}",
    ]
    if "modules" in update:  # not in chains of earlier versions
        rows = {stage: which for stage, which in update.get("rows", {}).items() if which not in (None, "all")}
        told = (
            f"{stage} {_listed(modules)}{f' (rows of the vocabulary: {rows[stage]})' if stage in rows else ''}"
            for stage in ("forget", "learn")
            if (modules := update["modules"].get(stage)) is not None
        )
        lines.append(f"  weights {'; '.join(told)}")
    for quantity, cells in update["scores"].items():
        shown = (f"{protocol} {cell['mean']:.1f} (n {cell['n']})" for protocol, cell in cells.items() if cell["n"])
        lines.append(f"  {quantity:<12} {', '.join(shown) or 'not scored'}")
    return lines + [f"  wrote   {name}  {files[name]}" for name in files if name.endswith(".safetensors")]
