# Targets: setup serve test faults soak check bench proto. All work from a fresh clone with Python >= 3.11
# and a package index; nothing outside .venv is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch>=2.11,<2.14
# Without an NVIDIA driver the CPU build of torch is asked for first: it is a tenth of the size.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)
UCX_EXTRA ?= cuda13
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup serve test faults soak check bench proto clean

setup: $(VENV)/.dev-installed

serve: $(VENV)/.local-installed
	$(BIN)/baton serve $(ARGS)

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q $(ARGS)

faults: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q -m faults tests/faults $(ARGS)

soak: $(VENV)/.dev-installed
	$(BIN)/python -m tests.faults.soak $(ARGS)

check: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_proto

bench: $(VENV)/.dev-installed
	$(BIN)/python -m benchmarks.pocket $(ARGS)

proto: $(VENV)/.dev-installed
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. cluster/proto/*.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baton needs Python 3.11 or newer.")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch-installed: $(VENV)/.python
	@echo "Setting up $(VENV): minutes the first time, most of them for torch."
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q "$(TORCH)"
else
	$(BIN)/pip install -q --retries 0 --timeout 10 --index-url $(TORCH_CPU_INDEX) "$(TORCH)" 2>/dev/null \
		|| $(BIN)/pip install -q "$(TORCH)"
endif
	touch $@

$(VENV)/.local-installed: $(VENV)/.torch-installed pyproject.toml
	$(BIN)/pip install -q -e ".[local,$(UCX_EXTRA)]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.local-installed
	$(BIN)/pip install -q -e ".[local,$(UCX_EXTRA),dev]"
	touch $@
