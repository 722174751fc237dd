"""A run's product for others: its own files, a card without local paths; into a folder or to the hub.

Published is what the run wrote down as the product's files, each with the hash it had then, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from forgetlearn.errors import ConfigError, RunError, some, without_secrets
from forgetlearn.facts.files import is_hub_id
from forgetlearn.products.chain import as_json, base_id, base_name, hub_commit, product_of, read_chain
from forgetlearn.products.restore import finished_run
from forgetlearn.report.run_page import card, load_context
from forgetlearn.storage.digests import HISTORY, damaged
from forgetlearn.storage.disk import atomic_folder
from forgetlearn.storage.run_folder import RunFolder
from forgetlearn.weights.checkpoint_folder import read_header, read_object
from forgetlearn.weights.folder_arithmetic import check_places

CARD = "README.md"
Content = bytes | Path


def save(
    run: str | Path,
    output: str | Path,
    *,
    base_model_id: str | None = None,
    merged: bool = False,
    overwrite: bool = False,
) -> Path:
    """The folder with what `push` would publish.

    Raises: as `contents`; and RunError where the output exists.
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
    """The address of the commit that publishes a run's product as `to` (user/name), in one commit.

    The token is the hub client's own (HF_TOKEN, or `hf auth login`). With `private` the repository is made
    private, and one that is there and public is refused.

    Raises: as `contents`; and RunError where the hub refuses or cannot be reached.
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
            raise RunError(f"{to} is there and public. Make it private on its page, or leave --private out.")
        if revision is not None:
            api.create_branch(to, branch=revision, exist_ok=True)
        done = api.create_commit(to, operations, commit_message="Update with forgetlearn", revision=revision)
    except RunError:
        raise
    except Exception as error:  # errors of the hub, of its answers and of the network have no common base
        raise RunError(f"{to}: not published. {_why_not(to, error)}") from error
    return str(done.commit_url)


def _why_not(to: str, error: Exception) -> str:
    """What went wrong between here and the hub, and what to do."""
    said = without_secrets(str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to publish."
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"The hub knows no such token ({said}). Set HF_TOKEN to one that may write, or run `hf auth login`."
    if status == 403:
        return f"The token may not write there ({said}). Take one that may write to {to.split('/')[0]}/."
    if status is None:
        return f"The hub cannot be reached ({said}). Check the network, then push again: nothing is published in part."
    return f"The hub refused ({said}). Push again later; nothing is published in part."


def contents(run: str | Path, *, base_model_id: str | None = None, merged: bool = False) -> dict[str, Content]:
    """Name to content of each file that is published: a path where the file goes as it is.

    Raises:
        ConfigError: only a local folder is known of the base, and `base_model_id` is not given.
        RunError: the run is not finished, or its product is not as the run wrote it.
    """
    folder = finished_run(run)
    product = folder.path / "merged" if merged else product_of(folder.path)
    if not product.is_dir():
        raise RunError(f"{product} is not there. Make it with forgetlearn apply {run} --merge, or leave --merged out.")
    base = _base(folder, base_model_id, product)
    chain = read_chain(product)
    if not chain:
        raise RunError(f"{product}: no {HISTORY} tells which files are the product's. Make the run again.")
    if changed := damaged(product, chain[-1]["files"]):
        raise RunError(f"{product}: {some(changed)}: not as the run wrote it, so it is not published.")
    found: dict[str, Content] = {name: product / name for name in chain[-1]["files"]}
    if not any(name.endswith(".safetensors") for name in found):
        raise RunError(f"{product}: holds no safetensors, and nothing else is published as weights.")
    found |= {
        name: _with_base(product / name, base) for name in ("adapter_config.json", "config.json") if name in found
    }
    chain[-1] |= {"base": base, "files": {name: _sha256(product, name, content) for name, content in found.items()}}
    found[HISTORY] = as_json(chain).encode()
    command = public_command(folder.manifest, base)
    context = load_context(folder.path)
    found[CARD] = card(context, product.name, base_model_id=base, command=command).encode()
    _refuse_local_paths(folder, found, base)
    return found


def _base(folder: RunFolder, given: str | None, product: Path) -> str:
    base = given or base_id(folder.manifest)
    if product.name == "adapter" and folder.manifest["config"]["teach"]["epochs"] > 0:
        raise ConfigError(
            f"{product} belongs on the taught model of its run, which no hub id names. "
            "Publish merged weights: run with --set save_merged=true and pass --merged."
        )
    if base is None:
        name = base_name(folder.manifest)
        raise ConfigError(
            f"The base is {name}, which is no hub id. Pass --base-model-id with the one that others find it by."
        )
    _check_id(base, "--base-model-id", named=given is not None)
    return base


def _check_id(name: str, flag: str, *, named: bool = True) -> None:
    """Raise ConfigError unless this is the id of a model on the hub and not a folder."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        raise ConfigError(f"{flag} {name}: is no hub id (user/name).") from None
    if named and (("/" not in name and flag == "--to") or Path(name).is_absolute() or name.startswith(".")):
        raise ConfigError(f"{flag} {name}: is no hub id (user/name).")


def _with_base(file: Path, base: str) -> bytes:
    """A config that names its base by the hub id, or does not name it."""
    config = read_object(file)
    config.pop("_name_or_path", None)
    if "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = base
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _sha256(product: Path, name: str, content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    recorded: str = read_chain(product)[-1]["files"][name]  # was compared with the file a moment ago
    return recorded


def public_command(manifest: Mapping[str, Any], base: str) -> Sequence[str]:
    """The command of a run, the base as its hub id, of every other path the last part alone."""
    local = base_name(manifest)
    shown = []
    for word in manifest["command"]:
        name, equals, value = word.partition("=") if word.startswith("-") or "=" in word else ("", "", word)
        if value == local:
            value = base
        elif ("/" in value or "\\" in value) and value != base and not _is_data_set(value, manifest):
            value = value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        shown.append(without_secrets(f"{name}{equals}{value}"))
    return shown


def _is_data_set(value: str, manifest: Mapping[str, Any]) -> bool:
    return value == manifest["config"]["facts"]["source"] and is_hub_id(value)


def _refuse_local_paths(folder: RunFolder, found: Mapping[str, Content], base: str) -> None:
    """The last look: no text, nor the metadata of weights, may hold the folder of the run, its base or its facts.

    Looked for is each as it was named, if that has more than one part, and in full. A file's own name may stand there.
    """
    config = folder.manifest["config"]
    source = config["facts"]["source"]
    named = [str(folder.path)]
    named += [] if hub_commit(folder.manifest) else [str(base_name(folder.manifest))]
    named += [source] if source and not is_hub_id(source) else []
    local = {path for name in named for path in (name, str(Path(name).resolve())) if len(Path(path).parts) > 1}
    local -= {base}
    local |= {json.dumps(path)[1:-1] for path in local}  # as JSON writes backslashes and letters beyond ASCII
    for name, content in found.items():
        if isinstance(content, Path) and name.endswith(".safetensors"):
            text = json.dumps(read_header(content)[0], ensure_ascii=False).encode()
        else:
            text = content if isinstance(content, bytes) else content.read_bytes()
        if any(path.encode() in text for path in local):
            raise RunError(f"{name}: holds a path of this machine, so nothing is published. Take it out of the file.")
