"""The second moments C = E[k k^T] of the keys of a layer: what the last projection of its MLP reads in any text.

ROME, MEMIT and AlphaEdit use them to leave other keys alone. They are cached by content: weights, text and layer.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetlearn.config.schema import EditSettings
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.generation import generator_in_memory
from forgetlearn.method.reading import watch
from forgetlearn.models.identity import weights_sha256
from forgetlearn.models.language_model import LINEAR, LanguageModel, linear_shape
from forgetlearn.models.lora_layers import own_layer
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk
from forgetlearn.storage.locks import claimed

log = logging.getLogger("forgetlearn")
TOKENS_PER_INPUT = 5
TEXT_TOKENS = 256  # of a file that are read as one text
SAMPLED_TOKENS, SAMPLES_AT_ONCE = 128, 64  # of an answer, and answers in a batch
RIDGE = 1e-5  # of the mean, added to the diagonal: inputs that no text uses would make the moments singular
Texts = list[list[int]]


class SecondMoments(NamedTuple):
    """The second moments (D, D) of modules by path, in float64, and the text they were computed on, in words."""

    of: Mapping[str, Tensor]
    text: str


def second_moments(lm: LanguageModel, paths: Sequence[str], settings: EditSettings, seed: int) -> SecondMoments:
    """Return the second moments, on the model's device, of the inputs of each module in `paths`.

    They are read from the cache if this model has read this text before.

    Raises:
        ConfigError: the text cannot be read, or has fewer tokens than a layer has inputs.
    """
    check_text(lm, paths, settings)
    model, wanted = weights_sha256(lm), _tokens_wanted(lm, paths, settings)
    with _one_at_a_time():
        texts = _from_file(lm, settings, wanted) if settings.moments else _sampled(lm, wanted, seed, model)
        n_tokens, source = sum(map(len, texts)), settings.moments or "text that the model sampled"
        files = {path: _cached("moments", [model, texts, path], ".safetensors") for path in paths}
        missing = processes.on_main(lambda: [path for path, file in files.items() if not file.is_file()])
        for path, moment in _moments(lm, texts, missing).items():
            _save(path, moment, files[path])
        text = f"{n_tokens:,} tokens of {source}"
        log.info("second moments of the keys: %s, in %s", text, files[paths[0]].parent)
        found = {path: load_file(file)[path].to(lm.device, torch.float64) for path, file in files.items()}
    for moment in found.values():
        moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    return SecondMoments(found, text)


def check_text(lm: LanguageModel, paths: Sequence[str], settings: EditSettings) -> None:
    """Raise ConfigError if the text cannot be read, or if there are fewer tokens than a layer has inputs."""
    most = _most_inputs(lm, paths)
    if settings.moment_tokens and settings.moment_tokens < most:
        raise ConfigError(f"edit.moment_tokens: {settings.moment_tokens:,} tokens {_too_few(most)}")
    if not settings.moments:
        return
    if not Path(settings.moments).is_file():
        raise ConfigError(f"edit.moments = {settings.moments}: there is no such file. Give a text file.")
    if (n_tokens := len(_ids_of_file(lm, settings.moments, most))) < most:
        raise ConfigError(f"edit.moments: {n_tokens:,} tokens of {settings.moments} {_too_few(most)}")


def fingerprint(settings: EditSettings) -> dict[str, str]:
    """Return the hash of the text file `edit.moments` as an entry of a run's inputs; empty if none is read."""
    file = Path(settings.moments) if settings.moments else None
    return {"moments_sha256": digests.sha256_of(file)} if file and file.is_file() else {}


def _too_few(most: int) -> str:
    return (
        f"are too few for the second moments of {most:,} inputs, which need at least {most:,}. Give a longer text, or "
        "raise edit.moment_tokens."
    )


def _most_inputs(lm: LanguageModel, paths: Sequence[str]) -> int:
    modules = [own_layer(lm.model.get_submodule(path)) for path in paths]
    return max(linear_shape(module)[0] for module in modules if isinstance(module, LINEAR))


def _tokens_wanted(lm: LanguageModel, paths: Sequence[str], settings: EditSettings) -> int:
    return settings.moment_tokens or TOKENS_PER_INPUT * _most_inputs(lm, paths)


def _cached(kind: str, about: object, suffix: str) -> Path:
    """Return the file of the cache for something of this kind that depends on `about`."""
    return disk.cache_folder() / f"{kind}-{digests.hash_of(about)[:24]}{suffix}"


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let other runs wait, and then find in the cache what this one computes."""
    if not processes.is_main():
        yield
        return
    with disk.naming(disk.cache_folder()):
        disk.cache_folder().mkdir(parents=True, exist_ok=True)
    with claimed(disk.cache_folder() / "moments.lock", waits=True):
        yield


def _from_file(lm: LanguageModel, settings: EditSettings, n_tokens: int) -> Texts:
    """Return the first `n_tokens` ids of the text file `edit.moments`, in texts that each begin as a prompt does."""
    specials, ids = lm.encoder.text_ids(""), _ids_of_file(lm, str(settings.moments), n_tokens)
    size = min(TEXT_TOKENS, lm.encoder.max_length or TEXT_TOKENS) - len(specials)
    return [[*specials, *ids[start : start + size]] for start in range(0, len(ids), size)]


def _ids_of_file(lm: LanguageModel, file: str, n_tokens: int) -> Sequence[int]:
    """Return the first `n_tokens` ids of a text, or all if it has fewer; raise ConfigError if it cannot be read."""
    n_specials, n_characters = len(lm.encoder.text_ids("")), 8 * n_tokens
    while True:  # of a long text no more is read than is needed
        try:
            with Path(file).open(encoding="utf-8") as stream:
                text = stream.read(n_characters)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"edit.moments = {file}: cannot be read as a text: {error}") from None
        ids = lm.encoder.text_ids(text)[n_specials:]
        if len(ids) > n_tokens or len(text) < n_characters:  # where the text is cut, tokens may differ
            return ids[:n_tokens]
        n_characters *= 2


def _sampled(lm: LanguageModel, n_tokens: int, seed: int, model: str) -> Texts:
    """Return general prompts with answers that the model samples, of `n_tokens` tokens in all or a few more.

    They are cached too, since sampling takes much longer than reading.
    """
    room = SAMPLED_TOKENS if lm.encoder.max_length is None else min(SAMPLED_TOKENS, lm.encoder.max_length // 2)
    asked = [lm.encoder.prompt_ids(prompt) for prompt in general_prompts.keeping() + general_prompts.questions()]
    asked = [prompt for prompt in asked if len(prompt) <= room]
    file = _cached("sampled", [model, asked, n_tokens, seed], ".jsonl")
    if processes.on_main(file.is_file):
        return [row["ids"] for row in disk.read_rows(file)]
    log.info("sampling %s tokens of text from the model, for the second moments of its keys", f"{n_tokens:,}")
    prompts, texts = cycle(asked), []
    with generator_in_memory(lm) as sampler:
        for number in count(seed, 1 << 16):  # so that runs with neighbouring seeds share no draws
            batch = list(islice(prompts, SAMPLES_AT_ONCE))
            said = sampler.sample(batch, room, number)
            texts += [[*prompt, *answer] for prompt, answer in zip(batch, said, strict=True)]
            if sum(map(len, texts)) >= n_tokens:
                break
    disk.write_rows(file, [{"ids": ids} for ids in texts])
    return texts


def _moments(lm: LanguageModel, texts: Texts, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean of k k^T over all tokens, by path."""
    if not paths:
        return {}
    sizes = {path: _most_inputs(lm, [path]) for path in paths}
    sums = {path: torch.zeros(size, size, device=lm.device) for path, size in sizes.items()}
    keys: dict[str, Tensor] = {}
    watchers = {path: lambda given, _gave, path=path: keys.__setitem__(path, given) for path in paths}
    for own in watch(lm, texts, watchers):
        longest = max(len(texts[index]) for index in own)
        real = torch.tensor([[0] * (longest - len(texts[i])) + [1] * len(texts[i]) for i in own]).bool().to(lm.device)
        for path, total in sums.items():
            rows = keys[path][real].float()
            total.addmm_(rows.T, rows)
    return {path: total / sum(map(len, texts)) for path, total in sums.items()}


def _save(path: str, moment: Tensor, file: Path) -> None:
    """Write moments to the cache. Only the main process writes."""

    def write() -> None:
        with disk.naming(file):
            unfinished = file.with_name(f".{file.name}{disk.UNFINISHED}{secrets.token_hex(4)}")
            save_file({path: moment.cpu().contiguous()}, unfinished)
            unfinished.replace(file)

    processes.on_main(write)
