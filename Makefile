# Everything sets itself up: Python >= 3.11, Go >= 1.26 and make are all that a machine needs. Nothing is installed outside
# .venv/ and the user's cache folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REQUIREMENTS := requirements/uv.txt requirements/base.txt requirements/torch.txt
TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt)
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup controlplane kernels demo test e2e e2e-vllm bench lint format crds clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z0-9]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r t d; do printf '  make %-14s %s\n' "$$t" "$$d"; done

setup: $(READY) ## make .venv/ (TORCH_BACKEND=cpu for a torch without CUDA)

$(READY): $(REQUIREMENTS) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH: install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V): Python 3.11 or newer is needed, or say make PYTHON=/path/to/python3"; exit 1; }
	@echo "setup: virtual environment in $(VENV)/"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments: install its venv module (python3-venv on Debian)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@echo "setup: pinned, hash-checked requirements"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements/base.txt
ifdef TORCH_BACKEND
	@echo "setup: torch $(TORCH) for TORCH_BACKEND=$(TORCH_BACKEND), by version and without hashes"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --torch-backend=$(TORCH_BACKEND) torch==$(TORCH)
else
	@echo "setup: torch $(TORCH) as the package index has it (CUDA build, also runs on CPU; TORCH_BACKEND=cpu is smaller)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements/torch.txt
endif
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

controlplane: $(READY) ## build etcd, Kubernetes, Helm and Prometheus into the user's cache (minutes, once)
	@$(BIN)/python -m e2e.controlplane build

kernels: $(READY)
	@echo "kernels: compiling the simulator into the user's cache (a minute, once for each change of it)"
	@$(BIN)/disaggserve warm-up >/dev/null

demo: controlplane kernels ## the whole path on simulated GPUs (KEEP=1 leaves it up)
	@$(BIN)/python -m e2e.demo $(if $(KEEP),--keep)

test: controlplane kernels lint ## lint and all tests but the long ones
	@$(BIN)/python -m pytest -m "not e2e" -q

e2e: controlplane kernels ## everything, the long tests too
	@$(BIN)/python -m pytest -q

e2e-vllm: controlplane kernels ## a real vLLM on this CPU behind our operator and router (6 GB into the user's cache, once)
	@$(BIN)/python -m e2e.vllm.environment
	@$(BIN)/python -m pytest -m vllm -q

bench: $(READY) ## the benchmarks; each prints ratios and how they were measured
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

lint: $(READY) ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(READY) ## format the code
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

crds: $(READY) ## generate crds/ and the chart's copy from operator/disaggserve/api
	@$(BIN)/disaggserve crd > crds/disaggserves.yaml
	@cp crds/disaggserves.yaml charts/disaggserve/files/crd.yaml

clean: ## remove .venv/ and what tests left
	@rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
