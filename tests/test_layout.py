"""The picture in docs/how.md is the layout of the package: every module once, imports going up only."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forgetlearn"
PACKAGE = "forgetlearn"
# Distributions whose import has another name.
IMPORTED_AS = {"pyyaml": "yaml"}
USED_BY_OTHERS = {"accelerate"}  # transformers' Trainer needs it
NOT_PINNED = {"vllm"}  # needs a GPU, and a torch of its own


def picture():
    """Module names in the order of docs/how.md."""
    text = (ROOT / "docs" / "how.md").read_text(encoding="utf-8")
    return re.findall(r"^      (\w+)\.py  ", text, flags=re.MULTILINE)


def imported(file):
    """Every module that a file imports anywhere in it, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_of_the_package(file):
    """Names of the package's own modules that a file imports; the package itself gives only `__version__`."""
    own = {name.split(".")[1] for name in imported(file) if name.startswith(f"{PACKAGE}.")}
    return own & {path.stem for path in SOURCE.glob("*.py")}


def test_the_picture_shows_every_module_once():
    there = {path.stem for path in SOURCE.glob("*.py")}
    assert len(there) > 20
    assert sorted(picture()) == sorted(there)


def test_each_module_imports_only_what_stands_above_it():
    order = picture()
    down = [
        f"{name} imports {other}"
        for place, name in enumerate(order)
        for other in sorted(modules_of_the_package(SOURCE / f"{name}.py"))
        if name != "__init__" and order.index(other) >= place
    ]
    assert not down


def test_what_is_imported_is_declared_with_a_lower_bound_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {}
    extras = project["optional-dependencies"]
    imported_extras = (extras[name] for name in ("hub", "excel", "slurm", "lm-eval", "vllm"))
    for line in [*project["dependencies"], *(line for extra in imported_extras for line in extra)]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", line).groups()
        declared[IMPORTED_AS.get(name, name)] = tuple(map(int, bound.split(".")))
    used = {name.split(".")[0] for file in SOURCE.glob("*.py") for name in imported(file)}
    assert used - set(sys.stdlib_module_names) - {PACKAGE} == set(declared) - USED_BY_OTHERS
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    pinned = {IMPORTED_AS.get(name, name): tuple(map(int, version.split("."))) for name, version in pins.items()}
    assert all(bound <= pinned[name] for name, bound in declared.items() if name not in NOT_PINNED)
