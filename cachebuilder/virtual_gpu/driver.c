/* The driver calls that an engine makes beside DeepGEMM's: torch's own, Triton's and those of FlashInfer's modules.
 *
 * What an engine compiles itself is loaded from memory and launched into nothing. A launch of DeepGEMM is seen in
 * virtual_gpu.c, which loads from files.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "virtual_gpu.h"

/* ---- contexts and devices ---- */

static char context; /* one for all devices and threads; its address is the handle */

EXPORT int cudaGetDevice(int *device);

EXPORT int cuCtxGetCurrent(void **c) { return *c = &context, SUCCESS; }
EXPORT int cuCtxSetCurrent(void *c) { return (void)c, SUCCESS; }
EXPORT int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
EXPORT int cuCtxPushCurrent(void *c) { return (void)c, SUCCESS; }
EXPORT int cuCtxPopCurrent(void **c) { return *c = &context, SUCCESS; }
EXPORT int cuCtxPushCurrent_v2(void *c) { return (void)c, SUCCESS; }
EXPORT int cuCtxPopCurrent_v2(void **c) { return *c = &context, SUCCESS; }
EXPORT int cuCtxSynchronize(void) { return SUCCESS; }
EXPORT int cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, SUCCESS; }
EXPORT int cuDevicePrimaryCtxRetain(void **c, int device) { return (void)device, *c = &context, SUCCESS; }
EXPORT int cuDevicePrimaryCtxRelease(int device) { return (void)device, SUCCESS; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, SUCCESS; }
EXPORT int cuDeviceGetCount(int *count) { return *count = virtual_gpu_count(), SUCCESS; }
EXPORT int cuDeviceGetName(char *name, int bytes, int device) {
    return (void)device, snprintf(name, bytes, "%s", getenv("VIRTUAL_GPU_NAME")), SUCCESS;
}
EXPORT int cudaMemGetInfo(size_t *free_bytes, size_t *total);
EXPORT int cuDeviceTotalMem(size_t *bytes, int device) { return (void)device, cudaMemGetInfo(&(size_t){0}, bytes); }
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device) { return cuDeviceTotalMem(bytes, device); }
EXPORT int cuDeviceComputeCapability(int *major, int *minor, int device) {
    (void)device;
    *major = virtual_gpu_property("VIRTUAL_GPU_MAJOR");
    *minor = virtual_gpu_property("VIRTUAL_GPU_MINOR");
    return SUCCESS;
}
EXPORT int cuDriverGetVersion(int *version) { return *version = CUDART_MAJOR * 1000, SUCCESS; }
/* The numbers of CUdevice_attribute are those of cudaDeviceAttr (cuda.h and driver_types.h of CUDA 13.0). */
EXPORT int cudaDeviceGetAttribute(int *value, int attribute, int device);
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 128) /* CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED: memory is shared with no other machine */
        return *value = 0, SUCCESS;
    return cudaDeviceGetAttribute(value, attribute, device);
}

/* torch 2.14 asks to be told of the driver's messages (c10/cuda); there are none. */
EXPORT int cuLogsRegisterCallback(void *function, void *data, void **handle) {
    return (void)function, (void)data, *handle = &context, SUCCESS;
}
EXPORT int cuLogsUnregisterCallback(void *handle) { return (void)handle, SUCCESS; }

/* Tables of functions without documentation, which a runtime asks for that is linked in statically. The driver answers so
 * where it has no such table; that runtime then fails, and says so itself. */
EXPORT int cuGetExportTable(const void **table, const void *id) {
    return (void)id, *table = NULL, SYMBOL_NOT_FOUND;
}

/* ---- modules from memory ---- */

/* A module, library, function or kernel whose launches nobody asks about. */
struct loaded { uint32_t number; int registers; };
static const uint32_t UNNAMED = UINT32_MAX; /* no library of virtual_gpu.c has this number */

/* The registers of a thread of a cubin's kernels, at most; 0 if the image is no cubin. Inductor compiles another candidate
 * of a kernel that has many (_dynamic_scale_rblock in torch 2.11's _inductor/runtime/triton_heuristics.py). ptxas writes
 * them into the section .nv.info; read here as `cuobjdump -res-usage` of CUDA 12.8 and 13.1 prints them. */
static int registers_of(const char *image) {
    enum { NV_INFO = 0x70000000, WITH_SIZE = 4, REGISTER_COUNT = 0x2f };
    struct entry { uint8_t format, attribute; uint16_t size; uint32_t symbol, value; };
    int most = 0;
    if (memcmp(image, ELFMAG, SELFMAG))
        return 0;
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != NV_INFO || sections[i].sh_info) /* of one kernel: other attributes */
            continue;
        const char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at < end) {
            const struct entry *entry = (const void *)at;
            if (entry->format == WITH_SIZE && entry->attribute == REGISTER_COUNT && (int)entry->value > most)
                most = entry->value;
            at += 4 + (entry->format == WITH_SIZE ? entry->size : 0); /* else the size is the value */
        }
    }
    return most;
}

/* The same of a file, which torch's own launcher of Triton kernels loads; 0 if it cannot be read, or is too short. */
static int registers_of_file(const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC), registers = 0;
    struct stat status;
    if (file < 0)
        return 0;
    if (!fstat(file, &status) && status.st_size > (off_t)sizeof(Elf64_Ehdr)) {
        void *image = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
        if (image != MAP_FAILED) {
            registers = registers_of(image);
            munmap(image, status.st_size);
        }
    }
    close(file);
    return registers;
}

EXPORT int cuModuleLoadData(struct loaded **module, const void *image) {
    if (!(*module = malloc(sizeof **module)))
        return OUT_OF_MEMORY;
    return **module = (struct loaded){UNNAMED, registers_of(image)}, SUCCESS;
}
EXPORT int cuModuleLoadDataEx(struct loaded **module, const void *image, unsigned n, void *options, void *values) {
    return (void)n, (void)options, (void)values, cuModuleLoadData(module, image);
}
EXPORT int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    return (void)name, *kernel = library, SUCCESS;
}
EXPORT int cuFuncLoad(void *function) { return (void)function, SUCCESS; }
EXPORT int cuFuncSetCacheConfig(void *function, int config) { return (void)function, (void)config, SUCCESS; }
EXPORT int cuFuncGetAttribute(int *value, int attribute, const struct loaded *function) {
    enum { MAX_THREADS_PER_BLOCK = 0, NUM_REGS = 4 }; /* CUfunction_attribute in cuda.h; the others count bytes */
    *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0;
    if (attribute != NUM_REGS)
        return SUCCESS;
    const char *path = virtual_gpu_library_path(function->number);
    *value = path ? registers_of_file(path) : function->number == UNNAMED ? function->registers : 0;
    return SUCCESS;
}
EXPORT int cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    return (void)device, cuFuncGetAttribute(value, attribute, kernel);
}
EXPORT int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    return (void)attribute, (void)value, (void)kernel, (void)device, SUCCESS;
}
EXPORT int cuLaunchKernel(void) { return SUCCESS; }

/* ---- occupancy: one block of a kernel fits ---- */

EXPORT int cuOccupancyMaxActiveClusters(int *clusters) { return *clusters = 16, SUCCESS; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 1, SUCCESS; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 1, SUCCESS; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 1, SUCCESS; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 1, SUCCESS; }

/* ---- memory, streams, events ---- */

EXPORT int cudaMalloc(void **block, size_t bytes);
EXPORT int cudaFree(void *block);
EXPORT int cuMemAlloc(void **block, size_t bytes) { return cudaMalloc(block, bytes); }
EXPORT int cuMemAlloc_v2(void **block, size_t bytes) { return cudaMalloc(block, bytes); }
EXPORT int cuMemFree(void *block) { return cudaFree(block); }
EXPORT int cuMemFree_v2(void *block) { return cudaFree(block); }
EXPORT int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), SUCCESS; }
EXPORT int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), SUCCESS; }
EXPORT int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return (void)stream, memcpy(to, from, bytes), SUCCESS;
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return (void)stream, memcpy(to, from, bytes), SUCCESS;
}
EXPORT int cuMemsetD8Async(void) { return SUCCESS; }
EXPORT int cuMemsetD32Async(void) { return SUCCESS; }
EXPORT int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer) {
    enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3 }; /* CUpointer_attribute in cuda.h */
    switch (attribute) {
    case CONTEXT: *(void **)value = &context; return SUCCESS;
    case MEMORY_TYPE: *(int *)value = 2; return SUCCESS; /* CU_MEMORYTYPE_DEVICE */
    case DEVICE_POINTER: *(unsigned long *)value = pointer; return SUCCESS;
    }
    char name[64];
    snprintf(name, sizeof name, "cuPointerGetAttribute(%d)", attribute);
    return virtual_gpu_note_unanswered(name);
}
EXPORT int cuStreamGetCtx(void *stream, void **c) { return (void)stream, *c = &context, SUCCESS; }
EXPORT int cuStreamSynchronize(void *stream) { return (void)stream, SUCCESS; }

EXPORT int cudaGetSymbolAddress(void **address, const void *symbol) { return (void)symbol, *address = calloc(1, 4096), SUCCESS; }
EXPORT int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height,
                             int kind, void *stream) {
    (void)stream;
    if (kind != 3) /* cudaMemcpyDeviceToDevice */
        for (size_t row = 0; row < height; row++)
            memcpy(to + row * to_pitch, from + row * from_pitch, width);
    return SUCCESS;
}
EXPORT int cudaDeviceGetPCIBusId(char *id, int bytes, int device) { return snprintf(id, bytes, "0000:%02x:00.0", device + 1), SUCCESS; }
EXPORT int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return (void)device, (void)peer, *can = 1, SUCCESS; }
EXPORT int cudaHostRegister(void) { return SUCCESS; }
EXPORT int cudaHostUnregister(void) { return SUCCESS; }
EXPORT int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { return (void)flags, *device = host, SUCCESS; }

EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status);
EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    return cudaGetDriverEntryPointByVersion(name, function, version, flags, status);
}
EXPORT int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
