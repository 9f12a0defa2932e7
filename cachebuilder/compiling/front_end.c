// Holds cicc, nvcc's front end, at the end of its source, and forks it there: one parse of the headers for many kernels.
//
// cicc (CUDA 13.0 to 13.5) reads its preprocessed source with getc, opens its output only when the code is there, by the relative
// name that nvcc was given, and runs in one thread. So at the end of the headers a child may go on with a text of its
// own, in a folder of its own, and is from there on a cicc like any other. The text that it read is the one that a cicc
// of its own would have read; where this does not hold for some release, nothing is held and nvcc ends as always.
//
// Loaded with LD_PRELOAD. FRONT_END_REQUESTS is a FIFO: each line names a folder that holds the rest of a source
// (rest.ii) and a FIFO (status), which gets the child's wait status. What cicc prints goes to the folder's log.txt.
// FRONT_END_HELD is a file that is made when the headers have been read. Whoever asks holds the first FIFO open from the
// beginning: at its end, which his death is, too, the held cicc ends, with no output of its own.

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
#define CANNOT_START 120 // an exit status that cicc has no use for

static FILE *source; // what is to be held at its end

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

// In the child: from here on the source is the folder's.
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

// Opens a FIFO that the other side has open, if it lives; never waits for it.
static int open_now(const char *path, int mode) {
    int file = open(path, mode | O_NONBLOCK | O_CLOEXEC);
    if (file >= 0)
        fcntl(file, F_SETFL, mode);
    return file;
}

static void say(int status_file, int status) {
    char text[16];
    int length = snprintf(text, sizeof text, "%d\n", status);
    if (write(status_file, text, length) != length)
        _exit(1);
}

// Waits for the child, and says how it ended; in a process of its own, so that the held one takes the next request.
static void report(pid_t child, int status_file) {
    int status = CANNOT_START << 8;
    if (child > 0)
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
    say(status_file, status);
    _exit(0);
}

// Serves requests; returns only in a child, which is to read on.
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
        if (status_file < 0) // nobody waits for it any more
            continue;
        pid_t reporter = fork();
        if (reporter != 0) {
            if (reporter < 0)
                say(status_file, CANNOT_START << 8);
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
        source = NULL; // the next end is the end
        character = next(file);
    }
    return character;
}

EXPORT int getc(FILE *file) { return next_character(file); }
EXPORT int _IO_getc(FILE *file) { return next_character(file); }
