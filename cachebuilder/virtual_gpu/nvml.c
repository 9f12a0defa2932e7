/* A virtual libnvidia-ml.so.1: by it, engines recognise the platform and name the card. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtual_gpu.h"

#define NOT_FOUND 6
#define NVML_NOT_SUPPORTED 3

static const char *setting(const char *name) {
    const char *text = getenv(name);
    return text ? text : "";
}
static int count(void) { return *setting("VIRTUAL_GPU_COUNT") ? atoi(setting("VIRTUAL_GPU_COUNT")) : 1; }
static int copy(char *to, unsigned bytes, const char *text) { return snprintf(to, bytes, "%s", text), SUCCESS; }

EXPORT int nvmlInit(void) { return SUCCESS; }
EXPORT int nvmlInit_v2(void) { return SUCCESS; }
EXPORT int nvmlInitWithFlags(unsigned flags) { return (void)flags, SUCCESS; }
EXPORT int nvmlShutdown(void) { return SUCCESS; }
EXPORT const char *nvmlErrorString(int error) { return error ? "not answered by the virtual GPU" : "success"; }
EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned bytes) { return copy(version, bytes, "580.95.05"); }
EXPORT int nvmlSystemGetCudaDriverVersion(int *version) { return *version = 13000, SUCCESS; }
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
EXPORT int nvmlDeviceGetCount(unsigned *devices) { return *devices = count(), SUCCESS; }
EXPORT int nvmlDeviceGetCount_v2(unsigned *devices) { return *devices = count(), SUCCESS; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= (unsigned)count())
        return NOT_FOUND;
    return *device = (void *)(size_t)(index + 1), SUCCESS;
}
EXPORT int nvmlDeviceGetHandleByIndex(unsigned index, void **device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }
EXPORT int nvmlDeviceGetIndex(void *device, unsigned *index) { return *index = (size_t)device - 1, SUCCESS; }
EXPORT int nvmlDeviceGetName(void *device, char *name, unsigned bytes) {
    return (void)device, copy(name, bytes, setting("VIRTUAL_GPU_NAME"));
}
EXPORT int nvmlDeviceGetUUID(void *device, char *uuid, unsigned bytes) {
    return snprintf(uuid, bytes, "GPU-00000000-0000-0000-0000-%012zx", (size_t)device), SUCCESS;
}
EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    return *device = (void *)(size_t)strtoul(uuid + strlen(uuid) - 12, NULL, 16), SUCCESS;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    (void)device;
    *major = atoi(setting("VIRTUAL_GPU_MAJOR"));
    *minor = atoi(setting("VIRTUAL_GPU_MINOR"));
    return SUCCESS;
}
struct memory { unsigned long long total, free, used; };
EXPORT int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    (void)device;
    memory->total = memory->free = strtoull(setting("VIRTUAL_GPU_MEMORY_BYTES"), NULL, 10);
    return memory->used = 0, SUCCESS;
}
/* Every pair is joined by NVLink (NVML_P2P_STATUS_OK). */
EXPORT int nvmlDeviceGetP2PStatus(void *a, void *b, int kind, int *status) {
    return (void)a, (void)b, (void)kind, *status = 0, SUCCESS;
}
EXPORT int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    return (void)device, (void)current, (void)pending, NVML_NOT_SUPPORTED;
}
