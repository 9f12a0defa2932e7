// Compiles one kernel with DeepJIT's own code and a post-hook: hooked PYTHON_LIBRARY_ROOT ENTRY.
// Beside this file: std::format for compilers without <format>, and the declarations of elfutils that DeepJIT names.
#define DJ_DISABLE_GIL 1
#include <deep_jit/backend/cuda/backend.hpp>

int main(int, char** argv) {
    const deep_jit::Env env("DG");
    const deep_jit::Config config(argv[1], "DG");
    const deep_jit::CUDA backend(env);
    deep_jit::cuda::CompilerOptions options;
    options.optimize_level = "3";
    options.ptxas_register_usage_level = 10;
    options.arch = "90a";
    options.post_hook = "jit_hooks/hook.py";
    backend.compile("// a kernel\n", argv[2], env, config, options);
}
