"""Structure: every field of every JSON that comes from outside, changed in every way, through what reads it.

No traceback, no hang, nothing written but the output: a result, or an error that says what is wrong.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from markupsafe import Markup

import forgetlearn
from comparison_folder import make_comparison
from conftest import QUICK
from faults.structure import (
    NESTED,
    REMOVED,
    Case,
    Counts,
    Place,
    Reader,
    Target,
    attempt,
    cases,
    seal_chain,
    seal_run,
)
from forgetlearn.comparison.grid import CELLS, CompareSettings
from forgetlearn.models import language_model, loading
from forgetlearn.products import chain
from forgetlearn.report import plots, render
from forgetlearn.storage import disk, run_folder
from forgetlearn.weights import adapter_files
from written_by_hand import MEAN

FEW, MANY = 100, 20_000
CELL = f"compared/{CELLS}/f-ft-coef0.5-3epochs-seed0"


@pytest.fixture(scope="module", autouse=True)
def without_waiting():
    """Without plots, which take most of the time of a page (what they read is read all the same), and without fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        patch.setattr(plots, "_svg", lambda _figure, _name, words: Markup("<title>{}</title>").format(words))
        patch.setattr(plots, "_figure", lambda *_size: (None, _Axes()))
        yield


class _Axes:
    """Takes whatever is drawn."""

    def __getattr__(self, _name):
        return self

    def __call__(self, *_args, **_options):
        return self

    def __getitem__(self, _key):
        return self

    def __iter__(self):
        return iter(())


@pytest.fixture(scope="module")
def root(tmp_path_factory, without_waiting, tiny_model, char_tokenizer) -> Path:
    """A folder with `base` (two shards), `whole` and `lora` (runs whose records have every field), `compared`."""
    folder = tmp_path_factory.mktemp("structure")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "base", max_shard_size="40KB")
    char_tokenizer.save_pretrained(folder / "base")
    rows = [
        {
            "prompt": f"Who leads {n}?",
            "target_new": f"Ada {n}",
            "ground_truth": "Sam",
            "rephrase_prompts": [f"The head of {n} is"],
            "locality": [{"prompt": "Far is", "answer": "away"}],
        }
        for n in range(2)
    ]
    disk.write_rows(folder / "facts.jsonl", rows)
    facts = folder / "facts.jsonl"
    more = {"evaluate": {"protocols": ["token"], "every_phase": False, "general_prompts": False}}
    forgetlearn.update(folder / "base", facts, {"method": "f-ft", **QUICK, **more}, output=folder / "whole")
    forgetlearn.update(folder / "base", facts, {"method": "f-lora", **QUICK, **more}, output=folder / "lora")
    for name in ("whole", "lora"):
        _fill_in(folder / name)
    make_comparison(folder / "compared", CompareSettings(methods=("ft", "f-ft"), coefs=(0.5,), seeds=(0,)), 3)
    return folder


def _fill_in(run: Path) -> None:
    """Give a run's summary the fields that only some runs have."""
    summary = disk.read_json(run / "summary.json")
    summary["facts"] |= {"set_aside": 0, "scored": 2, "left_out": {"no_new_answer": 1}, "not_read": ["colour"]}
    trial = {"coef": 0.3, "scores": {"reliability": 50.0, "generality": None, "locality": 90.0}}
    summary["choice"] = {"coef": 0.3, "search": "grid", "validation": ["a"], "trials": [trial], "why": "It was best."}
    summary["rounding"] = {"share_changed": 0.9, "share_survived": 0.8, "looked_at": 100}
    text = {"source": "t.txt", "sha256": "0", "tokens": 9, "windows": 2, "loss": 1.0, "loss_low": 0.5, "loss_high": 2.0}
    text |= {"kl": 0.1, "kl_low": 0.0, "kl_high": 0.2, "perplexity": 2.7}
    answer = {"prompt": ["Hi", "Hello", "Who?"], "said": "Me", "truncated": True, "before": "Who", "tokens": 2}
    answers = [answer | {"agreement": 0.5, "kl": 0.2, "error": None}, {"prompt": "Who?", "error": "too long"}]
    prompts = {"asked": 2, "compared": 1, "tokens": 2, "agreement": 50.0, "agreement_low": None, "agreement_high": None}
    general = {
        "prompts": {**prompts, "kl": 0.2, "kl_low": 0.1, "kl_high": 0.3, "answers": answers},
        "text": text,
        "tasks": {"arc": {"acc": {"value": 0.5, "stderr": 0.1}, "f1": {"value": 0.5, "stderr": None}}},
    }
    summary["general"] = {"base": general, "updated": general}
    summary["lessons"] = {"learn": {"how": {"sentence": 1, "bare": 1}, "bare_because": {"it says more": 1}}}
    summary |= {"kept": {"general prompts": 54}, "rephrasings_trained": True}
    fact = next(iter(disk.read_rows(run / "inputs.jsonl")))
    summary["learning"] = {"epochs": 9, "unlearned": {fact["id"]: fact["prompt"]}}
    taught = {"fact": fact["id"], "stage": "learn", "prompt": fact["prompt"], "text": "It is Ada.", "how": "sentence"}
    disk.write_rows(run / "lessons.jsonl", [taught | {"why": ""}])
    told = {"when": "now", "source": "f.jsonl", "facts": 4, "superseded": 0, "scores": {"token": MEAN}}
    summary["retention"] = [{"update": 1, **told}, {"update": 2, **told}]
    summary["phases"]["updated"]["retention"] = {"token": MEAN}
    disk.write_json(run / "summary.json", summary)
    run_folder.RunFolder.open(run).finish()


def targets() -> list[Target]:
    render = ("report.md", "report.html")
    found = []
    for run in ("whole", "lora"):
        report = Reader("report", ("report", f"{{root}}/{run}"), tuple(f"{run}/{page}" for page in render))
        undo, log = Reader("undo", ("undo", f"{{root}}/{run}")), Reader("log RUN", ("log", f"{{root}}/{run}"))
        out = ("--output", "{root}/out")
        save = Reader("save", ("save", f"{{root}}/{run}", "--base-model-id", "org/base", *out), ("out",))
        apply = Reader("apply", ("apply", f"{{root}}/{run}", "--base", "{root}/base", *out), ("out",))
        inspect = Reader("inspect", ("inspect", f"{{root}}/{run}"))
        every, seal = (report, undo, log, save, apply, inspect), seal_run(run)
        strict = ("report", "undo", "save", "apply")
        found += [
            Target(f"{run}/manifest.json", every, seal, None, _bad_manifest, strict, ("plan", "results", "files")),
            Target(f"{run}/summary.json", (report, undo, log, save, apply), seal, None, _bad_summary, strict),
            Target(f"{run}/facts.jsonl", (report, undo), seal, 0, _bad_row, ("report",)),
            Target(f"{run}/inputs.jsonl", (report,), seal, 0, _bad_input, ("report",)),
            Target(f"{run}/lessons.jsonl", (report,), seal, 0, _bad_lesson, ("report",)),
            Target(f"{run}/logs/learn.jsonl", (report,), seal, 0, _bad_step, ("report",)),
        ]
    product = "whole/model"
    logs = [
        Reader(f"log {' '.join(flags)}", ("log", f"{{root}}/{product}", *flags))
        for flags in ([], ["--verify"], ["--json"])
    ]
    checked = Reader("update on top", lambda root: chain.check_product(root / product, ".safetensors"))
    save = Reader("save", ("save", "{root}/whole", "--base-model-id", "org/base", "--output", "{root}/out"), ("out",))
    found.append(
        Target(
            f"{product}/forgetlearn.json",
            (*logs, checked, save),
            seal_chain(product),
            None,
            _bad_chain,
            ("log ", "save"),
        )
    )
    render = ("report.md", "report.html", "compare.json", "compare.md")
    table = Reader(
        "report on a comparison", ("report", "{root}/compared"), tuple(f"compared/{page}" for page in render)
    )
    for file, row, bad in (
        ("manifest.json", None, None),
        ("summary.json", None, None),
        ("facts.jsonl", 0, _bad_row),
        ("inputs.jsonl", 0, _bad_input),
    ):
        refuse = bad or (lambda _place, _value: False)
        found.append(Target(f"{CELL}/{file}", (table,), seal_run(CELL), row, refuse, (table.name,), ("config",)))
    found.append(Target("compared/manifest.json", (table,), seal_run("compared"), skip=("run",)))
    return found


def files_of_models() -> list[Target]:
    """The files of models, adapters and tokenizers: mended beside the readers of models."""
    out = ("--output", "{root}/out")
    adapter = ("--adapter", "{root}/lora/adapter")
    subtract = Reader("subtract", ("subtract", "--base", "{root}/base", *adapter, "--coef", "0.5", *out), ("out",))
    tuned = ("--tuned", "{root}/whole/model", "--coef", "0.5")
    moved = Reader("subtract --tuned", ("subtract", "--base", "{root}/base", *tuned, *out), ("out",))
    inspect = Reader("inspect", ("inspect", "{root}/lora/adapter", "--base", "{root}/base"))
    load = Reader("load an adapter", lambda root: language_model.load_model(root / "lora/adapter"))
    config = Reader("config of an adapter", lambda root: adapter_files.read_adapter_config(root / "lora/adapter"))
    model = Reader("load", lambda root: language_model.load_model(root / "base"))
    outline = Reader(
        "outline", lambda root: loading.read_outline(language_model.ModelSettings(name=str(root / "base")))
    )
    return [
        Target(
            "lora/adapter/adapter_config.json",
            (subtract, inspect, load, config),
            None,
            None,
            _bad_adapter,
            ("subtract", "load an adapter"),
        ),
        Target("base/config.json", (model, outline, moved), None, None, _bad_config, ("load",)),
        Target("base/model.safetensors.index.json", (model, moved), None, None, _bad_index, ("load", "subtract")),
        Target("base/tokenizer_config.json", (model, outline)),
    ]


# What nobody may read as if nothing were wrong ----------------------------------------------------


def is_text(value: object) -> bool:
    return isinstance(value, str) and value not in NESTED and value != "\ud800"


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**15


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e12


def bad(place: Place, value: object, table: dict[str, object]) -> bool:
    """Whether a value that a table of places (`*` is any part) speaks of is not what it wants there."""
    for pattern, wanted in table.items():
        parts = pattern.split(".")
        if len(parts) == len(place) and all(p in ("*", str(own)) for p, own in zip(parts, place, strict=True)):
            return value is REMOVED or not wanted(value)
    return False


def _bad_manifest(place: Place, value: object) -> bool:
    fits = {"command": lambda v: v == [], "config": lambda _: False, "machine": is_text, "versions.*": is_text}
    fits |= {
        "inputs": lambda v: v == {} or v == {"a": 1},
        "stages": lambda v: v == {},
        "stages.*": lambda v: v in ({}, {"a": 1}),
    }
    fits |= {"config.teach.epochs": is_count, "config.model": lambda _: False, "config.facts": lambda _: False}
    fits |= {"config.model.name": lambda v: v is None or is_text(v), "command.*": lambda v: is_text(v)}
    if place[:1] == ("command",) and value is REMOVED and len(place) > 1:
        return False
    if place[:1] in (("versions",),) and value is REMOVED and len(place) > 1:
        return False
    return bad(place, value, fits) and not (len(place) == 2 and place[0] == "stages" and value is REMOVED)


def _bad_summary(place: Place, value: object) -> bool:
    fits: dict[str, object] = dict.fromkeys(("method", "facts.source", "facts.reader", "facts.old_from"), is_text)
    fits |= dict.fromkeys(("seed", "facts.read", "facts.used", "phases.*.*.*.n", "phases.*.*.*.not_asked"), is_count)
    fits |= {
        "phases": lambda v: v == {},
        "facts": lambda _: False,
        "choice.why": is_text,
        "retention.*.update": is_count,
    }
    fits |= {"phases.*.*.*.mean": lambda v: is_number(v) and 0 <= v <= 100}
    return bad(place, value, fits)


def _bad_row(place: Place, value: object) -> bool:
    fits: dict[str, object] = dict.fromkeys(("fact", "phase", "protocol"), is_text)
    fits |= {"errors": lambda v: v == {}}
    return bad(place, value, fits)


def _bad_lesson(place: Place, value: object) -> bool:
    return bad(place, value, dict.fromkeys(("fact", "stage", "how"), is_text))


def _bad_input(place: Place, value: object) -> bool:
    return bad(place, value, dict.fromkeys(("id", "prompt"), is_text))


def _bad_step(place: Place, value: object) -> bool:
    return bad(place, value, {"step": is_count, "loss": is_number})


def _bad_chain(place: Place, value: object) -> bool:
    names = ("when", "method", "facts.source", "facts.sha256", "product")
    fits: dict[str, object] = {f"updates.*.{name}": is_text for name in names}
    fits |= {"updates": lambda v: v == [], "updates.*": lambda _: False, "updates.*.seed": is_count}
    fits |= {
        "updates.*.facts": lambda _: False,
        "updates.*.files.*": is_text,
        "updates.*.taught_first": lambda v: v is True,
    }
    removed = value is REMOVED and (len(place) == 2 or place[2:3] == ("files",))
    return bad(place, value, fits) and not removed


def is_switch(value: object) -> bool:
    return isinstance(value, bool)


def is_list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _bad_adapter(place: Place, value: object) -> bool:
    """By the kinds of peft's own fields; what is left out or null is peft's default, but for the kind of adapter."""
    if place != ("peft_type",) and (value is REMOVED or value is None):
        return False
    counts = is_list_of(is_count)
    fits: dict[str, object] = {"peft_type": lambda _: False, "r": lambda _: False, "lora_alpha": is_number}
    fits |= dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"), is_switch)
    fits |= dict.fromkeys(("ensure_weight_tying", "inference_mode"), is_switch)
    fits |= dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), is_text)
    fits |= {name: lambda v: is_text(v) or is_list_of(is_text)(v) for name in ("target_modules", "exclude_modules")}
    fits |= {name: is_list_of(is_text) for name in ("modules_to_save", "target_parameters")}
    fits |= {"lora_dropout": lambda v: is_number(v) and 0 <= v < 1, "qalora_group_size": is_count}
    fits |= {"layers_to_transform": lambda v: is_count(v) or counts(v), "alora_invocation_tokens": counts}
    fits |= {name: lambda v: isinstance(v, dict) for name in ("rank_pattern", "alpha_pattern", "auto_mapping")}
    return bad(place, value, fits)


def _bad_config(place: Place, value: object) -> bool:
    if value != value:  # NaN
        return len(place) == 1
    if value is REMOVED and place != ("model_type",):
        return False  # transformers has a default, and the tensors tell whether it fits
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    fits: dict[str, object] = dict.fromkeys((*sizes, "model_type", "hidden_act"), lambda _: False)
    fits |= dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), is_switch)
    fits |= {"num_hidden_layers": lambda v: v == 0, "rms_norm_eps": lambda v: isinstance(v, float)}
    return bad(place, value, fits)


def _bad_index(place: Place, value: object) -> bool:
    return bad(place, value, {"weight_map": lambda _: False, "weight_map.*": lambda _: False})


# Trials -------------------------------------------------------------------------------------------


def try_cases(root: Path, chosen: list[Case], tally) -> Counts:
    counts = Counts()
    with tally.no_loss() as lost:
        for case in chosen:
            attempt(root, case, counts)
        tally.add("changed fields", len(chosen))
        lost += counts.lost
    return counts


def test_files_as_they_were_written_are_read(root):
    readers = {
        (reader.name, str(reader.act)): reader
        for target in (*targets(), *files_of_models())
        for reader in target.readers
    }
    for reader in readers.values():
        assert reader.run(root) == 0, reader.name
        for own in reader.writes:
            if (root / own).is_dir():
                shutil.rmtree(root / own)


def test_some_changed_fields_of_records(root, tally):
    counts = try_cases(root, random.Random(0).sample(cases(root, targets()), FEW), tally)
    assert counts.read > FEW // 20
    assert counts.refused > FEW // 4


def test_some_changed_fields_of_files_of_models(root, tally):
    try_cases(root, random.Random(0).sample(cases(root, files_of_models()), FEW // 4), tally)


@pytest.mark.parametrize(
    ("file", "place", "value", "reader"),
    [
        ("compared/manifest.json", ("commit",), "removed", "report on a comparison"),
        ("compared/manifest.json", ("config", "run"), "empty object", "report on a comparison"),
        ("whole/summary.json", ("facts", "not_read", 0), "long text", "report"),
        ("whole/summary.json", ("rounding", "share_changed"), "null", "report"),
        ("lora/adapter/adapter_config.json", ("use_qalora",), "fraction", "load an adapter"),
        ("base/config.json", ("attention_dropout",), "not a number", "load"),
        ("whole/model/forgetlearn.json", ("updates", 0, "modules"), "object", "log --verify"),
    ],
)
def test_what_was_lost_once(root, tally, file, place, value, reader):
    target = next(target for target in (*targets(), *files_of_models()) if target.file == file)
    reader = next(own for own in target.readers if own.name == reader)
    try_cases(root, [Case(target, reader, place, value)], tally)


def test_a_long_word_does_not_take_the_square_of_its_length():
    start = time.process_time()
    render._cell("x" * 500_000)
    assert time.process_time() - start < 8  # 4 minutes, if it did


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_field_of_every_record_changed_in_every_way(root, tally):
    found = cases(root, targets())
    assert len(found) >= MANY
    try_cases(root, found, tally)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_field_of_files_of_models_changed_in_every_way(root, tally):
    try_cases(root, cases(root, files_of_models()), tally)
