# Every target does its own set-up: a virtual environment in .venv with the package installed editable.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench proof clean

help:  ## what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A new pyproject.toml installs again; an interrupted installation leaves no stamp.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,test,lint,docs,bench]'
	touch $(READY)

demo: $(READY)  ## train an i-RevNet on handwritten digits, run it backwards, draw it
	$(BIN)/invflow train specs/irevnet_digits.json $(DEMO_OPTIONS)

test: $(READY)  ## all tests, doctests included
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(READY)  ## style, types, and the floors that imports keep to
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(READY)  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the schema and the pages, into site/
	$(BIN)/invflow schema > docs/spec.schema.json
	$(BIN)/mkdocs build --quiet --config-file .ci/mkdocs.yml

bench: $(READY)  ## speed against hand-written PyTorch and FrEIA
	$(BIN)/python benchmarks/overhead.py

proof: $(READY)  ## the worst value of every property of every bijection, into docs/proof.md
	$(BIN)/python -m invflow.testing.proof | tee docs/proof.md

clean:  ## forget what was made, the virtual environment too
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
