# Thin: each target calls one tool with the pinned environment, which is made when it is missing.
# `demo` installs into it what serving and its model need, the other targets the rest as well.
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
	@echo 'Making an environment in $(VENV).'
	@$(PYTHON) -m venv $(VENV)

# What is developed with brings all that serving needs.
$(BIN)/.serve: pyproject.toml constraints.txt | $(BIN)/pip
	@if [ -e $(BIN)/.installed ] && ! [ pyproject.toml -nt $(BIN)/.installed ] \
	  && ! [ constraints.txt -nt $(BIN)/.installed ]; then exit 0; fi; \
	  echo 'Installing what serving needs into $(VENV): PyTorch for the most part, some minutes.'; \
	  $(INSTALL) '.[serve,gguf]'
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing all that this project is developed with into $(VENV): some minutes.'
	@$(INSTALL) '.[dev]'
	@touch $@

demo: $(BIN)/.serve ## Ask a real model under a full cache, a window and a fitted table
	@$(BIN)/python -m scripts.demo

real-model: $(BIN)/.installed ## Fetch a small model that people use (93 MB) to build/real/smollm2
	$(BIN)/python -m scripts.real_model

# A worker for each core (WORKERS=1 for one alone), each with one compute thread, as the servers that
# its tests start. A file stays with one worker, so what the file starts or loads is so once.
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

findings: $(BIN)/.installed ## Measure what benchmarks/FINDINGS.md says again, and compare
	$(BIN)/python -m benchmarks.findings --check

refit: $(BIN)/.installed ## Fit the shipped table again, after the reference model has changed
	rm -rf build/refit && mkdir -p build/refit a2sf/reference/tables
	$(BIN)/python -m tuner --dataset mathqa --out build/refit/mathqa.json
	cp build/refit/mathqa.json a2sf/reference/tables/

tables: $(BIN)/.installed ## Fit the tables that the findings look at
	mkdir -p build/tables
	for name in recall state; do \
	  $(BIN)/python -m tuner --dataset $$name --out build/tables/$$name.json \
	    --examples 32 --holdout 96 && cp build/tables/$$name.json benchmarks/tables/ || exit 1; \
	done

proto: $(BIN)/.installed ## Generate service/pb and the table's JSON Schema again
	$(BIN)/python scripts/generate_proto.py
	$(BIN)/python scripts/export_schema.py

contract: $(BIN)/.installed ## Record the contract as released: from then on it may only grow
	$(BIN)/buf build proto --exclude-source-info --output proto/released.binpb

clean: ## Remove the environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
