# Every target does its own set-up: a virtual environment in .venv with the package installed editable.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRAINS := $(VENV)/.trains
DEMO_OPTIONS ?=
QUICK := tests/test_contract.py tests/test_injections.py tests/test_net_contract.py tests/test_wires.py tests/test_sequential.py tests/test_registry.py tests/test_nets.py \
	tests/test_psi.py tests/test_elementwise.py tests/test_flow.py tests/test_docs.py tests/spec/test_errors.py \
	tests/spec/test_versions.py tests/golden

.DEFAULT_GOAL := help
.PHONY: help demo test quick count lint format docs bench proof clean

help:  ## what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A new pyproject.toml installs again; an interrupted installation leaves no stamp. What tests need is enough for all.
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

$(TRAINS): pyproject.toml
	@echo "installing invflow with PyTorch and Lightning into $(VENV): minutes, this once"
	@$(INSTALL) '.[train]'
	@touch $(TRAINS)

$(READY): pyproject.toml
	@echo "installing invflow with all that tests, documentation and benchmarks need into $(VENV): minutes, this once"
	@$(INSTALL) '.[train,test,lint,docs,bench]'
	@touch $(TRAINS) $(READY)

demo: $(TRAINS)  ## train an i-RevNet on handwritten digits, run it backwards, draw it
	$(BIN)/invflow train specs/irevnet_digits.json $(DEMO_OPTIONS)

test: $(READY)  ## all tests, doctests included
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

quick: $(READY)  ## a minute of tests: the contract, wires, specs, what 0.1 wrote
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(QUICK)

count:  ## lines of code of the package, without blank lines, comments and docstrings
	@$(PYTHON) .ci/count.py

lint: $(READY)  ## style, types, and the floors that imports keep to
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(READY)  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the schema and the pages, into site/ (begin at site/index.html)
	$(BIN)/invflow schema > docs/spec.schema.json
	$(BIN)/python -m pytest --quiet --numprocesses 2 invflow  # the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs site  # small tensors: threads cost more

bench: $(READY)  ## speed against hand-written PyTorch and FrEIA
	$(BIN)/python benchmarks/overhead.py

proof: $(READY)  ## the worst value of every property of every bijection, into docs/proof.md
	$(BIN)/python -m invflow.testing.proof | tee docs/proof.md

clean:  ## forget what was made, the virtual environment too
	rm -rf $(VENV) site jupyter_execute docs/generated docs/downloads .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
