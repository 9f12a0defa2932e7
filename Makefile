# make build   .venv with everything, then a first artifact: dist/quickstart.tar.zst
# make test    the tests, on DeepGEMM and nvcc themselves; no GPU
# make check   before each commit: lint, types, the site, the tests that compile nothing
# make docs    the site, in build/site, its links checked
# make clean   removes .venv, build and dist

PYTHON ?= python3
VENV := .venv
MANIFEST ?= manifests/quickstart.yaml

.PHONY: build test check lint docs clean

build: $(VENV)/installed
	$(VENV)/bin/cachebuilder build $(MANIFEST)

test: $(VENV)/installed $(VENV)/legacy
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES)

check: lint docs $(VENV)/legacy
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# One process for each core, and at most four: each process holds a torch and its share of compilers in memory.
TEST_PROCESSES := $(shell n=$$(nproc); [ $$n -lt 4 ] && echo $$n || echo 4)

# PyPI's compiler is installed only if the machine has none of its own.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wanted Python 3.11 or newer, found $$($(PYTHON) --version); name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, DeepGEMM and the tools into $(VENV): some minutes, about 6 GB"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[build,report,ship,test,check,docs]'
	@if "$${CUDA_HOME:-/none}/bin/nvcc" --version >/dev/null 2>&1 || nvcc --version >/dev/null 2>&1; then :; else \
	  $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[nvcc]'; fi
	@touch $@

# The tests also need a DeepGEMM of the legacy cache generation. This one works with the same torch as the pinned one.
$(VENV)/legacy: $(VENV)/installed
	rm -rf $@ $@.new
	$(VENV)/bin/python -m pip install --quiet --target $@.new sgl-deep-gemm==0.1.7
	mv $@.new $@

clean:
	rm -rf $(VENV) build dist
