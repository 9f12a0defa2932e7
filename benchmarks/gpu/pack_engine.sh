#!/usr/bin/env bash
# Pack an installed engine for a machine that nothing can be fetched on, in parts that travel one by one.
#
#     benchmarks/gpu/pack_engine.sh SITE-PACKAGES OUT [PART_MIB]
#
# Left out is what a machine with torch has already, and what vLLM 0.25.0 does not load on SM90: FlashAttention 2's
# library, CuTe-DSL, FlashInfer's cubins for other GPUs. Unpack: cat OUT/engine.part-* | tar -xJ -C FOLDER, and put FOLDER
# on PYTHONPATH.
set -euo pipefail
site=$1 out=$2 part=${3:-58}
mkdir -p "$out"
excluded=(torch torchvision torchaudio 'torchvision.libs' torchcodec 'torchcodec.libs' triton nvidia numpy 'numpy.libs'
    transformers sympy networkx numba llvmlite cv2 'opencv_python_headless.libs' opencv_python_headless PyNvVideoCodec
    pip setuptools z3 tilelang tokenspeed_triton nvidia_cutlass_dsl pillow.libs PIL cudnn hf_xet tokenizers uvloop
    pycountry grpc 'torch-*' 'triton-*' 'numpy-*' 'transformers-*' 'tokenizers-*' huggingface_hub 'huggingface_hub-*')
options=(--exclude=__pycache__ --exclude='_vllm_fa2_C*' --exclude=vllm-rs --exclude='flashinfer_cubin/cubins' --exclude='*.a')
for name in "${excluded[@]}"; do options+=(--exclude="./$name"); done
tar -C "$site" "${options[@]}" -c . | xz -T2 -3 | split -b "${part}M" - "$out/engine.part-"
ls -l "$out"
