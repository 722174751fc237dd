"""Publish a run's product to a folder or to the hub, with a model card that contains no local paths.

Only files that the run recorded as part of the product are published, and only if their hashes still match.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from forgetlearn.errors import ConfigError, RunError, some, without_secrets
from forgetlearn.facts.files import is_hub_id
from forgetlearn.products.chain import Base, as_json, product_of, read_chain
from forgetlearn.products.restore import finished_run
from forgetlearn.report.run_page import card, load_page
from forgetlearn.storage.digests import HISTORY, damaged
from forgetlearn.storage.disk import atomic_folder
from forgetlearn.storage.run_folder import RunFolder
from forgetlearn.weights.checkpoint_folder import read_header, read_object
from forgetlearn.weights.folder_arithmetic import check_places

CARD = "README.md"
CONFIGS = ("adapter_config.json", "config.json")
Content = bytes | Path


def save(
    run: str | Path,
    output: str | Path,
    *,
    base_model_id: str | None = None,
    merged: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the files that `push` would publish into the folder `output`, and return its path.

    Raises the errors of `contents`, and RunError if the output exists.
    """
    output = Path(output)
    found = contents(run, base_model_id=base_model_id, merged=merged)
    check_places(output, [run], overwrite)
    with atomic_folder(output) as unfinished:
        for name, content in found.items():
            if isinstance(content, Path):
                shutil.copyfile(content, unfinished / name)
            else:
                (unfinished / name).write_bytes(content)
    return output


def push(
    run: str | Path,
    to: str,
    *,
    base_model_id: str | None = None,
    merged: bool = False,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Publish a run's product on the hub as `to` (user/name) in one commit, and return the commit's URL.

    The hub client's own token is used (HF_TOKEN, or `hf auth login`). With `private` a new repository is created as
    private; if `to` exists and is public, RunError is raised.

    Raises the errors of `contents`, and RunError if the hub refuses or cannot be reached.
    """
    _check_id(to, "--to")
    found = contents(run, base_model_id=base_model_id, merged=merged)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in found.items()
    ]
    api = HfApi()
    try:
        api.create_repo(to, private=private or None, exist_ok=True)
        if private and not api.model_info(to).private:
            raise RunError(f"{to} exists and is public. Make it private on its page, or leave --private out.")
        if revision is not None:
            api.create_branch(to, branch=revision, exist_ok=True)
        done = api.create_commit(to, operations, commit_message="Update with forgetlearn", revision=revision)
    except RunError:
        raise
    except Exception as error:  # errors of the hub, its responses and the network have no common base class
        raise RunError(f"{to}: not published. {_why_not(to, error)}") from error
    return str(done.commit_url)


def _why_not(to: str, error: Exception) -> str:
    """Return a message that says why the hub did not accept the commit, and what to do."""
    why = without_secrets(str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to publish."
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"The hub does not know this token ({why}). Set HF_TOKEN to one that may write, or run `hf auth login`."
    if status == 403:
        return f"The token may not write to it ({why}). Take one that may write to {to.split('/')[0]}/."
    if status is None:
        return f"The hub cannot be reached ({why}). Check the network, then push again: nothing is published in part."
    return f"The hub refused ({why}). Push again later; nothing is published in part."


def contents(run: str | Path, *, base_model_id: str | None = None, merged: bool = False) -> dict[str, Content]:
    """Return the files to publish, by name: a path if the file is published unchanged, else its bytes.

    Raises:
        ConfigError: the base's hub id is unknown or invalid, or the adapter belongs on a taught model.
        RunError: the run is not finished, or its product was changed since the run wrote it.
    """
    folder = finished_run(run)
    base = Base.of(folder)
    product = folder.path / "merged" if merged else product_of(folder.path)
    if not product.is_dir():
        raise RunError(
            f"{product} does not exist. Make it with forgetlearn apply {run} --merge, or leave --merged out."
        )
    hub_id = _hub_id(folder, base, base_model_id, product)
    chain = read_chain(product)
    if not chain:
        raise RunError(f"{product}: has no {HISTORY} that lists its files. Make the run again.")
    files = chain[-1].files
    if changed := damaged(product, files):
        raise RunError(
            f"{product}: {some(changed)}: changed after the run wrote it (hash mismatch), so it is not published. "
            "Restore it from a backup."
        )
    found: dict[str, Content] = {name: product / name for name in files}
    if not any(name.endswith(".safetensors") for name in found):
        raise RunError(f"{product}: has no .safetensors file; only safetensors weights are published.")
    configs = {name: _with_base(product / name, hub_id) for name in CONFIGS if name in found}
    files = files | {name: hashlib.sha256(content).hexdigest() for name, content in configs.items()}
    chain[-1] = chain[-1].model_copy(update={"base": hub_id, "files": files})
    command = public_command(folder, base, hub_id)
    found |= {
        **configs,
        HISTORY: as_json(chain).encode(),
        CARD: card(load_page(folder.path), product.name, base_model_id=hub_id, command=command).encode(),
    }
    _refuse_local_paths(folder, base, found, hub_id)
    return found


def _hub_id(folder: RunFolder, base: Base, given: str | None, product: Path) -> str:
    hub_id = given or base.hub_id
    if product.name == "adapter" and folder.settings.teach.epochs > 0:
        raise ConfigError(
            f"{product} belongs on the taught model of its run, which has no hub id. "
            "Publish merged weights: run with --set save_merged=true and pass --merged."
        )
    if hub_id is None:
        raise ConfigError(
            f"The base is {base.name}, which is not a hub id. Pass the id that others find it by as --base-model-id."
        )
    _check_id(hub_id, "--base-model-id", named=given is not None)
    return hub_id


def _check_id(name: str, flag: str, *, named: bool = True) -> None:
    """Raise ConfigError unless the name is a hub id rather than a path."""
    try:
        validate_repo_id(name)
        is_path = named and (("/" not in name and flag == "--to") or Path(name).is_absolute() or name.startswith("."))
    except errors.HFValidationError:
        is_path = True
    if is_path:
        raise ConfigError(f"{flag} {name}: is not a hub id (user/name).")


def _with_base(file: Path, base: str) -> bytes:
    """Return a config file's bytes without local paths: an adapter's base is named by its hub id `base`."""
    config = read_object(file)
    config.pop("_name_or_path", None)
    if "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = base
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def public_command(run: RunFolder, base: Base, hub_id: str) -> list[str]:
    """Return a run's command with the base replaced by its hub id, and every other path by its last part."""
    source = run.settings.facts.source or ""
    shown = []
    for word in run.manifest.command:
        name, equals, value = word.partition("=") if word.startswith("-") or "=" in word else ("", "", word)
        is_data_set = value == source and is_hub_id(value)
        if value == base.name:
            value = hub_id
        elif ("/" in value or "\\" in value) and value != hub_id and not is_data_set:
            value = value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        shown.append(without_secrets(f"{name}{equals}{value}"))
    return shown


def _refuse_local_paths(run: RunFolder, base: Base, found: Mapping[str, Content], hub_id: str) -> None:
    """Raise RunError if a text, or the metadata of weights, contains the path of the run, its base or its facts.

    Each path is searched for as the user wrote it and as an absolute path. A name without a folder may occur.
    """
    source = run.settings.facts.source
    named = [str(run.path)]
    named += [] if base.commit else [str(base.name)]
    named += [base.adapter] if base.adapter else []
    named += [source] if source and not is_hub_id(source) else []
    local = {path for name in named for path in (name, str(Path(name).resolve())) if len(Path(path).parts) > 1}
    local -= {hub_id}
    local |= {json.dumps(path)[1:-1] for path in local}  # as JSON escapes backslashes and non-ASCII letters
    for name, content in found.items():
        if isinstance(content, Path) and name.endswith(".safetensors"):
            text = json.dumps(read_header(content)[0], ensure_ascii=False).encode()
        else:
            text = content if isinstance(content, bytes) else content.read_bytes()
        if any(path.encode() in text for path in local):
            raise RunError(
                f"{name}: contains a path of this machine, so nothing is published. Remove the path from the file."
            )
