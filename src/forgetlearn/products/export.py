"""Export an updated model for other programs: as GGUF for llama.cpp, for Ollama, merged, or as an adapter.

Each is a folder with its own `forgetlearn.json`, which `forgetlearn log --verify` checks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.models import gguf
from forgetlearn.models.gguf_writer import DTYPES, Dtype, ModelFile, write_adapter
from forgetlearn.models.language_model import load_model
from forgetlearn.models.loading import load_tokenizer
from forgetlearn.products.chain import Base, carry_over, check_product, product_of
from forgetlearn.products.restore import check_base, copy_adapter, finished_run, merged_in_words, place_of_base, runs_of
from forgetlearn.storage.digests import copy_own, licences
from forgetlearn.storage.disk import atomic_folder, remove_unfinished
from forgetlearn.storage.run_folder import RunFolder
from forgetlearn.weights.folder_arithmetic import check_places, merge_adapter
from forgetlearn.weights.rounding import warning
from forgetlearn.weights.streaming import Numbers

MODEL, ADAPTER, MODELFILE = gguf.LINK, "adapter.gguf", "Modelfile"
Target = Literal["gguf", "ollama", "merged", "adapter"]


@dataclass(frozen=True)
class Export:
    """What is asked for.

    run      a finished run
    product  the folder of what it made: an adapter, or a whole model
    base     the name of the adapter's base: a folder, a GGUF file, or a hub id; None for a whole model
    whole    the folder whose config and tokenizer are the product's: the base's, or the product itself
    """

    run: RunFolder
    product: Path
    base: str | None
    whole: Path
    output: Path
    dtype: Dtype | None
    overwrite: bool


def export(
    run: str | Path,
    output: str | Path,
    *,
    to: Target,
    base: str | Path | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
) -> str:
    """Write the product of a finished run to the folder `output`, for another program; return a sentence that says how.

    to      gguf: model.gguf, with tokenizer and chat template. ollama: that and a Modelfile. merged: the whole model,
            as `apply --merge` makes it. adapter: peft's files, and adapter.gguf for llama.cpp's --lora.
    base    the base of an adapter; unset: the one that the run recorded, if it is still there
    dtype   how the matrices of GGUF are stored; unset: as the base's (of an adapter: as its own)

    Raises:
        ConfigError: `to` or `dtype` is unknown, they do not go together, or the product is not an adapter.
        ModelError: the base is not the run's, or the model cannot be written as GGUF.
        RunError: the run is not finished, its product was changed, its base is gone, or the output exists.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to}: expected {', '.join(TARGETS)}.")
    if dtype is not None and (dtype not in DTYPES or to == "merged"):
        raise ConfigError(
            f"--dtype {dtype}: expected {', '.join(DTYPES)}, and none with --to merged, for which there is "
            "forgetlearn apply RUN --base BASE --merge --dtype."
        )
    folder, output = finished_run(runs_of(run)[-1]), Path(output)
    product = product_of(folder.path)
    is_adapter = (product / "adapter_config.json").is_file()
    if to == "adapter" and not is_adapter:
        raise ConfigError(f"--to adapter: the product of {run} is a whole model. Pass --to merged or --to gguf.")
    named, on = _base_of(folder, base) if is_adapter else (None, product)
    check_places(output, [folder.path, on] if is_adapter else [folder.path], overwrite)
    check_product(product)
    if is_adapter:
        check_base(folder, on, taught=True)
    remove_unfinished(output)
    with _as_folder(on) as whole:
        return TARGETS[to](Export(folder, product, named, whole, output, dtype, overwrite))


def _base_of(run: RunFolder, given: str | Path | None) -> tuple[str, Path]:
    """Return the name of the model that a run's adapter belongs on, and its folder or GGUF file."""
    place = place_of_base(run, given)
    name = gguf.resolved(str(given)) if given is not None else str(Base.of(run).name)
    is_here = place in (Path(name), run.path / "taught")  # and not in the hub's cache
    return (str(place.resolve()) if is_here else name), place


@contextmanager
def _as_folder(model: Path) -> Iterator[Path]:
    """Yield a model's folder; a GGUF file is unpacked into one for a while."""
    if not model.is_file():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as unpacked:
        load_model(str(model)).save(Path(unpacked))
        yield Path(unpacked)


def _to_gguf(asked: Export) -> str:
    with atomic_folder(asked.output) as unfinished:
        said = _write_whole(asked, unfinished)
        carry_over(asked.product, unfinished, "gguf", MODEL)
    return f"{asked.output / MODEL}: {said}"


def _to_ollama(asked: Export) -> str:
    text = modelfile(asked.whole)
    with atomic_folder(asked.output) as unfinished:
        said = _write_whole(asked, unfinished)
        (unfinished / MODELFILE).write_text(text, encoding="utf-8")
        carry_over(asked.product, unfinished, "ollama", MODEL, MODELFILE)
    return f"{asked.output / MODEL}: {said}\nNext: ollama create NAME -f {asked.output / MODELFILE}"


def _to_merged(asked: Export) -> str:
    if asked.base is not None:
        written = merge_adapter(asked.product, asked.whole, asked.output, numbers=Numbers(), overwrite=asked.overwrite)
        carry_over(asked.product, asked.output, "merged")
        return merged_in_words(written, asked.product, Path(asked.base))
    with atomic_folder(asked.output) as unfinished:
        shutil.copytree(asked.product, unfinished, dirs_exist_ok=True)
    return f"{asked.output}: {asked.product} copied, which is a whole model"


def _to_adapter(asked: Export) -> str:
    with atomic_folder(asked.output) as unfinished:
        stored = write_adapter(asked.whole, asked.product, unfinished / ADAPTER, asked.dtype)
        copy_adapter(asked.product, unfinished, str(asked.base))
        carry_over(asked.product, unfinished, "adapter", ADAPTER)
    return f"{asked.output}: {asked.product} as peft reads it, and {ADAPTER} in {stored} for llama.cpp, on {asked.base}"


TARGETS: Mapping[Target, Callable[[Export], str]] = {
    "gguf": _to_gguf,
    "ollama": _to_ollama,
    "merged": _to_merged,
    "adapter": _to_adapter,
}


def _write_whole(asked: Export, folder: Path) -> str:
    """Write the whole model as GGUF into `folder`, with the licences of its base; return what was written."""
    # The base of an adapter is only checked, before minutes of merging.
    with closing(ModelFile(asked.whole, asked.dtype)) as file:
        dtype = file.dtype
        if asked.base is None:
            file.write(folder / MODEL)
    lost = _write_merged(asked, folder, dtype) if asked.base is not None else None
    for path in licences(asked.whole):
        copy_own(path, folder)
    on = f" added to {asked.base}" if asked.base else ""
    return "\n".join(filter(None, [f"{asked.product}{on}, in {dtype}", lost]))


def _write_merged(asked: Export, folder: Path, dtype: Dtype) -> str | None:
    """Write an adapter's base with the adapter added; return a warning if rounding to bf16 lost much.

    The merged copy is in float32 for a while, so that its numbers are rounded once, when they are written.
    """
    merged = folder / "merged"
    numbers = Numbers("bfloat16" if dtype == "bf16" else "float32")
    written = merge_adapter(asked.product, asked.whole, merged, numbers=numbers)
    with closing(ModelFile(merged, dtype)) as file:
        file.write(folder / MODEL)
    shutil.rmtree(merged)
    return warning(written.survival.as_dict(), "--dtype f32 or f16, or --to adapter")


# Ollama -------------------------------------------------------------------------------------------


def modelfile(folder: Path) -> str:
    """Return a Modelfile for the model in `folder`, written as GGUF beside it.

    Ollama does not run a model's own chat template: it takes the text of a Go template, which is made here from what
    the chat template says. Answers are the likeliest ones, as they were scored.

    Raises:
        ModelError: the chat template takes no message of a user, or changes what the messages say.
    """
    tokenizer = load_tokenizer(ModelSettings(name=str(folder)), str(folder))
    lines = [f"FROM ./{MODEL}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{_go_template(tokenizer, folder)}"""')
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _go_template(tokenizer: Any, folder: Path) -> str:
    """Return Ollama's template for one exchange: it repeats it for each one of a conversation."""
    system, user, answer = "<system-message>", "<user-message>", "<answer-message>"
    said = [{"role": "user", "content": user}]
    whole = _rendered(tokenizer, [*said, {"role": "assistant", "content": answer}], generates=False)
    plain = _rendered(tokenizer, said)
    told = _rendered(tokenizer, [{"role": "system", "content": system}, *said])
    begin, _user, between = (plain or "").partition(user)
    end = (whole or "").partition(answer)[2]
    if plain is None or whole is None or not _user or '"""' in plain + whole or "{{" in plain + whole:
        raise ModelError(
            f"{folder}: its chat template cannot be written as a template of Ollama. Pass --to gguf and write a "
            "Modelfile with a TEMPLATE."
        )
    if told is not None and system in told and told.endswith(user + between):
        with_system = told.removesuffix(user + between).replace(system, "{{ .System }}")
        begin = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{begin}{{{{ end }}}}"
    return f"{begin}{{{{ .Prompt }}}}{between}{{{{ .Response }}}}{end}"


def _rendered(tokenizer: Any, messages: list[dict[str, str]], *, generates: bool = True) -> str | None:
    """Return messages in the model's chat format, without the begin token that Ollama adds; None if it refuses them."""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates))
    except Exception:  # a chat template raises whatever its author wrote
        return None
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins else text
