"""Study whether forgetting first helps, and which forgetting: compare, tabulate and plot every base of the config.

    python bench/study.py ../shared/data --output runs/study [--only zsre-tied] [--tables] [--config FILE]

Resumable: finished cells are not run again. Each part has one folder of `forgetlearn compare` per base. At the end, the
program writes two kinds of files about everything finished in the output folder, even what this call did not ask for;
`--tables` only writes these. study.md has, for each protocol, the paired differences of each row to plain fine-tuning,
and of the chosen row to every other row, with 95 % intervals. study-PART.svg has a panel per base, with a trade-off
curve over epochs for each row.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import fill
from forgetlearn.config.base import validate
from forgetlearn.config.schema import load_config
from forgetlearn.facts import FactSet, read_facts
from forgetlearn.lab.build import LabSettings, build_lab
from forgetlearn.storage import disk, run_folder
from study_tables import Row, plot, read_rows, tables

ROOT = Path(__file__).parents[1]
HEAD = """# The tables of the study

`bench/study.py DATA --output DIR --tables` makes this file from the comparisons of `make study`; docs/experiments.md
explains the rows and says what they show. Cells are differences in points with 95 % intervals over new seeds and new
facts (at equal reliability: over seeds), bold where the interval excludes zero. *Minus plain* means minus `ft`, or
minus `lora` for methods that learn with LoRA; the line of `ft` or `lora` itself has its scores in percent. Each table
is named after the first part of configs/study/study.yaml on that base and also has the rows of later parts on it."""


@dataclass(frozen=True)
class Base:
    """One lab base, and the facts that it is updated with."""

    file: str
    tied: bool
    part: str
    start: int
    limit: int
    seed: int
    lab: tuple[tuple[str, Any], ...] = ()  # settings of the base other than the usual ones
    device: str = "cpu"  # where it is built: on the CPU the same one on every machine

    @property
    def name(self) -> str:
        return f"{Path(self.file).stem}-{'tied' if self.tied else 'untied'}-{self.part}"

    @property
    def same(self) -> tuple[Any, ...]:
        """The fields that are equal for all parts with the same base."""
        return self.file, self.tied, self.start, self.limit, self.seed, self.lab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the files of facts")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "study" / "study.yaml")
    parser.add_argument("--only", default="", help="fill the base of this name, else those whose name holds it")
    parser.add_argument("--tables", action="store_true", help="fill nothing")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    study = read_study(args.config)
    bases = list(bases_of(study))
    wanted = named(bases, args.only)
    if not wanted:
        parser.error(f"--only {args.only}: no base of {args.config} has this in its name")
    for base in wanted if not args.tables else []:
        print(base.name, flush=True)
        compared(base, study, args.data, args.output / base.name, args.workers)
    done = rows_of(bases, study, args.output)
    texts = {name: tables(rows, study["chosen"], study["names"]) for name, rows in done.items()}
    text = "\n\n".join([HEAD, *(f"## {name}\n\n{text}" for name, text in texts.items())])
    disk.write_text(args.output / "study.md", text + "\n")
    for part, panels in itertools.groupby(done.items(), key=lambda item: item[0].rpartition("-")[2]):
        plot(dict(panels), args.output / f"study-{part}.svg", study["plotted"], study["names"])
    print(text)


def read_study(file: Path) -> dict[str, Any]:
    """Read a config of the study. Sections that it lacks come from the file that `extends` names."""
    study: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return read_study(file.parent / study["extends"]) | study if "extends" in study else study


def bases_of(study: Mapping[str, Any]) -> Iterator[Base]:
    for part, own in study["parts"].items():
        for file, tied in itertools.product(study["files"], own.get("tied", study["tied"])):
            lab = tuple(own.get("lab", {}).items())
            yield Base(file, tied, part, **own["facts"], seed=own["base_seed"], lab=lab, device=study["device"])


def named(bases: list[Base], name: str) -> list[Base]:
    """Return the base with this name, else all bases whose names contain it."""
    return [base for base in bases if name == base.name] or [base for base in bases if name in base.name]


def rows_of(bases: list[Base], study: Mapping[str, Any], output: Path) -> dict[str, dict[str, Row]]:
    """Return the rows of all finished parts of each base, by the name that the base has in its first part."""
    folders: dict[tuple[Any, ...], dict[Path, str]] = {}
    for base in bases:
        if run_folder.is_run(output / base.name):
            suffix = study["parts"][base.part].get("label", "")
            folders.setdefault(base.same, {})[output / base.name] = suffix
    return {next(iter(own)).name: rows for own in folders.values() if (rows := read_rows(own))}


def lab_of(base: Base, data: Path) -> tuple[Path, FactSet]:
    """Return the folder of the base, which is built if it does not exist, and the facts to update."""
    whole = read_facts(data / base.file)
    facts = replace(whole, facts=whole[base.start : base.start + base.limit])
    settings = LabSettings(seed=base.seed, tie_word_embeddings=base.tied, **dict(base.lab))
    return build_lab(facts, settings, vocabulary_from=whole, device=base.device), facts


def compared(base: Base, study: Mapping[str, Any], data: Path, output: Path, workers: int) -> None:
    """Fill the comparison of one base."""
    part = study["parts"][base.part]
    folder, facts = lab_of(base, data)
    config = load_config(folder / "update.yaml", study["update"] | part["update"])
    variants = part["variants"].get("tied" if base.tied else "untied", {})
    settings = validate(CompareSettings, part["compare"] | {"variants": variants})
    fill(folder, facts, settings, config, output=output, resume=output.exists(), workers=workers)


if __name__ == "__main__":
    main()
