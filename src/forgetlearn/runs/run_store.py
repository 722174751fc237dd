"""Keep the steps of an update in its run folder, so that a killed run continues after the last finished step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from forgetlearn.config.schema import ForgetSettings, RunConfig, TrainSettings
from forgetlearn.config.stages import Stage, Stages
from forgetlearn.method.kinds import STAGE_KINDS, fold_in
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel, load_model
from forgetlearn.runs.coefficient import CHOICE, LEARNED, LEARNED_LOG, WEIGHTS, Search, read_stage_log
from forgetlearn.runs.pipeline import Pipeline, Store, Train, Tuned
from forgetlearn.runtime import sharding
from forgetlearn.storage import disk
from forgetlearn.storage.records import Choice, Row, load_rows, save_rows
from forgetlearn.storage.run_folder import RunFolder
from forgetlearn.training.finetune import StageLog
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights import rounding
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")
REMEDIES = (
    "--set model.dtype=float32 (twice the size), or a method that learns with LoRA, whose adapter is not rounded, or "
    "--set model.rounding=stochastic (with a little noise)"
)
FORGOTTEN_WEIGHTS = "weights.safetensors"


class RunStore(Store):
    """Keeps the steps of one update in its run folder.

    An adapter's config names its base: the taught model if there is one, else the hub id that the user gave, else
    `base_name`.
    """

    def __init__(self, run: RunFolder, config: RunConfig, lm: LanguageModel, base_name: str) -> None:
        super().__init__()
        self.run, self.config, self.lm = run, config, lm
        self.stages = Stages(config)
        base = Path(base_name)
        self.base_name = config.model.base_model_id or (str(base.resolve()) if base.exists() else base_name)
        if self.stages.teach:
            self.base_name = str((run.path / "taught").resolve())
        self.choice: Choice | None = None
        self._chosen = run.path / "stages/coefficient"

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a step, as they are in its folder."""
        folder = self.files(step, lambda folder: save_rows(compute(), folder / "rows.jsonl"))
        return load_rows(Row, folder / "rows.jsonl")

    def files(self, step: str, write: Callable[[Path], None]) -> Path:
        """Do the step if it is not done yet, and return its folder, `stages/<step>`."""
        self.run.do(step, write)
        return self.run.path / "stages" / step

    def train(self, stage: Stage[TrainSettings], n_facts: int | None, compute: Train) -> Callable[[], None] | None:
        """Change the model and write the result; if that was done before, return a function that loads it."""

        def write(unfinished: Path) -> dict[str, object]:
            noted: dict[str, object] = {} if n_facts is None else {"facts": n_facts}
            if stage_log := compute(self._stage_io(stage.name)):
                noted |= self._log_stage(stage.name, stage_log)
            kind = STAGE_KINDS[stage.kind.name]
            if not self._is_loadable(stage):  # in float32, to keep every bit
                sharding.save_parts(kind.state(self.lm, lora.FORGET), self.lm.model, unfinished / FORGOTTEN_WEIGHTS)
            else:
                kind.save_product(self.lm, unfinished, self.base_name)
            return noted

        was_done = self.run.is_done(stage.name)
        self.run.do(stage.name, write, self._folder(stage).relative_to(self.run.path).as_posix())
        return functools.partial(self._load, stage) if was_done else None

    def _folder(self, stage: Stage[TrainSettings]) -> Path:
        if stage.name == self.stages.last.name:
            return self.run.path / self.stages.product
        return self.run.path / {"teach": "taught", "forget": "stages/forget"}[stage.name]

    def _is_loadable(self, stage: Stage[TrainSettings]) -> bool:
        """Return True if other programs can load what a stage leaves: all stages but forgetting before learning."""
        return stage.name in ("teach", self.stages.last.name)

    def _load(self, stage: Stage[TrainSettings]) -> None:
        folder, settings = self._folder(stage), stage.settings
        if isinstance(settings, ForgetSettings) and not self._is_loadable(stage):
            weights = sharding.load_parts(self.lm.model, folder / FORGOTTEN_WEIGHTS)
            STAGE_KINDS[stage.kind.name].put_state(self.lm, settings, weights)
        elif stage.kind.adapter:
            plain = lora.detach(self.lm.model) if hasattr(self.lm.model, "peft_config") else self.lm.model
            self.lm.model = lora.load(plain, folder, lora.PRODUCT, device=self.lm.device)  # includes earlier updates
        else:
            self.lm.model = nn.Identity()  # to free the base before its replacement is loaded
            named = self.lm.settings.model_copy(update={"name": str(folder)})
            loaded = load_model(named, all_weights=self.stages.changes_base, may_hold=self.lm.in_float32)
            self.lm.model = loaded.model

    def choose(self, pipeline: Pipeline) -> float:
        """Return the coefficient of forgetting; search for it if that is not done yet."""

        def search(folder: Path) -> dict[str, object]:
            known, rows, material = pipeline.known, pipeline.rows["base"], pipeline.material
            stage_io = self._stage_io("coefficient")
            found = Search(self.lm, pipeline.facts, self.config, rows, known, material, folder, stage_io)
            choice, stage_log = found.run()
            return {"coef": choice.coef, "why": choice.why, **self._log_stage("forget", stage_log)}

        self.run.do("coefficient", pipeline.ready(search))
        self.choice = Choice.load(self._chosen / CHOICE)
        log.info(self.choice.why)
        return self.choice.coef

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict | None:
        """Return the tuned weights of the search for a coefficient; None if forgetting does not need them."""
        if self.choice is None or self.run.is_done("forget"):
            return None
        return sharding.load_parts(self.lm.model, self._chosen / WEIGHTS)

    def learned(self) -> tuple[StateDict, StageLog] | None:
        """Return the weights and the log of the best trial of the search; None if there was no search."""
        if self.choice is None:
            return None
        return sharding.load_parts(self.lm.model, self._chosen / LEARNED), read_stage_log(self._chosen / LEARNED_LOG)

    def merge(self, pipeline: Pipeline) -> None:
        """Write the base with the adapter merged into it, to the folder `merged`."""

        def compute(folder: Path) -> dict[str, object]:
            fold_in(self.lm, lora.PRODUCT)
            survival = self.lm.to_own_dtypes(self.stages.last.seed)
            self.lm.save(folder)
            return _log_rounding(survival)

        self.run.do("merge", pipeline.ready(compute), folder="merged")

    def _stage_io(self, stage: str) -> StageIO:
        config, logs = self.config, self.run.path / "logs"
        return StageIO(stage, self.run.points(stage), config.checkpoint_minutes, config.report_to, logs / "trackers")

    def _log_stage(self, stage: str, stage_log: StageLog) -> dict[str, object]:
        """Write the numbers of every step to the run folder; return a summary for the manifest."""
        logs = self.run.path / "logs"
        (logs / "seconds").mkdir(parents=True, exist_ok=True)
        disk.write_rows(logs / f"{stage}.jsonl", stage_log.steps)
        times = [{"step": step, "seconds": seconds} for step, seconds in enumerate(stage_log.seconds, 1)]
        disk.write_rows(logs / "seconds" / f"{stage}.jsonl", times)
        gist: dict[str, object] = {"steps": len(stage_log.steps), "final_loss": stage_log.final_loss}
        gist |= stage_log.batching() | {"epochs": stage_log.epochs, "unlearned": list(stage_log.unlearned)}
        if stage_log.second_moments:
            gist["second_moments"] = stage_log.second_moments
        return gist | _log_rounding(stage_log.rounding)


def _log_rounding(survival: Mapping[str, float | int | None] | None) -> dict[str, object]:
    """Log how much of the change survives the rounding of the product; return it for the manifest."""
    if survival is None:
        return {}
    log.info("%s", rounding.in_words(survival))
    if warning := rounding.warning(survival, REMEDIES):
        log.warning("%s", warning)
    return {"rounding": dict(survival)}
