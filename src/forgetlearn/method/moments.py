"""The second moments C = E[k k^T] of the keys of a layer: what the last projection of its MLP reads in any text.

ROME, MEMIT and AlphaEdit use them to leave other keys alone. They are cached by content: model, text and layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, cycle, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetlearn.config.schema import MomentsSettings
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.generation import generator_in_memory
from forgetlearn.method.reading import watch
from forgetlearn.models.identity import weights_sha256
from forgetlearn.models.language_model import LINEAR, LanguageModel, linear_shape
from forgetlearn.runtime import processes
from forgetlearn.storage import digests, disk

log = logging.getLogger("forgetlearn")
TOKENS_PER_INPUT = 10
TEXT_TOKENS = 256  # of a file that are read as one text
SAMPLED_TOKENS, SAMPLES_AT_ONCE = 128, 64  # of an answer, and answers in a batch
SAMPLED = "text that the model sampled"
SUFFIX = ".safetensors"


def second_moments(lm: LanguageModel, paths: Sequence[str], settings: MomentsSettings, seed: int) -> dict[str, Tensor]:
    """Return the second moments (D, D), in float64 on the model's device, of the inputs of each module in `paths`.

    They are read from the cache if this model has read this text before.

    Raises:
        ConfigError: the file cannot be read, has fewer tokens than a layer has inputs, or is of another model.
    """
    wanted = settings.tokens or TOKENS_PER_INPUT * max(_n_inputs(lm, path) for path in paths)
    model = weights_sha256(lm)
    if settings.source and settings.source.endswith(SUFFIX):
        return _loaded(Path(settings.source), paths, model, lm)
    source = digests.sha256_of(Path(settings.source)) if settings.source else f"{SAMPLED}, seed {seed}"
    key = digests.hash_of([model, source, wanted, list(paths), lm.encoder.prompt_template])
    file = disk.cache_folder() / f"moments-{key[:24]}{SUFFIX}"
    if not processes.on_main(file.is_file):
        texts = _from_file(lm, settings, wanted) if settings.source else _sampled(lm, wanted, seed)
        moments, n_tokens = _moments(lm, texts, paths)
        said = settings.source or SAMPLED
        _check_rank(lm, paths, n_tokens, said)
        log.info("second moments of the keys: %s tokens of %s, cached in %s", f"{n_tokens:,}", said, file)
        processes.on_main(lambda: _save(moments, file, {"model": model, "source": said, "tokens": str(n_tokens)}))
    return _loaded(file, paths, model, lm)


def _n_inputs(lm: LanguageModel, path: str) -> int:
    module = lm.model.get_submodule(path)
    assert isinstance(module, LINEAR)
    return linear_shape(module)[0]


def _check_rank(lm: LanguageModel, paths: Sequence[str], n_tokens: int, source: str) -> None:
    most = max(_n_inputs(lm, path) for path in paths)
    if n_tokens < most:
        raise ConfigError(
            f"moments.tokens: {n_tokens:,} tokens of {source} are too few for the second moments of {most:,} inputs, "
            f"which need at least {most:,}. Give a longer text (moments.source), or raise moments.tokens."
        )


def _from_file(lm: LanguageModel, settings: MomentsSettings, n_tokens: int) -> list[list[int]]:
    """Return the first `n_tokens` ids of the text file `moments.source`, in texts of equal length."""
    try:
        text = Path(str(settings.source)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"moments.source = {settings.source}: cannot be read as a text: {error}") from None
    ids = lm.encoder.text_ids(text)[:n_tokens]
    return [ids[start : start + TEXT_TOKENS] for start in range(0, len(ids), TEXT_TOKENS)]


def _sampled(lm: LanguageModel, n_tokens: int, seed: int) -> list[list[int]]:
    """Return general prompts with answers that the model samples, of `n_tokens` tokens in all or a few more."""
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
    return texts


def _moments(lm: LanguageModel, texts: Sequence[Sequence[int]], paths: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """Return the mean of k k^T over all tokens, by path, and the number of tokens."""
    sums = {path: torch.zeros(n, n, device=lm.device) for path in paths if (n := _n_inputs(lm, path))}
    keys: dict[str, Tensor] = {}
    watchers = {path: lambda given, _gave, path=path: keys.__setitem__(path, given) for path in paths}
    for own in watch(lm, texts, watchers):
        longest = max(len(texts[index]) for index in own)
        real = torch.tensor([[0] * (longest - len(texts[i])) + [1] * len(texts[i]) for i in own]).bool().to(lm.device)
        for path, total in sums.items():
            rows = keys[path][real].float()
            total.addmm_(rows.T, rows)
    n_tokens = sum(map(len, texts))
    return {path: total / max(1, n_tokens) for path, total in sums.items()}, n_tokens


def _save(moments: Mapping[str, Tensor], file: Path, about: dict[str, str]) -> None:
    with disk.naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}{disk.UNFINISHED}{processes.rank()}")
        save_file({path: moment.cpu().contiguous() for path, moment in moments.items()}, unfinished, about)
        unfinished.replace(file)


def _loaded(file: Path, paths: Sequence[str], model: str, lm: LanguageModel) -> dict[str, Tensor]:
    def entries() -> Iterator[tuple[str, Tensor]]:
        with safe_open(file, "pt") as stored:
            own = (stored.metadata() or {}).get("model")
            if own != model:
                raise ConfigError(
                    f"moments.source = {file}: holds the second moments of another model (weights {str(own)[:12]}, not "
                    f"{model[:12]}). Leave it out, or give moments of this model."
                )
            if missing := [path for path in paths if path not in stored.keys()]:  # noqa: SIM118 (not a mapping)
                raise ConfigError(f"moments.source = {file}: has no second moments of {missing[0]}. Leave it out.")
            for path in paths:
                yield path, stored.get_tensor(path)

    try:
        return {path: moment.to(lm.device, torch.float64) for path, moment in entries()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"moments.source = {file}: cannot be read: {error}") from None
