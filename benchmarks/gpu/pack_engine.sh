#!/usr/bin/env bash
# Pack an engine's environment for a machine that nothing can be fetched on, in parts that travel one by one.
#
#     benchmarks/gpu/pack_engine.sh ENVIRONMENT OUT [PART_MIB]
#
# Left out is what a machine with torch has already, and what vLLM 0.25.0 does not load on SM90: FlashAttention 2's
# library, CuTe-DSL, FlashInfer's cubins for other GPUs. OUT/engine.names lists what the environment has, so that
# unpack_engine.sh gives the other machine the same packages and no others.
set -euo pipefail
environment=$(cd "$1" && pwd) out=$2 part=${3:-58}
site=$(cd "$environment"/lib/python3.*/site-packages && pwd)
mkdir -p "$out"
ls "$site" >"$out/engine.names"
excluded=(torch torchvision torchaudio 'torchvision.libs' torchcodec 'torchcodec.libs' triton numpy 'numpy.libs'
    transformers sympy networkx numba llvmlite cv2 'opencv_python_headless.libs' opencv_python_headless PyNvVideoCodec
    pip setuptools z3 tilelang tokenspeed_triton nvidia_cutlass_dsl pillow.libs PIL cudnn hf_xet tokenizers uvloop
    pycountry grpc 'torch-*' 'triton-*' 'numpy-*' 'transformers-*' 'tokenizers-*' huggingface_hub 'huggingface_hub-*')
# The headers of NVIDIA's wheels travel: humming's keys hold which of them are there.
excluded+=(nvidia/cudnn nvidia/cusparselt nvidia/nccl nvidia/nvshmem nvidia/cu13/{bin,cccl,lib,nvvm})
options=(--exclude=__pycache__ --exclude='_vllm_fa2_C*' --exclude=vllm-rs --exclude='flashinfer_cubin/cubins' --exclude='*.a')
options+=(--exclude='bin/python*' --exclude='bin/uv' --exclude='bin/uvx')
for name in "${excluded[@]}"; do options+=(--exclude="${site#"$environment"/}/$name"); done
tar -C "$environment" "${options[@]}" -c bin "${site#"$environment"/}" | xz -T2 -3 | split -b "${part}M" - "$out/engine.part-"
ls -l "$out"
