"""What is shipped: the wheel's and the sdist's contents, one version, optional packages, dependency bounds."""

import ast
import io
import json
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import coverage_floor
import forgetlearn
from forgetlearn.errors import ForgetLearnError, missing_extra

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forgetlearn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEED_A_GPU = {"deepspeed", "bitsandbytes", "vllm"}  # so they are not in the set that was tested on CPUs
EXTRAS = {"excel": "openpyxl", "hub": "datasets", "slurm": "submitit", "vllm": "vllm"}  # extra -> what is imported


# Private names of other packages that are used, whose next minor may lack them; modules by their last part.
PRIVATE = {
    "openpyxl": {"_read_only"},
    "peft": {"_cast_adapter_dtype"},
    "submitit": {"_typed_parameters"},
    "torch": {
        *("_backward_hooks", "_backward_pre_hooks", "_cdata", "_forward_hooks", "_forward_pre_hooks"),
        *("_get_default_store", "_linear_pointwise", "_python_dispatch", "_pytree", "_subclasses", "_unsafe_view"),
    },
    "transformers": {
        *("_attn_implementation", "_checkpoint_conversion_mapping", "_commit_hash", "_from_config"),
        *("_keys_to_ignore_on_load_unexpected", "_load_from_checkpoint", "_mapped", "_n_gpu", "_name_or_path"),
        *("_read_metadata", "_read_tensor_table", "_save_checkpoint", "_save_optimizer_and_scheduler"),
        *("_save_rng_state", "_save_scaler", "_tied_weights_keys"),
    },
}
OF_PYTHON = {"_asdict", "_exit"}  # private by their spelling only
# Strings that begin with an underscore and name nothing of another package: a field, a key of results, parts of keys.
OWN = {"_alias", "_headers", "_stderr", "_token_id"}


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def bounds():
    for line in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", line).groups()
        yield name.lower().replace("_", "-"), bound


def test_the_wheel_holds_the_package_its_templates_its_types_and_the_licence(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (file,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(file).namelist())
    inside = {path.relative_to(ROOT / "src").as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    wanted = {name for name in inside if "__pycache__" not in name}
    assert "forgetlearn/py.typed" in wanted
    assert any(name.startswith("forgetlearn/report/templates/") for name in wanted)
    info = f"forgetlearn-{forgetlearn.__version__}.dist-info"
    assert names == wanted | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")} | {
        f"{info}/licenses/LICENSE"
    }


def test_the_sdist_holds_what_its_tests_need(tmp_path):
    sdist = pytest.importorskip("hatchling.builders.sdist")
    (file,) = sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(file) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/commands.md", "bench/common.py", "mkdocs.yml"} <= names
    assert "configs/paper/zsre-bloom-7b.yaml" in names
    assert {"CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "LICENSE", "Makefile"} <= names
    assert {"constraints.txt", "constraints-oldest.txt", "pyproject.toml", "examples/demo.ipynb"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".pyc"))]


def test_the_version_stands_in_one_place_and_the_citation_agrees():
    assert PROJECT["dynamic"] == ["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == forgetlearn.__version__
    assert cited["license"] == PROJECT["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["identifiers"] == [{"type": "other", "value": "arXiv:2311.08011"}]
    assert f"## {forgetlearn.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def optional_imports(file):
    """Packages that are imported inside a `try` whose handler catches ImportError, and whether it names an extra."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type or h) for h in node.handlers):
            names = [a.name for n in node.body if isinstance(n, ast.Import) for a in n.names]
            yield from ((name.split(".")[0], ast.unparse(node.handlers[0])) for name in names)


def test_every_optional_import_says_how_to_install_it():
    every = dict(item for file in SOURCE.rglob("*.py") for item in optional_imports(file))
    found = {package: handler for package, handler in every.items() if package not in sys.stdlib_module_names}
    assert set(found) == set(EXTRAS.values())
    for extra, package in EXTRAS.items():
        assert "missing_extra(" in found[package]
        assert f"'{extra}'" in found[package]
        assert any(line.startswith(f"{package}>=") for line in PROJECT["optional-dependencies"][extra])


def test_the_message_for_a_missing_extra():
    error = missing_extra("A data set", "hub", ImportError("No module named 'datasets'"))
    assert isinstance(error, ForgetLearnError)
    assert isinstance(error, ImportError)
    assert str(error) == (
        "A data set: No module named 'datasets'. Install what that needs: pip install 'forgetlearn[hub]'"
    )


def test_the_oldest_set_is_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    for name, bound in bounds():
        if name == "torch":  # its lower bound has no CPU build on the usual index: see constraints-oldest.txt
            continue
        assert oldest[name] == bound or oldest[name] == f"{bound}.0", name


def private_names():
    """Names with one leading underscore that the package uses but does not define."""
    defined, used = set(), set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    defined.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                    used.add(name)
                case ast.ImportFrom(module=str(module), names=names) if not module.startswith(PROJECT["name"]):
                    used |= {*module.split("."), *(alias.name for alias in names)}
    return {name for name in used if re.fullmatch(r"_[A-Za-z]\w*", name)}, defined


def test_packages_whose_private_parts_are_used_have_an_upper_bound_of_a_tested_minor():
    used, defined = private_names()
    listed = set().union(*PRIVATE.values())
    assert used - defined == listed - defined | OF_PYTHON | OWN
    assert listed <= used | defined
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    pinned = pins("constraints.txt")
    for package in PRIVATE:
        major, minor = pinned[package].split(".")[:2]
        own = [line for line in lines if re.match(r"[\w-]+", line).group() == package]
        assert own, package
        assert [line for line in own if not line.endswith(f",<{major}.{int(minor) + 1}")] == [], package


def test_every_dependency_of_an_extra_is_pinned():
    pinned = pins("constraints.txt")
    for name, lines in PROJECT["optional-dependencies"].items():
        for line in lines:
            package = re.match(r"[\w-]+", line).group().lower().replace("_", "-")
            assert package in pinned or package in {PROJECT["name"], *NEED_A_GPU}, f"{name}: {package}"


@pytest.mark.parametrize(("floor", "status"), [("95", 0), ("95.1", 1)])
def test_the_floor_of_coverage_is_of_lines_alone(floor, status, monkeypatch, capsys):
    summary = {"num_statements": 100, "covered_lines": 95, "num_branches": 40, "covered_branches": 0}
    files = {"a.py": summary, "b.py": summary | {"covered_lines": 10}, "empty.py": dict.fromkeys(summary, 0)}
    found = {"totals": summary, "files": {name: {"summary": own} for name, own in files.items()}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(found)))
    assert coverage_floor.main([floor]) == status
    *listed, total = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in listed] == ["b.py", "a.py", "empty.py"]
    assert total.startswith("95.0 % of 100 lines, 0.0 % of 40 branches")


def test_python_is_new_enough():
    assert sys.version_info >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
