/* A GPU that is not there: the CUDA calls that torch and DeepGEMM make, answered for the device described by the
 * environment (VIRTUAL_GPU_…). No kernel runs; memory is mapped lazily and never touched.
 *
 * One library plays two: put in front with LD_PRELOAD it answers for libcudart (the runtime), and since its SONAME is
 * libcuda.so.1, DeepGEMM's dlopen of the driver finds it already loaded. What it does not answer is a weak stub in the
 * generated unanswered.c, which notes the call's name and fails: nothing is ever answered by guessing.
 *
 * A library load ties a handle to its cubin's path and a launch names its handle, so the sweep reads from here which
 * kernel each DeepGEMM call used.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "driver_types.h" /* torch's own copy: cudaDeviceProp's layout differs between CUDA releases */

#define EXPORT __attribute__((visibility("default")))
#define SUCCESS 0
#define INVALID_VALUE 1 /* the same number in the runtime's and the driver's error codes */
#define OUT_OF_MEMORY 2
#define SYMBOL_NOT_FOUND 500
#define INVALID_IMAGE 200
#define FILE_NOT_FOUND 301
#define NOT_SUPPORTED 801

/* ---- what the sweep reads ------------------------------------------------------------------------------------- */

#define MAX_LAUNCHES 4096
#define MAX_LIBRARIES 65536

EXPORT uint32_t virtual_gpu_launches[MAX_LAUNCHES]; /* library numbers, in order of launch, since the sweep's reset */
EXPORT uint32_t virtual_gpu_launch_count;             /* may be more than were written down */
EXPORT char virtual_gpu_unanswered[4096]; /* names of calls nobody answered, one a line */

struct library {
    uint32_t number;
    char path[4096];
};
static struct library *libraries[MAX_LIBRARIES];
static uint32_t library_count;

EXPORT const char *virtual_gpu_library_path(uint32_t number) {
    return number < library_count ? libraries[number]->path : NULL;
}

EXPORT int virtual_gpu_note_unanswered(const char *name) {
    char line[256];
    snprintf(line, sizeof line, "%s\n", name);
    if (!strstr(virtual_gpu_unanswered, line) &&
        strlen(virtual_gpu_unanswered) + strlen(line) < sizeof virtual_gpu_unanswered)
        strcat(virtual_gpu_unanswered, line);
    return NOT_SUPPORTED;
}

/* ---- the device ------------------------------------------------------------------------------------------------ */

static long property(const char *name) {
    const char *text = getenv(name);
    if (!text) {
        fprintf(stderr, "virtual GPU: %s is not set\n", name);
        abort();
    }
    return atol(text);
}

EXPORT int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    (void)device;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", getenv("VIRTUAL_GPU_NAME"));
    p->major = property("VIRTUAL_GPU_MAJOR");
    p->minor = property("VIRTUAL_GPU_MINOR");
    p->multiProcessorCount = property("VIRTUAL_GPU_SM_COUNT");
    p->l2CacheSize = property("VIRTUAL_GPU_L2_BYTES");
    p->sharedMemPerBlockOptin = property("VIRTUAL_GPU_SHARED_MEMORY_BYTES");
    p->sharedMemPerMultiprocessor = p->sharedMemPerBlockOptin + 1024; /* one KiB a block is the system's */
    p->reservedSharedMemPerBlock = 1024;
    p->sharedMemPerBlock = 48 * 1024;
    p->totalGlobalMem = (size_t)1 << 42; /* any shape fits: nothing is ever touched */
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->clusterLaunch = 1;
    return SUCCESS;
}
/* CUDA 12's headers rename the call. */
EXPORT int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return cudaGetDeviceProperties(p, device); }

EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrClockRate: *value = property("VIRTUAL_GPU_CLOCK_KHZ"); break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: {
        char name[64];
        snprintf(name, sizeof name, "cudaDeviceGetAttribute(%d)", attribute);
        return virtual_gpu_note_unanswered(name);
    }
    }
    return SUCCESS;
}

EXPORT int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
EXPORT int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
EXPORT int cudaSetDevice(int device) { return device == 0 ? SUCCESS : INVALID_VALUE; }
EXPORT int cudaDeviceSynchronize(void) { return SUCCESS; }
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, SUCCESS; }
EXPORT int cudaDriverGetVersion(int *version) { return *version = CUDART_MAJOR * 1000, SUCCESS; }
EXPORT int cudaRuntimeGetVersion(int *version) { return *version = CUDART_MAJOR * 1000, SUCCESS; }
EXPORT int cudaGetLastError(void) { return SUCCESS; }
EXPORT int cudaPeekAtLastError(void) { return SUCCESS; }

static const char *describe(int error) {
    static char text[4400];
    if (error == FILE_NOT_FOUND || error == INVALID_IMAGE)
        return error == FILE_NOT_FOUND ? "file not found" : "device kernel image is invalid";
    if (error != NOT_SUPPORTED)
        return error == SUCCESS ? "no error" : error == OUT_OF_MEMORY ? "out of memory" : "invalid value";
    snprintf(text, sizeof text, "not answered by the virtual GPU: %s", virtual_gpu_unanswered);
    return text;
}
EXPORT const char *cudaGetErrorString(int error) { return describe(error); }
EXPORT const char *cudaGetErrorName(int error) { return describe(error); }

/* ---- memory: address space only -------------------------------------------------------------------------------- */

#define PAGE 4096 /* in front of each block, holding its length */

EXPORT int cudaMalloc(void **block, size_t bytes) {
    char *start = mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return OUT_OF_MEMORY;
    *(size_t *)start = bytes + PAGE;
    *block = start + PAGE;
    return SUCCESS;
}
EXPORT int cudaFree(void *block) {
    if (block)
        munmap((char *)block - PAGE, *(size_t *)((char *)block - PAGE));
    return SUCCESS;
}
EXPORT int cudaHostAlloc(void **block, size_t bytes, unsigned flags) { return (void)flags, cudaMalloc(block, bytes); }
EXPORT int cudaFreeHost(void *block) { return cudaFree(block); }
EXPORT int cudaMemGetInfo(size_t *free_bytes, size_t *total) { return *free_bytes = *total = (size_t)1 << 42, SUCCESS; }
EXPORT int cudaMemset(void *block, int value, size_t bytes) { return (void)block, (void)value, (void)bytes, SUCCESS; }
EXPORT int cudaMemsetAsync(void *block, int value, size_t bytes, void *stream) {
    return (void)stream, cudaMemset(block, value, bytes);
}
EXPORT int cudaMemset2DAsync(void *block, size_t pitch, int value, size_t width, size_t height, void *stream) {
    return (void)pitch, (void)height, cudaMemsetAsync(block, value, width, stream);
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    /* Real, for what torch copies in from the host; device to device stays untouched memory. */
    if (kind != cudaMemcpyDeviceToDevice)
        memcpy(to, from, bytes);
    return SUCCESS;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    return (void)stream, cudaMemcpy(to, from, bytes, kind);
}
EXPORT int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = (void *)pointer;
    return SUCCESS;
}

/* ---- streams, events, launches: nothing runs, so everything is done at once ------------------------------------- */

static int new_handle(void **handle) { return *handle = malloc(1), SUCCESS; }
static int drop_handle(void *handle) { return free(handle), SUCCESS; }

EXPORT int cudaStreamCreateWithFlags(void **s, unsigned flags) { return (void)flags, new_handle(s); }
EXPORT int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { return (void)f, (void)p, new_handle(s); }
EXPORT int cudaStreamDestroy(void *s) { return drop_handle(s); }
EXPORT int cudaStreamSynchronize(void *s) { return (void)s, SUCCESS; }
EXPORT int cudaStreamQuery(void *s) { return (void)s, SUCCESS; }
EXPORT int cudaStreamWaitEvent(void *s, void *e, unsigned flags) { return (void)s, (void)e, (void)flags, SUCCESS; }
EXPORT int cudaStreamIsCapturing(void *s, int *status) { return (void)s, *status = 0, SUCCESS; }
EXPORT int cudaStreamGetCaptureInfo(void *s, int *status) { return cudaStreamIsCapturing(s, status); }
EXPORT int cudaStreamGetCaptureInfo_v2(void *s, int *status) { return cudaStreamIsCapturing(s, status); }
EXPORT int cudaThreadExchangeStreamCaptureMode(int *mode) { return (void)mode, SUCCESS; }
EXPORT int cudaEventCreate(void **e) { return new_handle(e); }
EXPORT int cudaEventCreateWithFlags(void **e, unsigned flags) { return (void)flags, new_handle(e); }
EXPORT int cudaEventDestroy(void *e) { return drop_handle(e); }
EXPORT int cudaEventRecord(void *e, void *s) { return (void)e, (void)s, SUCCESS; }
EXPORT int cudaEventRecordWithFlags(void *e, void *s, unsigned flags) { return (void)flags, cudaEventRecord(e, s); }
EXPORT int cudaEventQuery(void *e) { return (void)e, SUCCESS; }
EXPORT int cudaEventSynchronize(void *e) { return (void)e, SUCCESS; }

/* torch's own kernels: their launch is accepted, their results are never read */
EXPORT int cudaLaunchKernel(void) { return SUCCESS; }
EXPORT int cudaLaunchKernelExC(void) { return SUCCESS; }
/* CUB, which torch's sorts are made with, chooses its launch by the arch that a kernel was compiled for. */
EXPORT int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->binaryVersion = attributes->ptxVersion =
        10 * property("VIRTUAL_GPU_MAJOR") + property("VIRTUAL_GPU_MINOR");
    attributes->maxThreadsPerBlock = 1024;
    return SUCCESS;
}
EXPORT int __cudaLaunchKernel(void) { return SUCCESS; }
EXPORT int __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)function, SUCCESS; }
EXPORT int __cudaPushCallConfiguration(void) { return SUCCESS; }
EXPORT int __cudaPopCallConfiguration(void) { return SUCCESS; }
EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return (void)binary, &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void) {}
EXPORT void __cudaUnregisterFatBinary(void) {}
EXPORT void __cudaRegisterFunction(void) {}
EXPORT void __cudaRegisterVar(void) {}
EXPORT void __cudaRegisterManagedVar(void) {}
EXPORT void __cudaRegisterHostVar(void) {}
EXPORT void __cudaRegisterUnifiedTable(void) {}
EXPORT char __cudaInitModule(void) { return 1; }

EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status) {
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (status)
        *status = *function ? 0 : 1; /* cudaDriverEntryPointSymbolNotFound */
    return *function ? SUCCESS : SYMBOL_NOT_FOUND;
}
EXPORT int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

/* ---- cuBLASLt: some of DeepGEMM's calls go there, and compile nothing ------------------------------------------- */

EXPORT int cublasLtCreate(void **handle) { return new_handle(handle); }
EXPORT int cublasLtDestroy(void *handle) { return drop_handle(handle); }
EXPORT int cublasLtMatmulDescCreate(void **handle) { return new_handle(handle); }
EXPORT int cublasLtMatmulDescDestroy(void *handle) { return drop_handle(handle); }
EXPORT int cublasLtMatmulDescSetAttribute(void) { return SUCCESS; }
EXPORT int cublasLtMatrixLayoutCreate(void **handle) { return new_handle(handle); }
EXPORT int cublasLtMatrixLayoutDestroy(void *handle) { return drop_handle(handle); }
EXPORT int cublasLtMatrixLayoutSetAttribute(void) { return SUCCESS; }
EXPORT int cublasLtMatmulPreferenceCreate(void **handle) { return new_handle(handle); }
EXPORT int cublasLtMatmulPreferenceDestroy(void *handle) { return drop_handle(handle); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void) { return SUCCESS; }
EXPORT int cublasLtMatmul(void) { return SUCCESS; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                          void *preference, int wanted, void *results, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t of cublasLt.h: state 0, no workspace */
    return *found = 1, SUCCESS;
}

/* ---- the driver ------------------------------------------------------------------------------------------------ */

EXPORT int cuInit(unsigned flags) { return (void)flags, SUCCESS; }
EXPORT int cuGetErrorName(int error, const char **text) { return *text = describe(error), SUCCESS; }
EXPORT int cuGetErrorString(int error, const char **text) { return *text = describe(error), SUCCESS; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return (void)device, *flags = 0, *active = 1, SUCCESS;
}
/* torch asks which allocation a pointer is in, and takes "not known" for an answer */
EXPORT int cuMemGetAddressRange(void **base, size_t *bytes, void *pointer) {
    return (void)base, (void)bytes, (void)pointer, INVALID_VALUE;
}

/* A sweep that plans loads placeholders; one that verifies sets VIRTUAL_GPU_CHECK_CUBINS, and then a file that is no
 * ELF is refused as the driver refuses it. */
static int check_cubin(const char *path) {
    if (!getenv("VIRTUAL_GPU_CHECK_CUBINS"))
        return SUCCESS;
    FILE *file = fopen(path, "rb");
    if (!file)
        return FILE_NOT_FOUND;
    char magic[4];
    int is_elf = fread(magic, 1, sizeof magic, file) == sizeof magic && !memcmp(magic, "\177ELF", sizeof magic);
    fclose(file);
    return is_elf ? SUCCESS : INVALID_IMAGE;
}

EXPORT int cuLibraryLoadFromFile(struct library **library, const char *path) {
    int problem = check_cubin(path);
    if (problem)
        return problem;
    if (library_count == MAX_LIBRARIES)
        return OUT_OF_MEMORY;
    struct library *l = malloc(sizeof *l);
    if (!l)
        return OUT_OF_MEMORY;
    l->number = library_count;
    snprintf(l->path, sizeof l->path, "%s", path);
    libraries[library_count++] = *library = l; /* never freed: an unloaded library's number may still be asked for */
    return SUCCESS;
}
EXPORT int cuLibraryUnload(struct library *library) { return (void)library, SUCCESS; }
EXPORT int cuLibraryGetKernelCount(unsigned *count, struct library *library) { return (void)library, *count = 1, SUCCESS; }
EXPORT int cuLibraryEnumerateKernels(struct library **kernels, unsigned count, struct library *library) {
    return (void)count, kernels[0] = library, SUCCESS;
}
EXPORT int cuKernelGetFunction(struct library **function, struct library *kernel) { return *function = kernel, SUCCESS; }
/* the module API, which legacy DeepGEMM built for CUDA before 12.4 uses */
EXPORT int cuModuleLoad(struct library **module, const char *path) { return cuLibraryLoadFromFile(module, path); }
EXPORT int cuModuleUnload(struct library *module) { return cuLibraryUnload(module); }
EXPORT int cuModuleGetFunction(struct library **function, struct library *module, const char *name) {
    return (void)name, *function = module, SUCCESS;
}

EXPORT int cuFuncSetAttribute(struct library *function, int attribute, int value) {
    (void)function;
    enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 }; /* CUfunction_attribute in cuda.h */
    int over = attribute == MAX_DYNAMIC_SHARED_SIZE_BYTES && value > property("VIRTUAL_GPU_SHARED_MEMORY_BYTES");
    return over ? INVALID_VALUE : SUCCESS;
}

EXPORT int cuLaunchKernelEx(const void *config, struct library *function, void **arguments, void **extra) {
    (void)config, (void)arguments, (void)extra;
    if (virtual_gpu_launch_count < MAX_LAUNCHES)
        virtual_gpu_launches[virtual_gpu_launch_count] = function->number;
    virtual_gpu_launch_count++; /* past the end too: a process that nobody sweeps launches as long as it lives */
    return SUCCESS;
}

/* The limits that the driver documents for tiled tensor maps (CUDA driver API 13.0, cuTensorMapEncodeTiled): a shape
 * that a real GPU would refuse is refused here. */
EXPORT int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                                  const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides) {
    (void)map, (void)type;
    if (rank < 1 || rank > 5 || (uintptr_t)address % 16)
        return INVALID_VALUE;
    for (uint32_t i = 0; i < rank; i++)
        if (!sizes[i] || sizes[i] > (uint64_t)1 << 32 || !box[i] || box[i] > 256 || !element_strides[i] ||
            element_strides[i] > 8)
            return INVALID_VALUE;
    for (uint32_t i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= (uint64_t)1 << 40)
            return INVALID_VALUE;
    return SUCCESS;
}
