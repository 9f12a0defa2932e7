/* cuBLAS: torch's own products. They write device memory only, which nothing reads. */
#include <stdlib.h>

#include "virtual_gpu.h"

EXPORT int cublasCreate_v2(void **handle) { return *handle = malloc(64), SUCCESS; }
EXPORT int cublasDestroy_v2(void *handle) { return free(handle), SUCCESS; }
EXPORT int cublasGetVersion_v2(void *handle, int *version) { return (void)handle, *version = CUDART_MAJOR * 10000, SUCCESS; }
EXPORT int cublasGetMathMode(void *handle, int *mode) { return (void)handle, *mode = 0, SUCCESS; }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { return (void)handle, *mode = 0, SUCCESS; }
EXPORT int cublasGetStream_v2(void *handle, void **stream) { return (void)handle, *stream = NULL, SUCCESS; }
EXPORT int cublasGetSmCountTarget(void *handle, int *count) { return (void)handle, *count = 0, SUCCESS; }
