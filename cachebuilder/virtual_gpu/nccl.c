/* A virtual libnccl.so.2 for one rank of many, which engines load by name. A collective writes device memory only. */
#include <stdlib.h>
#include <string.h>

#include "virtual_gpu.h"

#define NOT_ANSWERED 1

struct unique_id { char bytes[128]; }; /* ncclUniqueId of nccl.h */

EXPORT int ncclGetVersion(int *version) { return *version = 22800, SUCCESS; }
EXPORT const char *ncclGetErrorString(int error) { return error ? "not answered by the virtual NCCL" : "no error"; }
EXPORT int ncclGetUniqueId(struct unique_id *id) { return memset(id, 0, sizeof *id), SUCCESS; }
EXPORT int ncclCommInitRank(void **group, int ranks, struct unique_id id, int rank) {
    return (void)ranks, (void)id, (void)rank, *group = malloc(1), SUCCESS;
}
EXPORT int ncclCommInitRankConfig(void **group, int ranks, struct unique_id id, int rank, void *config) {
    return (void)config, ncclCommInitRank(group, ranks, id, rank);
}
EXPORT int ncclCommDestroy(void *group) { return free(group), SUCCESS; }
EXPORT int ncclCommAbort(void *group) { return free(group), SUCCESS; }
EXPORT int ncclMemAlloc(void **memory, size_t bytes) { return (void)memory, (void)bytes, NOT_ANSWERED; }
EXPORT int ncclMemFree(void *memory) { return (void)memory, NOT_ANSWERED; }
EXPORT int ncclGroupStart(void) { return SUCCESS; }
EXPORT int ncclGroupEnd(void) { return SUCCESS; }
EXPORT int ncclAllReduce(void) { return SUCCESS; }
EXPORT int ncclReduce(void) { return SUCCESS; }
EXPORT int ncclAllGather(void) { return SUCCESS; }
EXPORT int ncclReduceScatter(void) { return SUCCESS; }
EXPORT int ncclBroadcast(void) { return SUCCESS; }
EXPORT int ncclSend(void) { return SUCCESS; }
EXPORT int ncclRecv(void) { return SUCCESS; }
EXPORT int ncclCommWindowRegister(void *group, void *memory, size_t bytes, void **window, int flags) {
    return (void)group, (void)memory, (void)bytes, (void)flags, *window = malloc(1), SUCCESS;
}
EXPORT int ncclCommWindowDeregister(void *group, void *window) { return (void)group, free(window), SUCCESS; }
