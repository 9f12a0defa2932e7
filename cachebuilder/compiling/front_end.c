// Holds cicc, nvcc's front end, at the end of its source and forks it there, so that many kernels share one parse of the
// headers.
//
// cicc (CUDA 13.0 to 13.5) reads its preprocessed source with getc, runs in one thread, and opens its output only when
// the code is complete, by the relative name that nvcc was given. At the end of the headers a fork can therefore change
// to a folder of its own, read on in a source of its own, and write its output there. The fork has read the same text
// as an ordinary cicc. If a release of cicc works differently, it is not held, and nvcc ends as it does without this
// library.
//
// This library is loaded with LD_PRELOAD. FRONT_END_REQUESTS names a FIFO. Each line in it names a folder that holds the
// rest of a source (rest.ii) and a FIFO (status), into which the fork's wait status is written. What cicc prints goes to
// log.txt in that folder. FRONT_END_HELD names a file that is created when the headers have been read. The process that
// sends the requests opens FRONT_END_REQUESTS before it starts nvcc; the held cicc ends when that process closes the
// FIFO or ends, even if it is killed. The held cicc writes no output of its own.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define CANNOT_START 120 // an exit status that cicc does not use

static FILE *source; // cicc is held at the end of this file

static int is_source(const char *path) {
    const char *dot = strrchr(path, '.');
    return dot && !strcmp(dot, ".ii") && !strcmp(program_invocation_short_name, "cicc") && getenv("FRONT_END_REQUESTS");
}

static FILE *open_with(const char *function, const char *path, const char *mode) {
    FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, function);
    FILE *file = next(path, mode);
    if (file && !source && is_source(path))
        source = file;
    return file;
}

EXPORT FILE *fopen(const char *path, const char *mode) { return open_with("fopen", path, mode); }
EXPORT FILE *fopen64(const char *path, const char *mode) { return open_with("fopen64", path, mode); }

// Runs in the fork: makes it read on in the folder's source and print to the folder's log.
static void go_on_in(const char *folder) {
    int rest, log;
    if (chdir(folder) || (rest = open("rest.ii", O_RDONLY)) < 0 ||
        (log = open("log.txt", O_WRONLY | O_CREAT | O_TRUNC, 0644)) < 0 || dup2(rest, fileno(source)) < 0 ||
        dup2(log, 1) < 0 || dup2(log, 2) < 0)
        _exit(CANNOT_START);
    close(rest);
    close(log);
    clearerr(source);
}

// Opens a FIFO that the other process has opened already. Does not wait, even if that process has ended.
static int open_now(const char *path, int mode) {
    int file = open(path, mode | O_NONBLOCK | O_CLOEXEC);
    if (file >= 0)
        fcntl(file, F_SETFL, mode);
    return file;
}

static void write_status(int status_file, int status) {
    char text[16];
    int length = snprintf(text, sizeof text, "%d\n", status);
    if (write(status_file, text, length) != length)
        _exit(1);
}

// Waits for the fork and writes its wait status. Runs in a process of its own, so that the held cicc can take the next
// request.
static void report(pid_t child, int status_file) {
    int status = CANNOT_START << 8;
    if (child > 0)
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
    write_status(status_file, status);
    _exit(0);
}

// Serves requests. Returns only in a fork, which then reads its own source.
static void serve(void) {
    char folder[4096], status_path[4200];
    int requests_file = open_now(getenv("FRONT_END_REQUESTS"), O_RDONLY);
    FILE *requests = requests_file < 0 ? NULL : fdopen(requests_file, "r");
    close(open(getenv("FRONT_END_HELD"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
    while (requests && fgets(folder, sizeof folder, requests)) {
        folder[strcspn(folder, "\n")] = 0;
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        snprintf(status_path, sizeof status_path, "%s/status", folder);
        int status_file = open_now(status_path, O_WRONLY);
        if (status_file < 0) // the process that asked has ended
            continue;
        pid_t reporter = fork();
        if (reporter != 0) {
            if (reporter < 0)
                write_status(status_file, CANNOT_START << 8);
            close(status_file);
            continue;
        }
        pid_t child = fork();
        if (child)
            report(child, status_file);
        close(status_file);
        fclose(requests);
        go_on_in(folder);
        return;
    }
    while (wait(NULL) > 0)
        ;
    _exit(0);
}

static int next_character(FILE *file) {
    static int (*next)(FILE *);
    if (!next)
        next = dlsym(RTLD_NEXT, "getc");
    int character = next(file);
    if (character == EOF && file == source && source) {
        serve();
        source = NULL; // in a fork: the end of its own source is an ordinary end of file
        character = next(file);
    }
    return character;
}

EXPORT int getc(FILE *file) { return next_character(file); }
EXPORT int _IO_getc(FILE *file) { return next_character(file); }
