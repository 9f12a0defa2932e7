#!/bin/sh
# Stands in for the nvcc that FlashInfer's GEMM calls during a sweep: nvcc SOURCE -o CUBIN FLAGS. The source lies in a
# folder NAME_DIGITS_DIGITS, where NAME is the entry's. FlashInfer removes that folder, so the source and the command
# line go into requests/NAME beside this script. The cubin is a placeholder with the name of a kernel: see
# flashinfer_protocol.py.
# FlashInfer also asks for the version. Without an answer it takes that of torch's CUDA, as in an image without a toolkit.
[ "$1" = --version ] && exit 1
here=${0%/*}
folder=${1%/*}
name=${folder##*/}
name=${name%_*}
name=${name%_*}
mkdir -p "$here/requests/$name" && cat "$1" >"$here/requests/$name/kernel.cu" || exit
shift 2
cubin=$1
shift
printf '%s\n' "$*" >"$here/requests/$name/flags.txt" || exit
printf 'to be compiled: fp8_gemm_kernel %s\n' "$name" >"$cubin"
