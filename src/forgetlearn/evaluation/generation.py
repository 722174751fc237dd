"""Generate greedy answers to prompts of token ids, with transformers or vLLM."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import ConfigError, ModelError, missing_extra
from forgetlearn.models import attention
from forgetlearn.models.batches import common_length, computing, plain_cache
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.loading import adapter_base
from forgetlearn.runtime import processes, sharding
from forgetlearn.weights.adapter_files import LoraAdapterConfig, read_adapter_config

Ids = Sequence[int]
Inputs = dict[str, Any]  # of `generate`: ids, mask, and the keys and values of what is already computed
STRIDE = 8  # tokens after which answers that have ended are taken out of a batch
WORTH_CACHING = 8  # tokens that all prompts begin with
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # the values that vLLM accepts as max_lora_rank
VLLM_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the device's free memory; a CPU's is that of other programs too


@dataclass(frozen=True)
class Room:
    """The limits of a free answer, in tokens and lines. Lines are counted from the first that is not blank."""

    tokens: int
    lines: int = 1


def end_ids(lm: LanguageModel) -> list[int]:
    """Return the token ids that end an answer."""
    return sorted({*lm.encoder.end_ids, lm.tokenizer.eos_token_id})


def check_engine(settings: EvaluateSettings, models: Iterable[object] = (), changed_by: str | None = None) -> None:
    """Raise ConfigError if vLLM is asked for but cannot be used for these models (None: the model in the config).

    vLLM cannot be used for a model in memory, in a command that changes weights (`changed_by`), or in several
    processes.
    """
    if settings.engine != "vllm":
        return
    reason = f"{changed_by} changes weights in memory" if changed_by else None
    if any(model is not None and not isinstance(model, (str, Path)) for model in models):
        reason = "a model that is passed in is in memory"
    if reason:
        raise ConfigError(
            f"evaluate.engine = vllm: {reason}, and vLLM reads a folder or hub id. Leave it out; "
            "`forgetlearn evaluate --engine vllm` scores what was saved."
        )
    if processes.launched() > 1:
        raise ConfigError("evaluate.engine = vllm: works in one process only. Start it without torchrun.")
    _vllm()


@contextmanager
def generator(lm: LanguageModel, settings: EvaluateSettings) -> Iterator[Generator]:
    """Yield the generator for this model that `evaluate.engine` selects."""
    if settings.engine == "vllm":
        yield VllmGenerator(lm)
        return
    with generator_in_memory(lm) as found:
        yield found


@contextmanager
def generator_in_memory(lm: LanguageModel) -> Iterator[TransformersGenerator]:
    """Yield a generator that uses the model in memory."""
    with (
        sharding.no_gradients(lm.model),
        _plain_generation(lm.model),
        _contiguous_head(lm.model),
        computing(lm.model, lm.device),
    ):
        yield TransformersGenerator(lm)


class TransformersGenerator:
    """Generates with the model in memory, on one batch padded on the left.

    What all prompts of a batch begin with, such as the system prompt of a chat template, is computed once. Every few
    tokens, the answers that have ended are taken out of the batch.
    """

    batches_itself = False

    def __init__(self, lm: LanguageModel) -> None:
        self.lm, self.ends = lm, end_ids(lm)
        self._start: tuple[Ids, DynamicCache | None] = ((), None)
        self._drops = True  # False for a model that keeps more than keys and values

    def generate(self, prompts: Sequence[Ids], rooms: Sequence[Room]) -> list[list[int]]:
        """Return greedily chosen ids for each prompt, up to its room, an end token or the end of the context.

        Ids after the first end token, or after the last line that the room allows, are not part of the answer.
        """
        width = max(len(prompt) for prompt in prompts)
        longest = self._longest(rooms, width)
        going, inputs = list(range(len(prompts))), self._inputs(prompts)
        found: dict[int, list[int]] = {}
        while going:
            own = [rooms[row] for row in going]
            n_new = longest - (inputs["input_ids"].shape[1] - width)
            if self._drops and len(going) > 1:
                n_new = min(n_new, STRIDE)
            sequences, cache, ended = self._continued(inputs, width, own, n_new)
            new = sequences[:, width:]
            if not ended.all() and new.shape[1] < longest and cache is None:
                self._drops, inputs = False, self._inputs([prompts[row] for row in going])
                continue
            ended |= new.shape[1] >= longest
            found |= {row: new[place].tolist() for place, row in enumerate(going) if ended[place]}
            stay = (~ended).nonzero().flatten()
            going = [going[place] for place in stay.tolist()]
            if going:
                inputs = self._going_on(inputs, sequences, cache, stay)
        return [found[row][: room.tokens] for row, room in enumerate(rooms)]

    def stream(
        self, prompt: Ids, room: Room, emit: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[list[int], bool]:
        """Return greedily chosen ids, as `generate` does, and whether the answer ended by itself.

        `emit` gets the text word by word as it is generated. `stopped` is asked after each token whether to stop.
        """
        full = _Full(self.lm.encoder.decode, len(prompt), [room])
        inputs, n_new = self._laid_out([prompt], 0), self._longest([room], len(prompt))
        out = self._greedy(inputs, n_new, full, _Stopped(stopped), streamer=_Words(self.lm.tokenizer, emit))
        new: list[int] = out.sequences[0, len(prompt) :].tolist()
        ended = new[-1] in self.ends or self.lm.encoder.decode(new).lstrip().count("\n") >= room.lines
        return new, ended

    def _continued(
        self, inputs: Inputs, width: int, rooms: Sequence[Room], n_new: int
    ) -> tuple[torch.Tensor, DynamicCache | None, torch.Tensor]:
        """Return ids with up to `n_new` more, their keys and values if rows can be dropped, and which have ended."""
        full = _Full(self.lm.encoder.decode, width, rooms)
        out = self._greedy(inputs, n_new, full)
        ends = torch.tensor(self.ends, device=out.sequences.device)
        ended = torch.isin(out.sequences[:, width:], ends).any(1) | full(out.sequences, out.sequences)
        return out.sequences, plain_cache(out), ended

    def _longest(self, rooms: Sequence[Room], width: int) -> int:
        """Return how many new tokens the longest answer may have behind prompts of this width."""
        most, context = max(room.tokens for room in rooms), self.lm.encoder.max_length
        return min(most, context - width) if context else most

    def _greedy(self, inputs: Inputs, n_new: int, *criteria: StoppingCriteria, **options: object) -> Any:
        """Return what `generate` returns for up to `n_new` greedily chosen tokens."""
        config = GenerationConfig(
            max_new_tokens=n_new,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.ends,
            pad_token_id=self.lm.pad_id,
            return_dict_in_generate=True,
        )
        return self._generate(inputs, config, criteria, **options)

    def _generate(
        self, inputs: Inputs, config: GenerationConfig, criteria: Sequence[StoppingCriteria], **options: object
    ) -> Any:
        generate = getattr(self.lm.model, "generate")  # noqa: B009 (nn.Module has none)
        return generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList(criteria), **options)

    @staticmethod
    def _going_on(inputs: Inputs, sequences: torch.Tensor, cache: DynamicCache, rows: torch.Tensor) -> Inputs:
        """Return the inputs of the rows that continue."""
        mask = inputs["attention_mask"]
        said = torch.ones(len(mask), sequences.shape[1] - mask.shape[1], dtype=mask.dtype, device=mask.device)
        if len(rows) < len(mask):
            cache.batch_select_indices(rows)
        return {
            "input_ids": sequences[rows],
            "attention_mask": torch.cat([mask, said], dim=1)[rows],
            "past_key_values": cache,
        }

    def sample(self, prompts: Sequence[Ids], n_tokens: int, seed: int) -> list[list[int]]:
        """Return ids that continue each prompt, drawn from the model's own distribution, up to an end token.

        The whole batch stops once more than three quarters have ended: a step costs as much for a few rows as for all.
        """
        width = max(len(prompt) for prompt in prompts)
        config = GenerationConfig(
            max_new_tokens=n_tokens, do_sample=True, top_k=0, eos_token_id=self.ends, pad_token_id=self.lm.pad_id
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self._generate(self._inputs(prompts), config, [_MostEnded(self.ends, width)])
        return [list(takewhile(lambda token: token not in self.ends, ids)) for ids in out[:, width:].tolist()]

    def _inputs(self, prompts: Sequence[Ids]) -> Inputs:
        """Return the inputs of a batch. Padding follows a common beginning whose keys and values are at hand."""
        shared = common_length(prompts)
        cache = self._cache_of(prompts[0][:shared]) if shared >= WORTH_CACHING and len(prompts) > 1 else None
        if cache is None:
            return self._laid_out(prompts, 0)
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(prompts))
        return {**self._laid_out(prompts, shared), "past_key_values": own}

    def _laid_out(self, prompts: Sequence[Ids], start: int) -> dict[str, torch.Tensor]:
        """Return ids and mask, with the padding after the first `start` tokens."""
        width, pad = max(len(prompt) for prompt in prompts), self.lm.pad_id
        rows = [(prompt[:start], width - len(prompt), prompt[start:]) for prompt in prompts]
        ids = [[*before, *[pad] * space, *after] for before, space, after in rows]
        mask = [[1] * len(before) + [0] * space + [1] * len(after) for before, space, after in rows]
        device = self.lm.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _cache_of(self, start: Ids) -> DynamicCache | None:
        """Return the keys and values of a beginning; None if this model keeps anything else, such as a state."""
        if tuple(self._start[0]) != tuple(start):
            out = self.lm.model(input_ids=torch.tensor([list(start)], device=self.lm.device), use_cache=True)
            self._start = (tuple(start), plain_cache(out))
        return self._start[1]


class VllmGenerator:
    """Runs vLLM on the folder or hub id that the model was loaded from; for an adapter, on its base with the adapter.

    The engine lives for one call, so that the next step has the device's memory.
    """

    batches_itself = True  # takes all prompts at once

    def __init__(self, lm: LanguageModel) -> None:
        """Raise ModelError if the model has neither a folder nor a hub id."""
        if lm.settings.name is None:
            raise ModelError("evaluate.engine = vllm: the model is in memory, and vLLM reads a folder or hub id.")
        self.lm, self.ends = lm, end_ids(lm)

    def generate(self, prompts: Sequence[Ids], rooms: Sequence[Room]) -> list[list[int]]:
        """Return new token ids for each prompt, as `TransformersGenerator.generate` does."""
        vllm, lora = _vllm()
        context = self.lm.encoder.max_length
        limits = [
            min(room.tokens, context - len(prompt)) if context else room.tokens
            for prompt, room in zip(prompts, rooms, strict=True)
        ]
        # Greedy. A line break is not a stop string, because one that comes before any text belongs to the answer.
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=self.ends, detokenize=False)
            for limit in limits
        ]
        asked = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        folder = str(self.lm.settings.name)
        adapter = lora.LoRARequest("product", 1, folder) if adapter_base(self.lm.settings) else None
        self.lm.model.to("cpu")  # leaves the device's memory to the engine
        _free_memory()
        try:
            engine = _started(vllm, self._options(longest))
            found = engine.generate(asked, params, lora_request=adapter, use_tqdm=not processes.no_bar())
            del engine
        finally:
            _free_memory()
            self.lm.to_device()
        return [self._with_end(list(out.token_ids), out.finish_reason) for out in (reply.outputs[0] for reply in found)]

    def _options(self, longest: int) -> dict[str, object]:
        lm, settings = self.lm, self.lm.settings
        base = adapter_base(settings)
        dtypes = {dtype for dtype in lm.dtypes.values() if dtype.is_floating_point}
        # By default, vLLM computes a float32 model in half precision.
        dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "auto"
        options: dict[str, object] = {
            "model": base or settings.name,
            "revision": settings.revision,
            "trust_remote_code": settings.trust_remote_code,
            "dtype": dtype,
            "max_model_len": longest,
            "generation_config": "vllm",  # not the model's own, which may limit answers
            "gpu_memory_utilization": _share_of_memory(lm.device),
            "enforce_eager": True,  # compiling took minutes, more than all answers of a call (measured on a CPU)
        }
        if base:
            options |= {"enable_lora": True, "max_lora_rank": _rank(Path(str(settings.name)))}
        return options

    def _with_end(self, ids: list[int], finish_reason: str) -> list[int]:
        """Return the ids with the end token, which vLLM leaves out if it stopped at one."""
        stopped = finish_reason == "stop" and not set(ids) & set(self.ends)
        return ids + self.ends[:1] if stopped else ids


Generator = TransformersGenerator | VllmGenerator


def _vllm() -> tuple[ModuleType, ModuleType]:
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise missing_extra("evaluate.engine = vllm", "vllm", error) from error
    return vllm, vllm.lora.request


def _started(vllm: ModuleType, options: dict[str, object]) -> Any:
    """Return vLLM's engine; raise ModelError if it does not start, as for an architecture that it does not know."""
    try:
        return vllm.LLM(**options)
    except (OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, ValidationError):  # whose first line only counts the problems
            lines = [problem["msg"] for problem in error.errors()]
        reason = lines[0]
        raise ModelError(
            f"evaluate.engine = vllm: vLLM does not start with {options['model']}: {reason}\n"
            "Its log above may say more. Leave --engine out to generate with transformers."
        ) from error


def _rank(folder: Path) -> int:
    """Return the smallest rank that vLLM accepts and that is enough for the adapter; raise ModelError if none is."""
    config = read_adapter_config(folder)
    if not isinstance(config, LoraAdapterConfig):
        raise ModelError(f"{folder}: peft_type = {config.peft_type}: vLLM takes LoRA only. Leave --engine out.")
    rank = max(config.ranks(), default=8)
    if rank > VLLM_RANKS[-1]:
        raise ModelError(
            f"{folder}: the adapter's rank is {rank}, but vLLM takes at most {VLLM_RANKS[-1]}. Leave --engine out."
        )
    return next(known for known in VLLM_RANKS if known >= rank)


def _share_of_memory(device: torch.device) -> float:
    """Return the share of the device's total memory that vLLM may take; it refuses to start with more than is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return VLLM_SHARE.get(device.type, VLLM_SHARE["cpu"]) * free / total


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class _Full(StoppingCriteria):  # type: ignore[misc]
    """Stops each row when its answer fills its room."""

    def __init__(self, decode: Callable[[Iterable[int]], str], width: int, rooms: Sequence[Room]) -> None:
        self.decode, self.width, self.rooms = decode, width, rooms

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        full = [
            len(ids) >= room.tokens or self.decode(ids).lstrip().count("\n") >= room.lines
            for ids, room in zip(input_ids[:, self.width :].tolist(), self.rooms, strict=True)
        ]
        return torch.tensor(full, device=input_ids.device)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Stops when a function says so."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.stopped(), device=input_ids.device)


class _Words(TextStreamer):  # type: ignore[misc]
    """Passes on the text of new tokens as soon as a word is whole, without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text."""
        self.emit(text)


class _MostEnded(StoppingCriteria):  # type: ignore[misc]
    """Stops the whole batch once more than three quarters of its rows have ended."""

    def __init__(self, ends: Sequence[int], width: int) -> None:
        self.ends, self.width = ends, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        ended = torch.isin(input_ids[:, self.width :], torch.tensor(self.ends, device=input_ids.device)).any(1)
        return torch.full_like(ended, 4 * int((~ended).sum()) < len(ended))


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Set the model's own generation settings aside: a repetition penalty in them would change greedy answers."""
    inner = attention.plain(model)
    if not hasattr(inner, "generation_config"):
        raise ModelError("The model has no generate method, so it cannot answer prompts. Give a causal language model.")
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _contiguous_head(model: nn.Module) -> Iterator[None]:
    """Within the `with` block, give the output head a contiguous copy of its input, which is a slice.

    If the head's matrix is frozen and in half precision on the CPU, torch multiplies a slice batch by batch and copies
    the matrix for each row: 3.6 GB and 22 s for 64 prompts of SmolLM2-135M.
    """
    head = getattr(attention.plain(model), "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
