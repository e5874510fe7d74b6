# Each target calls one tool in the environment, which is created with pinned versions if it is missing.
# `demo` installs only what serving and its model need; the other targets install everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export A2SF_DATA_DIR ?= $(abspath ../shared/data)

.DEFAULT_GOAL := help
.PHONY: help demo real-model test test-slow image-test check format bench bench-gpu findings refit tables proto contract clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

INSTALL = $(BIN)/python -m pip install --constraint constraints.txt --editable

$(BIN)/pip:
	@echo 'Creating an environment in $(VENV).'
	@$(PYTHON) -m venv $(VENV)

# The environment for development contains everything that serving needs.
$(BIN)/.serve: pyproject.toml constraints.txt | $(BIN)/pip
	@if [ -e $(BIN)/.installed ] && ! [ pyproject.toml -nt $(BIN)/.installed ] \
	  && ! [ constraints.txt -nt $(BIN)/.installed ]; then exit 0; fi; \
	  echo 'Installing the service into $(VENV), mostly PyTorch: some minutes.'; \
	  $(INSTALL) '.[serve,gguf]'
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing everything for development into $(VENV): some minutes.'
	@$(INSTALL) '.[dev]'
	@touch $@

demo: $(BIN)/.serve ## Ask a real model under a full cache, a window and a fitted table
	@$(BIN)/python -m scripts.demo

real-model: $(BIN)/.installed ## Download SmolLM2-135M-Instruct (93 MB) to build/real/smollm2
	$(BIN)/python -m scripts.real_model

# One worker for each core (WORKERS=1 for one only). Each worker, and each server that it starts, has
# one compute thread. All tests of a file run in one worker, so the file starts or loads things once.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: $(BIN)/.installed ## Run the fast tests on all cores
	$(PYTEST)

test-slow: $(BIN)/.installed ## Run the slow tests on all cores
	$(PYTEST) -m slow

image-test: $(BIN)/.installed ## Build both images and run them; as root, with buildah, mmdebstrap and runc
	$(BIN)/python -m scripts.image_test

check: $(BIN)/.installed ## Lint, check formats, types, the contract, the container files and the manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/released.binpb
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/python scripts/validate_manifests.py

format: $(BIN)/.installed ## Format the code and the contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write proto

bench: $(BIN)/.installed ## Measure decoding and prefill beside peers, evaluation, and the service; results in benchmarks/results
	$(BIN)/python -m benchmarks.grid
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.prefill
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.waiting

bench-gpu: $(BIN)/.installed ## Check on a GPU, then measure beside peers for ten minutes; results in benchmarks/results
	$(BIN)/python -m benchmarks.gpu

findings: $(BIN)/.installed ## Measure the figures of benchmarks/FINDINGS.md again, and compare
	$(BIN)/python -m benchmarks.findings --check

refit: $(BIN)/.installed ## Fit the shipped table again, after the reference model has changed
	rm -rf build/refit && mkdir -p build/refit a2sf/reference/tables
	$(BIN)/python -m tuner --dataset mathqa --out build/refit/mathqa.json
	cp build/refit/mathqa.json a2sf/reference/tables/

tables: $(BIN)/.installed ## Fit the tables of the findings
	mkdir -p build/tables
	for name in recall state; do \
	  $(BIN)/python -m tuner --dataset $$name --out build/tables/$$name.json \
	    --examples 32 --holdout 96 && cp build/tables/$$name.json benchmarks/tables/ || exit 1; \
	done

proto: $(BIN)/.installed ## Generate service/pb and the table's JSON Schema again
	$(BIN)/python scripts/generate_proto.py
	$(BIN)/python scripts/export_schema.py

contract: $(BIN)/.installed ## Record the contract as released: from then on, fields can only be added
	$(BIN)/buf build proto --exclude-source-info --output proto/released.binpb

clean: ## Remove the environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
