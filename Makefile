# make build   .venv with everything, then a first artifact: dist/quickstart.tar.zst
# make test    the tests, on DeepGEMM and nvcc themselves; no GPU
# make check   what a maintainer runs before each commit: lint, types, the site, the tests that compile nothing
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

# A test spends half of its time on one core, where torch is imported: two at once per two cores, and no more than
# four, since each holds a torch and its share of compilers in memory.
TEST_PROCESSES := $(shell n=$$(nproc); [ $$n -lt 4 ] && echo $$n || echo 4)

# PyPI's compiler is installed only where the machine has none of its own.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wanted Python 3.11 or newer, found $$($(PYTHON) --version); name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, DeepGEMM and the tools into $(VENV): some minutes, about 6 GB"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[build,report,ship,test,check,docs]'
	@if "$${CUDA_HOME:-/none}/bin/nvcc" --version >/dev/null 2>&1 || nvcc --version >/dev/null 2>&1; then :; else \
	  $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[nvcc]'; fi
	@touch $@

# A DeepGEMM of the legacy cache generation for the tests, beside the pinned one: it works with the same torch.
$(VENV)/legacy: $(VENV)/installed
	rm -rf $@ $@.new
	$(VENV)/bin/python -m pip install --quiet --target $@.new sgl-deep-gemm==0.1.7
	mv $@.new $@

clean:
	rm -rf $(VENV) build dist
