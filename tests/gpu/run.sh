#!/bin/sh
# All that is checked on the GPU itself, for anyone who has an H200, or the card that CACHEBUILDER_TEST_GPU names:
#
#     tests/gpu/run.sh OUT DEEPJIT LEGACY [MANIFEST...]
#
# DEEPJIT and LEGACY are copies of DeepGEMM (…/deep_gemm) that work with the installed torch. First tests/gpu, then each
# MANIFEST built with the GPU's word, restored, served from and held against float32, for both copies; OUT gets the
# reports. Nothing is installed and nothing fetched: PYTHON (python3) has torch and what `pip install 'cachebuilder[build,test]'`
# brings, nvcc is on PATH or in CUDA_HOME.
set -eu
[ $# -ge 3 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")/../.." && pwd)
out=$1 deepjit=$2 legacy=$3
shift 3
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
CACHEBUILDER_TEST_DEEPJIT=$deepjit CACHEBUILDER_TEST_LEGACY=$(dirname "$legacy") \
    "${PYTHON:-python3}" -m pytest -p no:cacheprovider -m gpu --rootdir "$here" "$here/tests/gpu"
[ $# -eq 0 ] || "${PYTHON:-python3}" "$here/benchmarks/gpu/truth.py" "$out" "$@" --deep-gemm "$deepjit" --deep-gemm "$legacy"
