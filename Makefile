# forgetlearn: `make demo` and `make test` do all the set-up on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo models smoke test lint audit slow faults coverage study docs package test-package test-oldest clean

install: $(VENV)/.installed

# constraints.txt pins every version that was tested; torch==2.13.0 there is found as a CPU build where
# the package index has one. For a GPU, install the torch that fits it first, or leave out -c.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("forgetlearn needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, transformers and the tools into $(VENV): some minutes, without a line"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	@$(BIN)/python tests/smollm2.py "$$FORGETLEARN_SMOLLM2" || echo "the demo's second part, with a chat model, is left out"
	$(BIN)/forgetlearn demo --output demo --overwrite \
		$$(test -f "$$FORGETLEARN_SMOLLM2/model.safetensors" && echo --model "$$FORGETLEARN_SMOLLM2")

# SmolLM2-135M-Instruct as a folder (93 MB to download, 540 MB on disk), for tests with the mark `real`.
export FORGETLEARN_SMOLLM2 ?= $(CURDIR)/models/SmolLM2-135M-Instruct
models: install
	$(BIN)/python tests/smollm2.py "$(FORGETLEARN_SMOLLM2)"

smoke: install
	$(BIN)/python -m pytest -m real -k smoke -rs

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.slow-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or real" --timeout 3600

# The default tests, and the lines and branches that they reach (docs/reliability.md); fails below 95 % of lines.
coverage: install
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --timeout 900
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage json -o - | $(BIN)/python tests/coverage_floor.py 95

# Kills, failing writes, damaged files; the last line counts them (docs/reliability.md).
faults: install
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --timeout 3600

# The study of docs/experiments.md: hours, resumable. STUDY_DATA is a folder with zsre.json and counterfact.json.
STUDY_DATA ?= ../shared/data
study: install
	$(BIN)/python bench/study.py $(STUDY_DATA) --output runs/study

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.slow-installed: $(VENV)/.docs-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[slow]"
	touch $@

# The pages into site/; a broken link or a page that is in no menu fails.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# A wheel and an sdist, in dist/.
package: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

# The wheel by itself, with the base dependencies only, in a new environment.
test-package: package
	PYTHON=$(PYTHON) tests/bare.sh dist/*.whl

# The lower bounds of pyproject.toml, except torch's: see constraints-oldest.txt.
OLDEST ?= .venv-oldest
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e . pytest pytest-timeout hypothesis
	$(OLDEST)/bin/python -m pytest tests/test_facts.py tests/test_config.py tests/test_runs.py tests/test_encoding.py \
		tests/test_checkpoints.py tests/test_arithmetic.py tests/test_taskvector.py tests/test_adapters.py \
		tests/test_method.py tests/test_scoring.py tests/test_report.py tests/test_cli.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Versions and licences of all that is installed; known holes need a network: pip-audit -r constraints.txt
audit: install
	$(BIN)/python tests/licences.py

clean:
	rm -rf $(VENV) $(OLDEST) demo dist site .pytest_cache .ruff_cache .mypy_cache .coverage .coverage.*
