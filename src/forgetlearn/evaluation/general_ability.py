"""Measure general ability: on general prompts, on a text unrelated to the facts, and on benchmark tasks.

The prompts are shipped with the package (`damage`). Perplexity and the divergence from the earlier model need only a
text file. Tasks are named as in lm-evaluation-harness (the extra `lm-eval`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import FactError, ModelError, missing_extra
from forgetlearn.evaluation import damage, general_prompts
from forgetlearn.evaluation.statistics import mean_of
from forgetlearn.facts import Fact
from forgetlearn.models.batches import computing, forward_parameters
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.runtime import processes, sharding
from forgetlearn.storage.records import General, OnText, TaskScore, load_rows, save_rows

WINDOW = 512  # the most tokens of the text that are read at once
FOUND = "general.jsonl"
LOG_PROBS = "window-{:05d}.safetensors"


def asked(settings: EvaluateSettings) -> bool:
    """Return True if the settings ask for general ability to be measured."""
    return settings.general_prompts or settings.general is not None or bool(settings.tasks)


def read_text(settings: EvaluateSettings) -> str:
    """Return the text of the file `evaluate.general`, "" if none is set. Raise FactError if the file cannot be used."""
    if settings.general is None:
        return ""
    place = f"evaluate.general = {settings.general}"
    try:
        text = Path(settings.general).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactError(f"{place}: {error.strerror or error}. Give a text file.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{place}: is not UTF-8 at byte {error.start}. Give a plain text file.") from error
    if not text.strip():
        raise FactError(f"{place}: is empty. Use a text of a few thousand ordinary words.")
    return text


def check(settings: EvaluateSettings) -> None:
    """Raise FactError if the text cannot be read or a task is unknown, MissingExtraError if the harness is missing."""
    read_text(settings)
    if settings.tasks:
        _known_tasks(settings)


def check_embedded(lm: LanguageModel, settings: EvaluateSettings) -> None:
    """Raise FactError if the text contains a token that has no embedding in the model."""
    if text := read_text(settings):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][: settings.general_tokens]
        lm.encoder.check_embedded(ids, f"evaluate.general = {settings.general}")


def measure(
    lm: LanguageModel,
    settings: EvaluateSettings,
    folder: Path,
    before: Path | None = None,
    facts: Iterable[Fact] = (),
) -> General:
    """Measure what the settings ask for, and write it to `folder`.

    `before` is the folder of an earlier call to compare with. Without it, `folder` also gets the answers and
    log-probabilities that a later call needs, of all general prompts but those that ask one of the `facts`.

    Raises:
        FactError: the text has fewer than two tokens or has changed since `before`, or a task is unknown.
        ModelError: the two models have different vocabularies.
    """
    found = General()
    if settings.general_prompts:
        found = found.model_copy(
            update={"prompts": damage.measure(lm, settings, folder, before, general_prompts.measuring(facts))}
        )
    if text := read_text(settings):
        digest = hashlib.sha256(f"{settings.general_tokens}:{text}".encode()).hexdigest()
        if before is not None and (was := found_in(before).text) is not None and was.sha256 != digest:
            raise FactError(
                f"evaluate.general = {settings.general}: is not the text that was read before the update: the "
                "file changed during the run."
            )
        on_text = score_text(lm, text, settings, keep=None if before else folder, before=before)
        found = found.model_copy(update={"text": on_text.model_copy(update={"sha256": digest})})
    if settings.tasks:
        found = found.model_copy(update={"tasks": score_tasks(lm, settings)})
    processes.on_main(lambda: save_rows([found], folder / FOUND))
    return found


def found_in(folder: Path) -> General:
    """Read the result that `measure` wrote to a folder."""
    return load_rows(General, folder / FOUND)[0]


def score_text(
    lm: LanguageModel,
    text: str,
    settings: EvaluateSettings,
    *,
    keep: Path | None = None,
    before: Path | None = None,
) -> OnText:
    """Score the first `evaluate.general_tokens` tokens of a text, in windows that do not overlap.

    The loss is in nats per token, with a 95 % interval over windows; `kl` is the mean over tokens of KL(before ||
    now). `keep` is a folder for this model's log-probabilities (tokens x vocabulary, float32), and `before` is a
    folder with those of an earlier model.
    """
    losses, divergences, counts = [], [], []
    with computing(lm.model, lm.device), sharding.no_gradients(lm.model):
        for index, window in enumerate(_windows(lm, text, settings.general_tokens)):
            log_probs = _log_probs(lm, window)
            wanted = torch.tensor(window[1:])
            losses.append(float(functional.nll_loss(log_probs, wanted, reduction="sum")))
            counts.append(len(wanted))
            if keep is not None and processes.is_main():
                save_file({"log_probs": log_probs}, keep / LOG_PROBS.format(index))
            if before is not None:
                divergences.append(_divergence(load_file(before / LOG_PROBS.format(index))["log_probs"], log_probs))
    loss, loss_low, loss_high = mean_of([loss / n for loss, n in zip(losses, counts, strict=True)], counts)
    kl = kl_low = kl_high = None
    if before is not None:
        kl, kl_low, kl_high = mean_of([kl / n for kl, n in zip(divergences, counts, strict=True)], counts)
    return OnText(
        source=Path(settings.general or "").name,
        tokens=sum(counts),
        windows=len(counts),
        loss=loss,
        loss_low=loss_low,
        loss_high=loss_high,
        kl=kl,
        kl_low=kl_low,
        kl_high=kl_high,
        perplexity=math.exp(loss),
    )


def _windows(lm: LanguageModel, text: str, n_tokens: int) -> Iterator[list[int]]:
    """Yield the tokens of the text in windows, each starting with BOS if the tokenizer adds one."""
    start = lm.tokenizer(text[:1])["input_ids"][:1]
    bos = start if start == [lm.tokenizer.bos_token_id] else []
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens]
    size = min(WINDOW, lm.encoder.max_length or WINDOW) - len(bos)
    pieces = [bos + ids[start : start + size] for start in range(0, len(ids), size)]
    long_enough = [piece for piece in pieces if len(piece) > 1]
    if not long_enough:
        raise FactError(f"evaluate.general: the text has {len(ids)} tokens. Use a text of a few thousand words.")
    yield from long_enough


def _log_probs(lm: LanguageModel, window: Sequence[int]) -> Tensor:
    """Return the log-probabilities of each token after the first: (T - 1, V), float32, on the CPU."""
    ids = torch.tensor([list(window)], device=lm.device)
    more = {"use_cache": False} if "use_cache" in forward_parameters(lm.model) else {}
    logits = lm.model(input_ids=ids, **more).logits[0, :-1]
    return functional.log_softmax(logits.float(), dim=-1).cpu()


def _divergence(before: Tensor, now: Tensor) -> float:
    """Return the sum over tokens of KL(before || now), in nats."""
    if before.shape != now.shape:
        raise ModelError(f"General ability: {tuple(before.shape)} probabilities before, {tuple(now.shape)} now.")
    return float(functional.kl_div(now, before, log_target=True, reduction="sum"))


def score_tasks(lm: LanguageModel, settings: EvaluateSettings) -> dict[str, dict[str, TaskScore]]:
    """Return task -> metric -> value and standard error, in the units of lm-evaluation-harness."""
    evaluator, _tasks, models = _harness()
    known = _known_tasks(settings)
    wrapped = models.HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=settings.batch_size)
    with computing(lm.model, lm.device), contextlib.redirect_stdout(io.StringIO()):
        found = evaluator.simple_evaluate(
            wrapped, tasks=list(settings.tasks), task_manager=known, limit=settings.task_limit, bootstrap_iters=1000
        )
    return {task: _metrics(result) for task, result in found["results"].items()}


def _known_tasks(settings: EvaluateSettings) -> Any:
    """Return the harness's manager of tasks, which knows all tasks that are set; raise FactError if it does not."""
    _evaluator, tasks, _models = _harness()
    known = tasks.TaskManager(include_path=settings.task_folder)
    if unknown := [name for name in settings.tasks if name not in known.all_tasks]:
        raise FactError(
            f"evaluate.tasks: lm-evaluation-harness has no task named {unknown[0]!r}. `lm-eval ls tasks` lists them; "
            "evaluate.task_folder names a folder with tasks of your own."
        )
    return known


def _metrics(result: Mapping[str, object]) -> dict[str, TaskScore]:
    """Turn `{"acc,none": 0.5, "acc_stderr,none": 0.1}` into `{"acc": {"value": 0.5, "stderr": 0.1}}`."""
    values = {name: value for name, value in result.items() if isinstance(value, (int, float)) and "," in name}
    found: dict[str, TaskScore] = {}
    for name, value in values.items():
        metric, _comma, how = name.partition(",")
        if metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{how}")
        found[metric if how == "none" else f"{metric} ({how})"] = TaskScore(value=float(value), stderr=stderr)
    return found


def _harness() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from lm_eval import evaluator, tasks
        from lm_eval.models import huggingface
    except ImportError as error:
        raise missing_extra("evaluate.tasks needs lm-evaluation-harness", "lm-eval", error) from error
    return evaluator, tasks, huggingface
