/* LD_PRELOAD: faults at the n-th file call below a folder, as scripts/faults.py asks for.

   A process takes part once it has attached to a block of shared memory, through FAULTS_BLOCK or
   faults_attach(); whoever made the block counts the calls in it, arms it, and sees what was done.
   Counted are calls that change files: open for writing, write, fsync, rename, unlink, mkdir,
   truncate. Reads, and what is written through a mapping, are not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum action { NONE, KILL_BEFORE, KILL_WITHIN, KILL_AFTER, FAIL, SHORT };

struct block {
    long calls;        /* so far, of all attached processes */
    long first, last;  /* the calls that are met, counted from 1 */
    long action;       /* enum action */
    long error;        /* errno of FAIL */
    long done;         /* calls that were */
    long always;       /* errno of every call, while it is not 0: a disk that is full for a while */
    long clock;        /* seconds that are added to the time of day */
    char folder[512];
};

static struct block *block;

void faults_attach(const char *path) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    int file = real(path, O_RDWR);
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct block), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (found != MAP_FAILED) block = found;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_BLOCK");
    if (path) faults_attach(path);
}

static int is_below(const char *path) {
    size_t length = strlen(block->folder);
    return length && strncmp(path, block->folder, length) == 0;
}

static int path_is_ours(int folder, const char *name) {
    char link[64], full[4096];
    if (!block || !name) return 0;
    if (name[0] == '/') return is_below(name);
    if (folder == AT_FDCWD) {
        if (!getcwd(full, sizeof full)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, full, sizeof full - 1);
        if (n < 0) return 0;
        full[n] = 0;
    }
    return is_below(full);
}

static int file_is_ours(int file) { return path_is_ours(file, ""); }

/* What to do of this call: 0 as asked, -1 fail with errno, 1 a part of it, then *after. */
static int met(int can_fail, int is_write, int *after) {
    *after = 0;
    if (block->always && can_fail) {
        __atomic_add_fetch(&block->done, 1, __ATOMIC_SEQ_CST);
        errno = (int)block->always;
        return -1;
    }
    long number = __atomic_add_fetch(&block->calls, 1, __ATOMIC_SEQ_CST);
    if (block->action == NONE || number < block->first || number > block->last) return 0;
    if ((block->action == FAIL && !can_fail) || (block->action == SHORT && !is_write)) return 0;
    __atomic_add_fetch(&block->done, 1, __ATOMIC_SEQ_CST);
    switch (block->action) {
        case KILL_WITHIN:
            *after = 1;
            if (is_write) return 1; /* fall through: what is no write has no part */
        case KILL_BEFORE: kill(getpid(), SIGKILL); break;
        case KILL_AFTER: *after = 1; break;
        case FAIL: errno = (int)block->error; return -1;
        case SHORT: return 1;
    }
    return 0;
}

static void end(int after) {
    if (after) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* A call of `name` that is ours or not: its real one, or the fault. */
#define GUARDED(type, ours, name, arguments)        \
    int after;                                      \
    if (!block || !(ours)) return REAL(name) arguments; \
    if (met(1, 0, &after) < 0) return -1;           \
    type result = REAL(name) arguments;             \
    end(after);                                     \
    return result;
/* ... that makes room, which no full disk bars. */
#define FREEING(type, ours, name, arguments)        \
    int after;                                      \
    if (!block || !(ours)) return REAL(name) arguments; \
    int full = block->always == ENOSPC || (block->action == FAIL && block->error == ENOSPC); \
    if (met(!full, 0, &after) < 0) return -1;       \
    type result = REAL(name) arguments;             \
    end(after);                                     \
    return result;
#define WRITING(name, file, count, whole, part)     \
    int after;                                      \
    if (!block || !file_is_ours(file)) return REAL(name) whole; \
    int how = met(1, (count) > 1, &after);          \
    if (how < 0) return -1;                         \
    ssize_t result = how ? REAL(name) part : REAL(name) whole; \
    end(after);                                     \
    return result;

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define OPENED(name)                                                       \
    int name(const char *path, int flags, ...) {                           \
        mode_t mode = 0;                                                   \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        if (flags & (O_CREAT | __O_TMPFILE)) mode = va_arg(rest, mode_t);  \
        va_end(rest);                                                      \
        GUARDED(int, changes(flags) && path_is_ours(AT_FDCWD, path), name, (path, flags, mode)) \
    }
OPENED(open)
OPENED(open64)
#define OPENED_AT(name)                                                    \
    int name(int folder, const char *path, int flags, ...) {               \
        mode_t mode = 0;                                                   \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        if (flags & (O_CREAT | __O_TMPFILE)) mode = va_arg(rest, mode_t);  \
        va_end(rest);                                                      \
        GUARDED(int, changes(flags) && path_is_ours(folder, path), name, (folder, path, flags, mode)) \
    }
OPENED_AT(openat)
OPENED_AT(openat64)

ssize_t write(int file, const void *data, size_t n) { WRITING(write, file, n, (file, data, n), (file, data, n / 2)) }
ssize_t pwrite(int file, const void *data, size_t n, off_t at) { WRITING(pwrite, file, n, (file, data, n, at), (file, data, n / 2, at)) }
ssize_t pwrite64(int file, const void *data, size_t n, off64_t at) { WRITING(pwrite64, file, n, (file, data, n, at), (file, data, n / 2, at)) }
ssize_t writev(int file, const struct iovec *parts, int n) { WRITING(writev, file, n, (file, parts, n), (file, parts, n / 2)) }

int fsync(int file) { GUARDED(int, file_is_ours(file), fsync, (file)) }
int fdatasync(int file) { GUARDED(int, file_is_ours(file), fdatasync, (file)) }
int rename(const char *a, const char *b) { GUARDED(int, path_is_ours(AT_FDCWD, b), rename, (a, b)) }
int renameat(int f, const char *a, int g, const char *b) { GUARDED(int, path_is_ours(g, b), renameat, (f, a, g, b)) }
int mkdir(const char *path, mode_t mode) { GUARDED(int, path_is_ours(AT_FDCWD, path), mkdir, (path, mode)) }
int mkdirat(int folder, const char *path, mode_t mode) { GUARDED(int, path_is_ours(folder, path), mkdirat, (folder, path, mode)) }
int unlink(const char *path) { FREEING(int, path_is_ours(AT_FDCWD, path), unlink, (path)) }
int unlinkat(int folder, const char *path, int flags) { FREEING(int, path_is_ours(folder, path), unlinkat, (folder, path, flags)) }
int rmdir(const char *path) { FREEING(int, path_is_ours(AT_FDCWD, path), rmdir, (path)) }
int ftruncate(int file, off_t size) { FREEING(int, file_is_ours(file), ftruncate, (file, size)) }
int ftruncate64(int file, off64_t size) { FREEING(int, file_is_ours(file), ftruncate64, (file, size)) }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (block && clock == CLOCK_REALTIME) now->tv_sec += block->clock;
    return result;
}
