"""The second moments C = E[k k^T] of the keys of a layer: what the last projection of its MLP reads in any text.

ROME, MEMIT and AlphaEdit use them to leave other keys alone. They are cached by content: model, text and layer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetlearn.config.schema import EditSettings
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.generation import generator_in_memory
from forgetlearn.method.reading import watch
from forgetlearn.models.identity import weights_sha256
from forgetlearn.models.language_model import LINEAR, LanguageModel, linear_shape
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk

log = logging.getLogger("forgetlearn")
TOKENS_PER_INPUT = 5
TEXT_TOKENS = 256  # of a file that are read as one text
SAMPLED_TOKENS, SAMPLES_AT_ONCE = 128, 64  # of an answer, and answers in a batch
SAMPLED = "text that the model sampled"
SUFFIX = ".safetensors"


def second_moments(lm: LanguageModel, paths: Sequence[str], settings: EditSettings, seed: int) -> dict[str, Tensor]:
    """Return the second moments (D, D), in float64 on the model's device, of the inputs of each module in `paths`.

    They are read from the cache if this model has read this text before.

    Raises:
        ConfigError: the file cannot be read, has fewer tokens than a layer has inputs, or is of another model.
    """
    model = weights_sha256(lm)
    if settings.moments and settings.moments.endswith(SUFFIX):
        return _loaded({path: Path(settings.moments) for path in paths}, model, lm)
    wanted = settings.moment_tokens or TOKENS_PER_INPUT * max(_n_inputs(lm, path) for path in paths)
    text = digests.sha256_of(Path(settings.moments)) if settings.moments else f"{SAMPLED}, seed {seed}"
    about = [model, text, wanted, lm.encoder.prompt_template]
    files = {path: _cached("moments", [*about, path], SUFFIX) for path in paths}
    missing = processes.on_main(lambda: [path for path, file in files.items() if not file.is_file()])
    if missing:
        texts = _from_file(lm, settings, wanted) if settings.moments else _sampled(lm, wanted, seed, about)
        n_tokens, said = sum(map(len, texts)), settings.moments or SAMPLED
        _check_rank(lm, missing, n_tokens, said)
        for path, moment in _moments(lm, texts, missing).items():
            noted = {"model": model, "source": said, "tokens": str(n_tokens)}
            processes.on_main(partial(_save, {path: moment}, files[path], noted))
        log.info("second moments of the keys: %s tokens of %s, in %s", f"{n_tokens:,}", said, files[paths[0]].parent)
    return _loaded(files, model, lm)


def _cached(kind: str, about: object, suffix: str) -> Path:
    """Return the file of the cache for something of this kind that depends on `about`."""
    return disk.cache_folder() / f"{kind}-{digests.hash_of(about)[:24]}{suffix}"


def _n_inputs(lm: LanguageModel, path: str) -> int:
    module = lm.model.get_submodule(path)
    assert isinstance(module, LINEAR)
    return linear_shape(module)[0]


def _check_rank(lm: LanguageModel, paths: Sequence[str], n_tokens: int, source: str) -> None:
    most = max(_n_inputs(lm, path) for path in paths)
    if n_tokens < most:
        raise ConfigError(
            f"edit.moment_tokens: {n_tokens:,} tokens of {source} are too few for the second moments of {most:,} "
            f"inputs, which need at least {most:,}. Give a longer text (edit.moments), or raise edit.moment_tokens."
        )


def _from_file(lm: LanguageModel, settings: EditSettings, n_tokens: int) -> list[list[int]]:
    """Return the first `n_tokens` ids of the text file `edit.moments`, in texts of equal length."""
    try:
        text = Path(str(settings.moments)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"edit.moments = {settings.moments}: cannot be read as a text: {error}") from None
    ids = lm.encoder.text_ids(text)[:n_tokens]
    return [ids[start : start + TEXT_TOKENS] for start in range(0, len(ids), TEXT_TOKENS)]


def _sampled(lm: LanguageModel, n_tokens: int, seed: int, about: object) -> list[list[int]]:
    """Return general prompts with answers that the model samples, of `n_tokens` tokens in all or a few more.

    They are cached too, since sampling takes much longer than reading.
    """
    file = _cached("sampled", about, ".jsonl")
    if processes.on_main(file.is_file):
        return [row["ids"] for row in disk.read_rows(file)]
    room = SAMPLED_TOKENS if lm.encoder.max_length is None else min(SAMPLED_TOKENS, lm.encoder.max_length // 2)
    asked = (lm.encoder.prompt_ids(prompt) for prompt in general_prompts.keeping() + general_prompts.questions())
    prompts = cycle([prompt for prompt in asked if len(prompt) <= room])
    texts: list[list[int]] = []
    log.info("sampling %s tokens of text from the model, for the second moments of its keys", f"{n_tokens:,}")
    with generator_in_memory(lm) as sampler:
        for number in count(seed):
            batch = list(islice(prompts, SAMPLES_AT_ONCE))
            said = sampler.sample(batch, room, number)
            texts += [[*prompt, *answer] for prompt, answer in zip(batch, said, strict=True)]
            if sum(map(len, texts)) >= n_tokens:
                break
    processes.on_main(lambda: file.parent.mkdir(parents=True, exist_ok=True))
    disk.write_rows(file, [{"ids": ids} for ids in texts])
    return texts


def _moments(lm: LanguageModel, texts: Sequence[Sequence[int]], paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean of k k^T over all tokens, by path."""
    sums = {path: torch.zeros(n, n, device=lm.device) for path in paths if (n := _n_inputs(lm, path))}
    keys: dict[str, Tensor] = {}
    watchers = {path: lambda given, _gave, path=path: keys.__setitem__(path, given) for path in paths}
    for own in watch(lm, texts, watchers):
        longest = max(len(texts[index]) for index in own)
        real = torch.tensor([[0] * (longest - len(texts[i])) + [1] * len(texts[i]) for i in own]).bool().to(lm.device)
        for path, total in sums.items():
            rows = keys[path][real].float()
            total.addmm_(rows.T, rows)
    return {path: total / sum(map(len, texts)) for path, total in sums.items()}


def _save(moments: Mapping[str, Tensor], file: Path, about: dict[str, str]) -> None:
    with disk.naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}{disk.UNFINISHED}{processes.rank()}")
        save_file({path: moment.cpu().contiguous() for path, moment in moments.items()}, unfinished, about)
        unfinished.replace(file)


def _loaded(files: Mapping[str, Path], model: str, lm: LanguageModel) -> dict[str, Tensor]:
    return {path: _read(file, path, model).to(lm.device, torch.float64) for path, file in files.items()}


def _read(file: Path, path: str, model: str) -> Tensor:
    """Return the moments of one module; raise ConfigError if the file does not hold them, or is of another model."""
    where = f"edit.moments = {file}"
    try:
        with safe_open(file, "pt") as stored:
            own, found = (stored.metadata() or {}).get("model"), stored.keys()
            if own == model and path in found:
                return stored.get_tensor(path)  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    if own != model:
        raise ConfigError(
            f"{where}: holds the second moments of another model (weights {str(own)[:12]}, not {model[:12]}). Leave it "
            "out, or give moments of this model."
        )
    raise ConfigError(f"{where}: has moments of {', '.join(found)}, and {path} is edited. Choose that layer.")
