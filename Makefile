# make build   .venv with everything, then a first artifact: dist/quickstart.tar.zst
# make test    the tests, on DeepGEMM and nvcc themselves; no GPU
# make clean   removes .venv and dist

PYTHON ?= python3
VENV := .venv
MANIFEST ?= manifests/quickstart.yaml

.PHONY: build test clean

build: $(VENV)/installed
	$(VENV)/bin/cachebuilder build $(MANIFEST)

test: $(VENV)/installed $(VENV)/legacy
	$(VENV)/bin/python -m pytest

# PyPI's compiler is installed only where the machine has none of its own.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wanted Python 3.11 or newer, found $$($(PYTHON) --version); name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[build,report,test]'
	@if "$${CUDA_HOME:-/none}/bin/nvcc" --version >/dev/null 2>&1 || nvcc --version >/dev/null 2>&1; then :; else \
	  $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt '.[nvcc]'; fi
	@touch $@

# A DeepGEMM of the legacy cache generation for the tests, beside the pinned one: it works with the same torch.
$(VENV)/legacy: $(VENV)/installed
	rm -rf $@ $@.new
	$(VENV)/bin/python -m pip install --quiet --target $@.new sgl-deep-gemm==0.1.7
	mv $@.new $@

clean:
	rm -rf $(VENV) dist
