# `make demo` and `make test` each work alone on a fresh machine; set-up is done once.

# The first of these that is Python 3.11 or newer; 3.11 first, as that is what the pins are tested on.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/pip install -qq --disable-pip-version-check -c constraints.txt
READY := .venv/.ready
# Two workers with a thread each: the tests are many and small.
TESTS ?= -n 2

.PHONY: setup demo test lint
setup: $(READY)

# torch goes first, by its pin, so that no other package pulls in another build of it.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "finetune needs Python 3.11 or newer"; exit 1; }
	@test -x .venv/bin/pip || { echo "making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "installing torch"
	@$(PIP) torch
	@echo "installing finetune and what it needs (some minutes the first time)"
	@$(PIP) -e '.[dev,judge]'
	@if ls ../shared/wheels/llama_cpp_python-*.whl >/dev/null 2>&1; then $(MAKE) -s judge-llama; fi
	@touch $(READY)

# llama.cpp as a judge of exports, where a built wheel lies beside the checkout; it takes minutes to build.
.PHONY: judge-llama
judge-llama:
	-@$(PIP) diskcache sse-starlette starlette-context pydantic-settings && $(PIP) --no-index --no-deps ../shared/wheels/llama_cpp_python-*.whl

demo: $(READY)
	HF_HUB_OFFLINE=1 .venv/bin/finetune train recipes/nano/demo.yaml

test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/pytest $(TESTS)

lint: $(READY)
	.venv/bin/ruff check finetune tests
	.venv/bin/mypy
