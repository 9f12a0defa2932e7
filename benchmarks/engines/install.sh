#!/usr/bin/env bash
# Install an engine into an environment of its own, with what cachebuilder needs beside it to observe it.
#
#     benchmarks/engines/install.sh vllm==0.33.0 FOLDER [PYTHON]
#
# PYTHON is python3.12 if left out. Observed so far: vllm==0.25.0, 0.32.0 and 0.33.0, sglang==0.5.23. One takes 9 to 11 GB
# and some minutes. Afterwards: PATH=FOLDER/bin:$PATH PYTHONPATH=. python benchmarks/observe.py …
set -euo pipefail
engine=${1:?which engine? as in vllm==0.33.0} folder=${2:?into which folder?} python=${3:-python3.12}
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ -e "$folder" ]; then
    echo "wanted a folder that is not there yet, found $folder" >&2
    exit 1
fi
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet uv
install=("$folder/bin/uv" pip install --quiet --python "$folder/bin/python")
"${install[@]}" "$engine"
"${install[@]}" --editable "$root[observe]"
if [ "$engine" = vllm==0.33.0 ]; then
    # Its requirements resolve to cuda-python 12 over cuda-bindings 13, and both write the same files: CuTe-DSL fails.
    "${install[@]}" "cuda-python>=13"
    "${install[@]}" --reinstall-package cuda-bindings "cuda-bindings==13.5.0"
fi
"$folder/bin/python" -c 'import sys, torch; from importlib import metadata as m
print(sys.argv[1].partition("==")[0], m.version(sys.argv[1].partition("==")[0]), "torch", torch.__version__)' "$engine"
