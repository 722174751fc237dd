"""The layout of the package: one-way layers, and declared dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forgetlearn"
PACKAGE = "forgetlearn"
# A module imports only from its own layer and from those before it.
LAYERS = (
    "_version",
    "errors",
    "config",
    "runtime",
    "facts",
    "storage",
    "weights",
    "models",
    "training",
    "evaluation",
    "method",
    "report",
    "products",
    "planning",
    "runs",
    "comparison",
    "reproduction",
    "lab",
    "cli",
)
# Distributions whose import has another name.
IMPORTED_AS = {"pyyaml": "yaml"}
USED_BY_OTHERS = {"accelerate"}  # transformers' Trainer needs it
NOT_PINNED = {"vllm"}  # needs a GPU, and a torch of its own


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


def layer(module):
    """The layer of a module, by its path in the package or by its full name without `forgetlearn.`."""
    return LAYERS.index(module.split(".")[0].split("/")[0])


def test_the_top_level_holds_the_layers_and_nothing_else():
    inside = {path.stem if path.suffix == ".py" else path.name for path in SOURCE.iterdir()}
    assert inside - {"__pycache__", "__init__", "__main__", "py.typed"} == set(LAYERS)


def test_imports_go_down_only():
    upward = [
        f"{file.relative_to(SOURCE)} imports {name}"
        for file in sorted(SOURCE.rglob("*.py"))
        if (file.name != "__main__.py" and file.parent != SOURCE) or file.stem in LAYERS
        for name in sorted(imported(file))
        if name.startswith(f"{PACKAGE}.")
        and layer(name.removeprefix(f"{PACKAGE}.")) > layer(file.relative_to(SOURCE).with_suffix("").as_posix())
    ]
    assert not upward


def test_the_docs_name_every_package_in_order():
    text = (ROOT / "docs" / "how.md").read_text(encoding="utf-8")
    packages = [name for name in LAYERS if (SOURCE / name).is_dir()]
    assert re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE) == packages


def test_what_is_imported_is_declared_with_a_lower_bound_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {}
    extras = project["optional-dependencies"]
    imported_extras = (extras[name] for name in ("hub", "excel", "gguf", "serve", "slurm", "lm-eval", "vllm"))
    for line in [*project["dependencies"], *(line for extra in imported_extras for line in extra)]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", line).groups()
        declared[IMPORTED_AS.get(name, name)] = tuple(map(int, bound.split(".")))
    used = {name.split(".")[0] for file in SOURCE.rglob("*.py") for name in imported(file)}
    assert used - set(sys.stdlib_module_names) - {PACKAGE} == set(declared) - USED_BY_OTHERS
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    pinned = {IMPORTED_AS.get(name, name): tuple(map(int, version.split("."))) for name, version in pins.items()}
    assert all(bound <= pinned[name] for name, bound in declared.items() if name not in NOT_PINNED)
