/* What the files of the virtual GPU share. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define SUCCESS 0
#define INVALID_VALUE 1 /* this and the next are the same in the runtime and the driver */
#define OUT_OF_MEMORY 2
#define SYMBOL_NOT_FOUND 500
#define INVALID_IMAGE 200
#define FILE_NOT_FOUND 301
#define NOT_SUPPORTED 801

/* Notes a call that has no answer; returns NOT_SUPPORTED. */
int virtual_gpu_note_unanswered(const char *name);
/* A number of the environment that describes the device (VIRTUAL_GPU_…); aborts where it is not set. */
long virtual_gpu_property(const char *name);
/* Make or drop something that is no more than a name to its caller: a stream, an event, a descriptor. */
int new_handle(void **handle);
int drop_handle(void *handle);
/* The number of devices: VIRTUAL_GPU_COUNT, else 1. */
int virtual_gpu_count(void);
/* The path of the library with this number, or of a kernel from memory its name; NULL if there is none. */
const char *virtual_gpu_library_path(uint32_t number);
