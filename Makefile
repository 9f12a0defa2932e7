# make build   .venv with everything, then a first artifact: dist/quickstart.tar.zst
# make test    the tests, on DeepGEMM and nvcc themselves; no GPU
# make check   before each commit: lint, types, the site, the tests that take less than a second or so
# make engines-check  where the rules of `manifest --model` differ from what the engines answered, for each release
# make docs    the site, in build/site, its links checked
# make lock    the hashes of all that is installed, for the versions in constraints.txt; needs uv
# make clean   removes .venv, build (with the cubins that the tests keep) and dist

PYTHON ?= python3
VENV := .venv
MANIFEST ?= manifests/quickstart.yaml

# The tests start hundreds of interpreters: each of them would compile all modules anew without their bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: build test check lint engines-check docs lock clean

build: $(VENV)/installed
	$(VENV)/bin/cachebuilder build $(MANIFEST)

# build/test-store keeps cubins between runs: nvcc's own, which others are compared with, and one of every op. A cubin is
# taken from there only if all that it depends on is the same: compilers, headers, flags, source, and our own code.
test: $(VENV)/installed $(VENV)/legacy $(VENV)/flashinfer
	@mkdir -p build/test-store && find build/test-store -type f -mtime +7 -delete
	CACHEBUILDER_TEST_STORE=$(CURDIR)/build/test-store $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# test_trial.py is slow as a whole, and even to look for its tests is to import torch.
check: lint docs $(VENV)/legacy $(VENV)/flashinfer
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow" --ignore tests/test_trial.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

# A new release: install it (benchmarks/engines/install.sh) and run it (benchmarks/observe.py), or build its classes;
# record its answers with benchmarks/engines/cases.py.
engines-check: $(VENV)/installed
	PYTHONPATH=. $(VENV)/bin/python benchmarks/engines/cases.py

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# One process for each core, and at most four: each process holds a torch and its share of compilers in memory.
TEST_PROCESSES := $(shell n=$$(nproc); [ $$n -lt 4 ] && echo $$n || echo 4)

# What is downloaded has the hash that is in locks/, or pip refuses it; nothing is built from another's source.
LOCKED := -m pip install --quiet --require-hashes --only-binary :all:

# PyPI's compiler is installed only if the machine has none of its own.
$(VENV)/installed: pyproject.toml locks/all.txt locks/nvcc.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wanted Python 3.11 or newer, found $$($(PYTHON) --version); name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, DeepGEMM and the tools into $(VENV): some minutes, about 6 GB"
	@$(VENV)/bin/python $(LOCKED) --requirement locks/all.txt
	@if "$${CUDA_HOME:-/none}/bin/nvcc" --version >/dev/null 2>&1 || nvcc --version >/dev/null 2>&1; then :; else \
	  $(VENV)/bin/python $(LOCKED) --requirement locks/nvcc.txt; fi
	@$(VENV)/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

# The tests also need a DeepGEMM of the legacy cache generation. This one works with the same torch as the pinned one.
$(VENV)/legacy: $(VENV)/installed locks/legacy.txt
	rm -rf $@ $@.new
	$(VENV)/bin/python $(LOCKED) --target $@.new --requirement locks/legacy.txt
	mv $@.new $@

# FlashInfer without its largest dependencies, which its modules for SM90 do not need.
$(VENV)/flashinfer: $(VENV)/installed locks/flashinfer.txt
	rm -rf $@ $@.new
	$(VENV)/bin/python $(LOCKED) --no-deps --target $@.new --requirement locks/flashinfer.txt
	mv $@.new $@

# Linux on x86_64. The versions are the same for Python 3.11, 3.12 and 3.13, and the hashes those of all files.
UV := uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --constraints constraints.txt
EXTRAS := $(foreach extra,build metrics ray report ship test check docs,--extra $(extra))

lock:
	$(UV) $(EXTRAS) pyproject.toml locks/tools.in --output-file locks/all.txt
	$(UV) --extra nvcc pyproject.toml --output-file locks/nvcc.txt
	$(subst --constraints constraints.txt,,$(UV)) locks/legacy.in --output-file locks/legacy.txt
	$(subst --constraints constraints.txt,--no-deps,$(UV)) locks/flashinfer.in --output-file locks/flashinfer.txt

clean:
	rm -rf $(VENV) build dist
