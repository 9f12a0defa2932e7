"""The environment variables that cachebuilder itself reads, for the reference page."""

from __future__ import annotations

OWN_VARIABLES: dict[str, str] = {
    "CACHEBUILDER_CACHE_DIR": "plans, compiled kernels, scratch folders; else XDG_CACHE_HOME/cachebuilder",
    "CACHEBUILDER_KEY_PASSPHRASE": "the passphrase of a signing key; else cachebuilder asks for it",
    "CACHEBUILDER_MISS_LOG": "where the frozen nvcc writes a miss; else DIR/cachebuilder/misses.jsonl",
    "CACHEBUILDER_ON_MISS": "the frozen nvcc's answer to a missing kernel: refuse (default), compile, compile-and-warn",
    "CACHEBUILDER_REAL_NVCC": "the nvcc that the compiling policies call; else the first on PATH that is not frozen",
    "CACHEBUILDER_RETRIES": "how often a transfer is tried again; else 5",
    "CACHEBUILDER_TRUST": "public keys, separated by ':'; what --trust is where it is not given",
    "CC": "the C compiler that builds the virtual GPU; else the first of cc, gcc, clang",
    "CUDA_DEVICE_ORDER": "with CUDA_VISIBLE_DEVICES: which GPU --device cuda uses",
    "CUDA_HOME": "its bin/nvcc compiles, unless --nvcc names another",
    "CUDA_PATH": "read where CUDA_HOME is not set",
    "CUDA_VISIBLE_DEVICES": "which GPU --device cuda uses",
    "DOCKER_CONFIG": "the folder of docker's config.json, for a registry's credentials; else ~/.docker",
    "HTTPS_PROXY": "a proxy for registries, except for hosts in NO_PROXY",
    "NO_COLOR": "if set to anything: no colour on a terminal",
    "NVCC_CCBIN": "nvcc's host compiler; else gcc",
    "PATH": "has nvcc, where neither --nvcc nor CUDA_HOME names one",
    "REGISTRY_AUTH_FILE": "a file with a registry's credentials, read instead of docker's",
    "REQUESTS_CA_BUNDLE": "certificate authorities for registries",
    "SOURCE_DATE_EPOCH": "the time of every member of an artifact, seconds since 1970; else 0",
    "TMPDIR": "where the frozen nvcc logs a miss when no other place can be written",
    "XDG_CACHE_HOME": "the user's cache folder; else ~/.cache",
}
