/* Streams, events and graphs of the runtime. Nothing runs, so all is complete at once.
 *
 * A stream is captured from cudaStreamBeginCapture to cudaStreamEndCapture. An event that is recorded on it carries the
 * capture to each stream that waits for the event, as the CUDA programming guide says. Launches do nothing in either
 * case, so a graph holds nothing, and to launch it does nothing.
 */
#include "virtual_gpu.h"
#include <stdlib.h>

/* A capture, which is also the graph that it ends in. It is never freed: events may still lead to it. */
struct capture {
    unsigned long long id;
    int active;
};
/* A stream or an event. */
struct handle {
    struct capture *capture;
};

static unsigned long long captures;

int new_handle(void **handle) { return *handle = calloc(1, sizeof(struct handle)), SUCCESS; }
int drop_handle(void *handle) { return free(handle), SUCCESS; }

/* The capture that a stream or an event is in; NULL for none. 0, 1 and 2 are the default streams, which have none. */
static struct capture *capture_of(const void *handle) {
    if ((uintptr_t)handle <= 2)
        return NULL;
    struct capture *capture = ((const struct handle *)handle)->capture;
    return capture && capture->active ? capture : NULL;
}

EXPORT int cudaStreamCreate(void **s) { return new_handle(s); }
EXPORT int cudaStreamCreateWithFlags(void **s, unsigned flags) { return (void)flags, new_handle(s); }
EXPORT int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { return (void)f, (void)p, new_handle(s); }
EXPORT int cudaStreamGetPriority(void *s, int *priority) { return (void)s, *priority = 0, SUCCESS; }
EXPORT int cudaStreamDestroy(void *s) { return drop_handle(s); }
EXPORT int cudaStreamSynchronize(void *s) { return (void)s, SUCCESS; }
EXPORT int cudaStreamQuery(void *s) { return (void)s, SUCCESS; }
EXPORT int cudaStreamWaitEvent(void *s, void *e, unsigned flags) {
    (void)flags;
    if ((uintptr_t)s > 2 && capture_of(e))
        ((struct handle *)s)->capture = capture_of(e);
    return SUCCESS;
}

EXPORT int cudaEventCreate(void **e) { return new_handle(e); }
EXPORT int cudaEventCreateWithFlags(void **e, unsigned flags) { return (void)flags, new_handle(e); }
EXPORT int cudaEventDestroy(void *e) { return drop_handle(e); }
EXPORT int cudaEventRecord(void *e, void *s) { return ((struct handle *)e)->capture = capture_of(s), SUCCESS; }
EXPORT int cudaEventRecordWithFlags(void *e, void *s, unsigned flags) { return (void)flags, cudaEventRecord(e, s); }
EXPORT int cudaEventQuery(void *e) { return (void)e, SUCCESS; }
EXPORT int cudaEventSynchronize(void *e) { return (void)e, SUCCESS; }
EXPORT int cudaEventElapsedTime(float *ms, void *a, void *b) { return (void)a, (void)b, *ms = 1, SUCCESS; }

/* The driver's events, which the runtime takes as well */
EXPORT int cuEventCreate(void **e, unsigned flags) { return (void)flags, new_handle(e); }
EXPORT int cuEventRecord(void *e, void *s) { return cudaEventRecord(e, s); }
EXPORT int cuEventSynchronize(void *e) { return (void)e, SUCCESS; }
EXPORT int cuEventElapsedTime(float *ms, void *a, void *b) { return cudaEventElapsedTime(ms, a, b); }
EXPORT int cuEventDestroy(void *e) { return drop_handle(e); }
EXPORT int cuEventDestroy_v2(void *e) { return drop_handle(e); }

EXPORT int cudaStreamBeginCapture(void *s, int mode) {
    (void)mode;
    if ((uintptr_t)s <= 2 || capture_of(s))
        return INVALID_VALUE;
    struct capture *capture = calloc(1, sizeof *capture);
    capture->id = __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED);
    capture->active = 1;
    ((struct handle *)s)->capture = capture;
    return SUCCESS;
}
EXPORT int cudaStreamEndCapture(void *s, void **graph) {
    struct capture *capture = capture_of(s);
    if (!capture)
        return INVALID_VALUE;
    return capture->active = 0, *graph = capture, SUCCESS;
}
EXPORT int cudaStreamIsCapturing(void *s, int *status) { return *status = capture_of(s) != NULL, SUCCESS; }
EXPORT int cudaStreamGetCaptureInfo(
    void *s, int *status, unsigned long long *id
#if CUDART_MAJOR >= 13
    , void **graph, void **nodes, void **edges, size_t *count
#endif
) {
    struct capture *capture = capture_of(s);
    if (capture && id)
        *id = capture->id;
#if CUDART_MAJOR >= 13
    if (capture && graph)
        *graph = capture;
    if (nodes)
        *nodes = NULL; /* a graph has no nodes here that the next one could depend on */
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
#endif
    return *status = capture != NULL, SUCCESS;
}
#if CUDART_MAJOR < 13
/* The later arguments, for the graph's nodes, are those of CUDA 13's cudaStreamGetCaptureInfo */
EXPORT int cudaStreamGetCaptureInfo_v2(
    void *s, int *status, unsigned long long *id, void **graph, void **nodes, size_t *count) {
    if (graph)
        *graph = capture_of(s);
    if (nodes)
        *nodes = NULL;
    if (count)
        *count = 0;
    return cudaStreamGetCaptureInfo(s, status, id);
}
#endif
EXPORT int cudaThreadExchangeStreamCaptureMode(int *mode) { return (void)mode, SUCCESS; }

EXPORT int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    return (void)graph, (void)flags, new_handle(executable);
}
/* One node, since torch warns of an empty graph */
EXPORT int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
    (void)graph;
    return nodes ? virtual_gpu_note_unanswered("cudaGraphGetNodes") : (*count = 1, SUCCESS);
}
EXPORT int cudaGraphLaunch(void *executable, void *s) { return (void)executable, (void)s, SUCCESS; }
EXPORT int cudaGraphDestroy(void *graph) { return (void)graph, SUCCESS; }
EXPORT int cudaGraphExecDestroy(void *executable) { return drop_handle(executable); }
