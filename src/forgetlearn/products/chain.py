"""The chain of updates that made a model: a file beside each product, extended when the product is updated again.

The file may be published: it holds names without folders, counts, hashes and scores, but no facts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from forgetlearn._version import __version__
from forgetlearn.errors import RunError, some
from forgetlearn.facts import FactSet, Purpose, read_facts
from forgetlearn.facts.files import is_hub_id
from forgetlearn.storage.digests import COMMIT_DIGITS, HISTORY, damaged, hash_of, is_recorded, model_files, sha256_of
from forgetlearn.storage.disk import read_json, write_text
from forgetlearn.storage.records import (
    Chain,
    Modules,
    Score,
    Stream,
    Summary,
    Update,
    UpdateFacts,
    UpdateModules,
    UpdateRows,
)
from forgetlearn.storage.run_folder import INPUTS, STREAM, SUMMARY, RunFolder, is_run

log = logging.getLogger("forgetlearn")


@dataclass(frozen=True)
class Base:
    """The base of a run: the name it was loaded by, the hub id that the user gave for it, and its hash.

    A run may begin on an adapter of its base; the product is then an adapter of the same base, or a whole model.
    """

    name: str | None  # a folder, a hub id, or the name of a model in memory; None before a run starts
    base_model_id: str | None
    base_sha256: str | None = None  # hash of its folder or file, or its commit on the hub; None for a model in memory
    weights_sha256: str | None = None  # only for a model in memory
    adapter: str | None = None  # the folder of the adapter that the run began on
    adapter_sha256: str | None = None

    @classmethod
    def of(cls, run: RunFolder) -> Base:
        """Return the base that a run recorded in its manifest."""
        manifest, model = run.manifest, run.settings.model
        name = model.name or (manifest.parent.name if manifest.parent else None)
        adapter = None
        if manifest.parent and manifest.parent.base:
            name, adapter = manifest.parent.base, name
        recorded = (manifest.inputs.get(which) for which in ("base_sha256", "weights_sha256", "adapter_sha256"))
        base, weights, own = (found if isinstance(found, str) else None for found in recorded)
        return cls(name, model.base_model_id, base, weights, adapter, own)

    @property
    def commit(self) -> str | None:
        """The base's commit on the hub, or None if it was a folder or a model in memory."""
        found = self.base_sha256 or ""
        return found if len(found) == COMMIT_DIGITS else None

    @property
    def hub_id(self) -> str | None:
        """The base's hub id: the one that the user gave, or the name it was loaded by; None if neither is known."""
        return self.base_model_id or (self.name if self.commit else None)

    def folder(self) -> Path | None:
        """Return the base's folder or GGUF file: what it was loaded from, or its snapshot in the hub's cache.

        Return None if that no longer exists, the cache lacks the snapshot, or the base was in memory.
        """
        if self.name is None or not self.base_sha256:
            return None
        if Path(self.name).exists():
            return Path(self.name)
        if self.commit is None:
            return None
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.name, "config.json", revision=self.commit)
        return Path(config).parent if isinstance(config, str) else None

    def is_in(self, folder: Path | None) -> bool:
        """Return True if a folder holds this base, by its hash or commit."""
        return folder is not None and is_recorded(folder, self.base_sha256)

    def chain(self) -> list[Update]:
        """Return the updates that made the base, oldest first; an empty list for a base that was in memory.

        Those of an adapter that the run began on include those of the model that it was trained on.
        """
        if self.adapter and (made := read_chain(Path(self.adapter))):
            return made
        name = str(self.name)
        if self.base_sha256 and Path(name).is_dir():
            return read_chain(Path(name))
        return _from_hub(name, self.commit) if self.commit else []


def parent_of(base: Base) -> dict[str, str | None]:
    """Return the `parent` field of a manifest: what the run began on, and the folder of the run that made it, if any.

    If it began on an adapter, the field also has the name of the adapter's base.
    """
    began_on = base.adapter or str(base.name)
    found = {"name": began_on, "run": _run_around(Path(began_on)) if base.base_sha256 else None}
    return found | ({"base": base.name} if base.adapter else {})


def carry_on(run: RunFolder, products: Iterable[Path], facts: FactSet, summary: Summary) -> None:
    """Write a chain beside each product: the base's updates, then this run's."""
    base, when = Base.of(run), datetime.now(UTC).isoformat(timespec="seconds")
    earlier = base.chain()
    for product in products:
        write_text(product / HISTORY, as_json([*earlier, _update(run, base, when, product, facts, summary)]))


def carry_over(product: Path, to: Path, name: str, *others: str) -> None:
    """Write a product's chain into `to`, the folder of its merged weights or of a copy that names another base.

    `others` are files there that transformers does not load a model from, such as GGUF.
    """
    if chain := read_chain(product):
        files = product_files(to) | {other: sha256_of(to / other) for other in others}
        chain[-1] = chain[-1].model_copy(update={"product": name, "files": files})
        write_text(to / HISTORY, as_json(chain))


def as_json(chain: Sequence[Update]) -> str:
    """Return a chain as the text of `forgetlearn.json`."""
    updates = [update.as_json() for update in chain]
    fields = {"format": 1, "versions": {"forgetlearn": __version__}, "updates": updates, "sha256": hash_of(updates)}
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _update(run: RunFolder, base: Base, when: str, product: Path, facts: FactSet, summary: Summary) -> Update:
    settings, forgets, learns = run.settings, summary.coef is not None, summary.forgetting is None
    return Update(
        when=when,
        method=summary.method,
        coef=summary.coef,
        seed=summary.seed,
        base=base.hub_id,
        base_sha256=base.base_sha256,
        weights_sha256=base.weights_sha256,
        **({"adapter_sha256": base.adapter_sha256} if base.adapter_sha256 else {}),
        taught_first=settings.teach.epochs > 0,
        modules=UpdateModules(
            forget=_forgotten(run, learns) if forgets else None,
            learn=(_adapted(run.path / "adapter") or settings.learn.modules) if learns else None,
        ),
        rows=UpdateRows(
            forget=settings.forget.rows if forgets else None, learn=settings.learn.rows if learns else None
        ),
        facts=UpdateFacts(
            source=facts.source if is_hub_id(facts.source) else Path(facts.source).name,
            used=facts.used,
            known=summary.facts.known,
            forgotten=summary.facts.forgotten,
            sha256=facts.sha256(),
        ),
        scores={
            quantity: {
                protocol: Score(mean=cell.mean, low=cell.low, high=cell.high, n=cell.n, errored=cell.errored)
                for protocol, cell in cells.items()
            }
            for quantity, cells in summary.last_phase.items()
        },
        product=product.name,
        files=product_files(product),
    )


def _forgotten(run: RunFolder, learns: bool) -> Modules:
    """Return the modules that forgetting changed; those of the product, if it is an adapter that only forgets."""
    return (not learns and _adapted(run.path / "adapter")) or run.settings.forget.modules


def _adapted(adapter: Path) -> list[str]:
    """Return the names of the modules that an adapter changes, from its config; empty if there is no adapter."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        return []
    found = read_json(config)
    return sorted([*found["target_modules"], *(found.get("target_parameters") or ())])


def product_files(product: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the product is loaded from, by name; not of the card or the chain."""
    return {path.name: sha256_of(path) for path in model_files(product)}


def check_files(model: str | Path, chain: Sequence[Update]) -> None:
    """Raise RunError if a model's files differ from those that its last update wrote, or no update wrote any."""
    if not chain or not Path(model).is_dir():
        raise RunError(
            f"{model}: there are no files here that an update wrote, so there is nothing to verify. Was it made "
            "by forgetlearn?"
        )
    check_product(product_of(Path(model)))


def check_product(product: Path, suffix: str = "") -> None:
    """Raise RunError if files of a product (with this suffix) were changed after its last update wrote them."""
    chain = read_chain(product)
    written = chain[-1].files if chain else {}
    if changed := damaged(product, {name: written[name] for name in written if name.endswith(suffix)}):
        raise RunError(
            f"{product}: {some(changed)}: changed after the last update wrote it (hash mismatch). If that was "
            f"meant, remove its {HISTORY}, which describes another model."
        )


def chain_of(model: str | Path) -> list[Update]:
    """Return the updates that made a model, oldest first; `model` is its folder, a run folder, or a hub id.

    Raises:
        RunError: the model does not exist, the run is not finished, or forgetlearn.json is damaged.
    """
    folder = Path(model)
    if folder.is_dir():
        return read_chain(product_of(folder))
    if folder.exists() or not is_hub_id(str(model)):
        raise RunError(f"{model}: there is no such folder. Give the folder of a model or of a run.")
    return _from_hub(str(model), None)


def product_of(folder: Path) -> Path:
    """Return the product's folder if `folder` is a run folder or a stream of runs, and `folder` itself otherwise.

    Raise RunError if the run has no product, for example because it is not finished.
    """
    if not is_run(folder):
        return folder
    if (folder / STREAM).is_file():
        return product_of(folder / Stream.load(folder / STREAM).batches[-1].folder)
    if not (folder / SUMMARY).is_file():
        raise RunError(f"{folder}: the run is not finished. Continue with --resume.")
    name = Summary.load(folder / SUMMARY).product
    if not name:
        raise RunError(f"{folder} holds scores, not an update. Give the folder of a model or of an update.")
    if not (folder / name).is_dir():
        raise RunError(f"{folder}: its product {name}/ is gone.")
    return folder / name


def read_chain(folder: Path) -> list[Update]:
    """Return the updates in the forgetlearn.json of a model's folder, oldest first; empty if it has none.

    Raise RunError if the file is damaged.
    """
    return _updates_in(folder / HISTORY) if (folder / HISTORY).is_file() else []


def _updates_in(file: Path) -> list[Update]:
    data = read_json(file)
    chain = Chain.parse(data, file)
    if chain.sha256 != hash_of(data["updates"]):
        raise RunError(f"{file} was changed or damaged: its hash does not match. Restore it from a backup.")
    return chain.updates


def _from_hub(name: str, revision: str | None) -> list[Update]:
    """Return the chain of a model on the hub, from the cache if the hub cannot be reached; empty if it has none."""
    from huggingface_hub import errors, hf_hub_download

    from forgetlearn.models import hub

    try:
        file = hf_hub_download(name, HISTORY, revision=revision, local_files_only=not hub.is_reachable())
        return _updates_in(Path(file))
    except errors.LocalEntryNotFoundError:
        log.warning("%s: could not ask the hub whether earlier updates made this model; assuming that none did", name)
        return []
    except errors.EntryNotFoundError:
        return []
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise RunError(f"{name}: cannot be read from the hub: {str(error).splitlines()[0]}") from error


def _run_around(folder: Path) -> str | None:
    """Return the run folder that contains a product, or None if no run folder does."""
    parent = folder.resolve().parent
    return str(parent) if folder.is_dir() and is_run(parent) else None


def find_facts(
    update: Update, places: Iterable[Path], read: Callable[[Path, int, Purpose], FactSet] | None = None
) -> FactSet | None:
    """Return an update's facts from the first place (run folder or file) that holds them, compared by hash.

    Return None if no place does. `read` reads the first facts of a file; the caller may keep what it read.
    """
    for place in places:
        file = place / INPUTS if place.is_dir() else place
        if file.is_file():
            found = (read or read_first)(file, update.facts.used, "forget" if update.only_forgot else "learn")
            if found.sha256() == update.facts.sha256:
                return found
    return None


def read_first(file: Path, number: int, purpose: Purpose) -> FactSet:
    """Return the first facts of a file."""
    return read_facts(file, limit=number, purpose=purpose)


def runs_before(model: Path) -> list[Path]:
    """Return the folders of the runs that made a model, newest first, up to the first one that is gone."""
    found: list[Path] = []
    run = _run_around(model) if not is_run(model) else str(model.resolve())
    while run is not None and is_run(run) and Path(run) not in found:
        found.append(Path(run))
        parent = RunFolder.open(run).manifest.parent
        run = parent.run if parent else None
    return found


def _listed(modules: Modules) -> str:
    """Format the names of modules, each with its factor if it has one."""
    if isinstance(modules, str):
        return modules
    return ", ".join(f"{name} x {modules[name]:g}" if isinstance(modules, dict) else name for name in modules)


def describe(update: Update) -> list[str]:
    """Return lines that describe an update, for a terminal."""
    facts, coef = update.facts, "" if update.coef is None else f", coef {update.coef}"
    taught = ", taught the old answers first" if update.taught_first else ""
    known = "" if facts.known is None else f", {facts.known} known before"
    base = f"{update.base or 'a local folder'}; hash {update.base_sha256 or 'unknown'}"
    if update.weights_sha256:
        base = f"a model in memory, and what made it is not known; hash of its weights {update.weights_sha256}"
    if update.adapter_sha256:
        base += f", with an adapter; hash {update.adapter_sha256}"
    changed = []
    for stage in ("forget", "learn"):
        modules, rows = getattr(update.modules, stage), getattr(update.rows, stage)
        if modules is not None:
            only = f" (rows of the vocabulary: {rows})" if rows not in (None, "all") else ""
            changed.append(f"{stage} {_listed(modules)}{only}")
    lines = [
        f"{update.when}  {update.method}{coef}, seed {update.seed}{taught}",
        f"  facts   {facts.used} from {facts.source}{known}; SHA-256 {facts.sha256}",
        f"  base    {base}",
        f"  weights {'; '.join(changed)}",
    ]
    for quantity, cells in update.scores.items():
        shown = (
            f"{protocol} {cell.mean:.1f} (n {cell.n})" for protocol, cell in cells.items() if cell.mean is not None
        )
        lines.append(f"  {quantity:<12} {', '.join(shown) or 'not scored'}")
    return lines + [
        f"  wrote   {name}  {digest}" for name, digest in update.files.items() if name.endswith(".safetensors")
    ]
