"""Describe a model without its weights: its config, tokenizer, and the headers of its files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import PreTrainedConfig

from forgetlearn.config.methods import KindTraits
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ModelError
from forgetlearn.models import gguf
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.language_model import context_length
from forgetlearn.models.loading import adapter_base, read_outline
from forgetlearn.planning.trace import Skeleton
from forgetlearn.weights.checkpoint_folder import INDEX, WHOLE, CheckpointFolder
from forgetlearn.weights.task_vector import TORCH


@dataclass(frozen=True)
class Outline:
    """A model without its weights. `stored` is None if no headers could be read, `encoder` if there is no tokenizer."""

    name: str
    config: PreTrainedConfig
    encoder: Encoder | None
    dtype: torch.dtype
    stored: dict[str, int] | None = None  # dtype, as safetensors or GGUF spells it -> count of numbers
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()
    in_float32: bool = False  # as in `LanguageModel`

    def computes_in(self, kind: KindTraits) -> torch.dtype:
        """Return the dtype of the model's weights in a stage of this kind."""
        return torch.float32 if kind.changes_base or self.in_float32 else self.dtype

    def skeleton(self, dtype: torch.dtype | None = None) -> Skeleton:
        """Return the model's structure without weight values, in `dtype` or else in its own."""
        return Skeleton(self.config, dtype or self.dtype, trust_remote_code=self.trust_remote_code)


def outline_of(settings: ModelSettings) -> Outline:
    """Return the outline of the model in the settings, of an adapter its base's; raise ModelError if it cannot load."""
    of_adapter = []
    if (under := adapter_base(settings)) is not None:
        of_adapter = [f"{settings.name} is an adapter: the figures are those of {under}, without the adapter's weights"]
        settings = settings.model_copy(update={"name": under})
    config, tokenizer, notes = read_outline(settings)
    name = gguf.resolved(str(settings.name))
    stored, why_not = _stored(name, settings.revision)
    encoder = None
    if tokenizer is not None:
        rows = getattr(config.get_text_config(), "vocab_size", None)
        encoder = Encoder(tokenizer, settings.prompt_template, context_length(config), rows)
    dtype = _dtype(settings.dtype, config, stored)
    return Outline(name, config, encoder, dtype, stored, settings.trust_remote_code, (*of_adapter, *notes, *why_not))


def _stored(name: str, revision: str | None) -> tuple[dict[str, int] | None, list[str]]:
    """Return dtype -> count of numbers, from headers in a folder or file, the hub's cache or the hub, and any notes."""
    folder = Path(name)
    if folder.is_file():
        return dict(gguf.read_header(folder).stored), []
    if not folder.is_dir():
        cached = (try_to_load_from_cache(name, file, revision=revision) for file in (WHOLE, INDEX))
        found = next((Path(path).parent for path in cached if isinstance(path, str)), None)
        if found is None:
            return _stored_on_hub(name, revision)
        folder = found
    try:
        counts: Counter[str] = Counter()
        for entry in CheckpointFolder(folder).entries.values():
            counts[entry.dtype] += entry.n_entries
    except ModelError as error:
        if Path(name).is_dir():
            raise
        return None, [f"the headers in the hub's cache cannot be read ({error}); sizes are those of the config"]
    return dict(counts), []


def _stored_on_hub(name: str, revision: str | None) -> tuple[dict[str, int] | None, list[str]]:
    try:
        counts = get_safetensors_metadata(name, revision=revision).parameter_count
        return {str(dtype): n for dtype, n in counts.items()}, []
    except NotASafetensorsRepoError:
        return None, [f"{name} has no safetensors on the hub, which update needs; sizes are those of its config"]
    except Exception as error:  # errors of the network and the hub have no type in common
        return None, [f"no headers from the hub ({type(error).__name__}); sizes are those of the config"]


def _dtype(wanted: str, config: PreTrainedConfig, stored: dict[str, int] | None) -> torch.dtype:
    """Return the dtype in which transformers loads the weights."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    floats = {name: n for name, n in (stored or {}).items() if name in TORCH and TORCH[name].is_floating_point}
    return TORCH[max(floats, key=lambda name: floats[name])] if floats else torch.float32
