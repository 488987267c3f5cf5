/*
 * LD_PRELOAD library that counts the calls by which a program changes one folder, and injects a fault at the n-th.
 *
 * It overrides functions of the C library. A call on a path or descriptor below SHIM_ROOT is counted; every other call
 * is passed on unchanged. Environment variables configure it:
 *
 *   SHIM_ROOT     the folder, as an absolute path without symbolic links
 *   SHIM_LOG      a file outside the folder: one line "number call path" for each counted call, before it is made
 *   SHIM_READS=1  also counts calls that open, list and read
 *   SHIM_KILL_AT  kills the process (SIGKILL) before the call with this number
 *   SHIM_FAIL_AT  makes the call with this number fail with SHIM_ERRNO; with SHIM_STICKY=1 every later call fails, too
 *   SHIM_OF       names of functions, separated by commas: SHIM_FAIL_AT then counts only calls of these. Two names are
 *                 more precise than the function: `rmdir` is any call that removes a folder, `fsync_folder` is the sync
 *                 of a folder
 *   SHIM_FLOCK    "lies": flock succeeds without locking; "refuses": flock fails with ENOLCK (on any path, uncounted)
 *   SHIM_BOOT_ID  a file that is opened in place of /proc/sys/kernel/random/boot_id
 *   SHIM_AHEAD    seconds by which CLOCK_BOOTTIME is ahead
 *   SHIM_GATE     a file: fsync, fdatasync and syncfs below the folder wait until it exists
 *   SHIM_LEDGER   a file outside the folder that records which changes a power cut may lose, one per line:
 *                   D device inode       before a call changes the content of this file
 *                   S device inode path  after fsync or fdatasync of this file or folder
 *                   A                    after syncfs, which makes everything durable
 *                   N path               after a name was created
 *                   R path               after a name was replaced
 *
 * A write that is made to fail writes nothing. System calls that bypass the C library are not seen.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const char *root, *log_path, *flock_mode, *of, *boot_id, *gate, *ledger_path;
static size_t root_len;
static long kill_at, fail_at, fail_errno, ahead;
static int sticky, count_reads;
static atomic_long calls, calls_of;

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

__attribute__((constructor)) static void start(void) {
    root = getenv("SHIM_ROOT");
    root_len = root ? strlen(root) : 0;
    log_path = getenv("SHIM_LOG");
    flock_mode = getenv("SHIM_FLOCK");
    of = getenv("SHIM_OF");
    boot_id = getenv("SHIM_BOOT_ID");
    gate = getenv("SHIM_GATE");
    ledger_path = getenv("SHIM_LEDGER");
    kill_at = number("SHIM_KILL_AT");
    fail_at = number("SHIM_FAIL_AT");
    fail_errno = number("SHIM_ERRNO");
    ahead = number("SHIM_AHEAD");
    sticky = number("SHIM_STICKY") != 0;
    count_reads = number("SHIM_READS") != 0;
}

/* Returns nonzero if `path`, resolved against the folder `at`, is the root or below it. `full` gets the full path. */
static int path_is_ours(int at, const char *path, char full[PATH_MAX]) {
    char base[PATH_MAX] = "", link[64];
    if (!root || !path) return 0;
    if (path[0] != '/') {
        if (at == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t len = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
        if (len < 0) return 0;
        base[len] = 0;
    }
    if (snprintf(full, PATH_MAX, "%s%s%s", base, path[0] == '/' || !*path ? "" : "/", path) >= PATH_MAX) return 0;
    return strncmp(full, root, root_len) == 0 && (full[root_len] == '/' || full[root_len] == 0);
}

static int fd_is_ours(int fd, char full[PATH_MAX]) {
    /* Descriptors 0 to 2 are the standard streams, never files below the root. */
    int saved = errno, ours = fd > 2 && path_is_ours(fd, "", full);
    errno = saved;
    return ours;
}

/* Returns nonzero if the list `of` contains `call`. */
static int is_selected(const char *call) {
    size_t len = strlen(call);
    for (const char *at = of; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, call, len) == 0 && (at[len] == ',' || at[len] == 0)) return 1;
    }
    return 0;
}

/* Counts a call on a file below the root. Returns nonzero, with errno set, if the call has to fail. */
static int strike(const char *call, const char *path) {
    int saved = errno;
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (log_path) {
        char line[PATH_MAX + 64];
        int len = snprintf(line, sizeof line, "%ld %s %s\n", n, call, path);
        /* Raw system calls, because `open` and `write` of this library would count themselves. */
        int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (fd >= 0) {
            syscall(SYS_write, fd, line, len);
            syscall(SYS_close, fd);
        }
    }
    if (kill_at && n == kill_at) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
    /* SHIM_OF: number the calls of this function on their own. Calls of other functions get 0, which never fails. */
    if (of) n = is_selected(call) ? atomic_fetch_add(&calls_of, 1) + 1 : 0;
    int fails = fail_at && (n == fail_at || (sticky && n > fail_at));
    errno = fails ? fail_errno : saved;
    return fails;
}

/* Appends a line to the ledger. */
static void note(const char *format, ...) {
    char line[PATH_MAX + 64];
    int saved = errno;
    va_list rest;
    if (!ledger_path) return;
    va_start(rest, format);
    int len = vsnprintf(line, sizeof line, format, rest);
    va_end(rest);
    int fd = syscall(SYS_openat, AT_FDCWD, ledger_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, len);
        syscall(SYS_close, fd);
    }
    errno = saved;
}

/* Records that the content of a file is about to change. */
static void dirty(int fd) {
    struct stat found;
    int saved = errno;
    if (ledger_path && fstat(fd, &found) == 0) note("D %ld %ld\n", (long)found.st_dev, (long)found.st_ino);
    errno = saved;
}

/* Returns nonzero if a ledger is kept and `full` exists. Does not follow symbolic links. */
static int exists(const char *full) {
    int saved = errno, there = ledger_path && faccessat(AT_FDCWD, full, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    errno = saved;
    return there;
}

static void wait_at_gate(void) {
    while (gate && syscall(SYS_faccessat, AT_FDCWD, gate, F_OK) != 0) usleep(2000);
}

/* Returns the path to open in place of `path`. */
static const char *which(const char *path) {
    return boot_id && path && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0 ? boot_id : path;
}

/* NEXT(name)(…) calls the C library's function. */
#define NEXT(name) ((__typeof__(&name))next(#name))
static void *next(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) abort();
    return function;
}

/* Passes a system call on, because programs read clocks too often for `dlsym`. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    int got = syscall(SYS_clock_gettime, clock, now);
    if (got == 0 && clock == CLOCK_BOOTTIME) now->tv_sec += ahead;
    return got;
}

/* Defines the override of a function that takes a path. `params` declares its parameters; `args` passes them on. */
#define ON_PATH(ret, failed, name, params, at, path, args) \
    ret name params {                                      \
        char full[PATH_MAX];                               \
        if (path_is_ours(at, path, full) && strike(#name, full)) return failed; \
        return NEXT(name) args;                            \
    }
#define ON_FD(ret, name, params, fd, args)                 \
    ret name params {                                      \
        char full[PATH_MAX];                               \
        if (fd_is_ours(fd, full) && strike(#name, full)) return -1; \
        return NEXT(name) args;                            \
    }
/* Overrides a function that changes the content of a file. */
#define ON_BYTES(ret, name, params, fd, args)              \
    ret name params {                                      \
        char full[PATH_MAX];                               \
        int ours = fd_is_ours(fd, full);                   \
        if (ours && strike(#name, full)) return -1;        \
        if (ours) dirty(fd);                               \
        return NEXT(name) args;                            \
    }
/* Overrides a function that creates a name. */
#define ON_NAME(ret, name, params, at, path, args)         \
    ret name params {                                      \
        char full[PATH_MAX];                               \
        int ours = path_is_ours(at, path, full);           \
        if (ours && strike(#name, full)) return -1;        \
        int taken = ours && exists(full);                  \
        ret made = NEXT(name) args;                        \
        if (ours && made == 0) note("%s %s\n", taken ? "R" : "N", full); \
        return made;                                       \
    }

/* Opening. A call that may create or truncate a file changes the folder; any other call only reads. */
static int open_fails(const char *call, int at, const char *path, int flags) {
    char full[PATH_MAX];
    int changes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE;
    return (changes || count_reads) && path_is_ours(at, path, full) && strike(changes ? "create" : call, full);
}
#define WITH_MODE(flags)                                                     \
    mode_t mode = 0;                                                         \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) {         \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode = va_arg(rest, mode_t);                                         \
        va_end(rest);                                                        \
    }
#define OPENED(at, path, flags, call)                                        \
    char full[PATH_MAX];                                                     \
    if (open_fails("open", at, path, flags)) return -1;                      \
    int makes = ((flags) & O_CREAT) && ledger_path && path_is_ours(at, path, full) && !exists(full); \
    int made = call;                                                         \
    if (makes && made >= 0) note("N %s\n", full);                            \
    return made;
int open(const char *path, int flags, ...) {
    WITH_MODE(flags)
    OPENED(AT_FDCWD, path, flags, NEXT(open)(which(path), flags, mode))
}
int open64(const char *path, int flags, ...) {
    WITH_MODE(flags)
    OPENED(AT_FDCWD, path, flags, NEXT(open64)(which(path), flags, mode))
}
int openat(int at, const char *path, int flags, ...) {
    WITH_MODE(flags)
    OPENED(at, path, flags, NEXT(openat)(at, which(path), flags, mode))
}
int openat64(int at, const char *path, int flags, ...) {
    WITH_MODE(flags)
    OPENED(at, path, flags, NEXT(openat64)(at, which(path), flags, mode))
}
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
DIR *opendir(const char *path) {
    char full[PATH_MAX];
    if (count_reads && path_is_ours(AT_FDCWD, path, full) && strike("opendir", full)) return NULL;
    return NEXT(opendir)(path);
}

/* Reading. Counted only with SHIM_READS. */
#define ON_READ(name, params, fd, args)                    \
    ssize_t name params {                                  \
        char full[PATH_MAX];                               \
        if (count_reads && fd_is_ours(fd, full) && strike(#name, full)) return -1; \
        return NEXT(name) args;                            \
    }
ON_READ(read, (int fd, void *to, size_t len), fd, (fd, to, len))
ON_READ(pread, (int fd, void *to, size_t len, off_t at), fd, (fd, to, len, at))
ON_READ(pread64, (int fd, void *to, size_t len, off64_t at), fd, (fd, to, len, at))

/* Writing. */
ON_BYTES(ssize_t, write, (int fd, const void *from, size_t len), fd, (fd, from, len))
ON_BYTES(ssize_t, writev, (int fd, const struct iovec *from, int count), fd, (fd, from, count))
ON_BYTES(ssize_t, pwrite, (int fd, const void *from, size_t len, off_t at), fd, (fd, from, len, at))
ON_BYTES(ssize_t, pwrite64, (int fd, const void *from, size_t len, off64_t at), fd, (fd, from, len, at))
ON_BYTES(ssize_t, pwritev, (int fd, const struct iovec *from, int count, off_t at), fd, (fd, from, count, at))
ON_BYTES(ssize_t, copy_file_range, (int in, off64_t *from, int out, off64_t *to, size_t len, unsigned flags), out,
      (in, from, out, to, len, flags))
ON_BYTES(ssize_t, sendfile, (int out, int in, off_t *from, size_t len), out, (out, in, from, len))
ON_BYTES(ssize_t, sendfile64, (int out, int in, off64_t *from, size_t len), out, (out, in, from, len))
ON_BYTES(int, ftruncate, (int fd, off_t len), fd, (fd, len))
ON_BYTES(int, ftruncate64, (int fd, off64_t len), fd, (fd, len))
ON_BYTES(int, fallocate, (int fd, int mode, off_t at, off_t len), fd, (fd, mode, at, len))
ON_BYTES(int, fallocate64, (int fd, int mode, off64_t at, off64_t len), fd, (fd, mode, at, len))

/* Syncing. The ledger line is written only after the call succeeded. */
#define ON_SYNC(name)                                      \
    int name(int fd) {                                     \
        char full[PATH_MAX];                               \
        struct stat found;                                 \
        int ours = fd_is_ours(fd, full);                   \
        int is_folder = ours && fstat(fd, &found) == 0 && S_ISDIR(found.st_mode); \
        if (ours && strike(is_folder ? "fsync_folder" : #name, full)) return -1;  \
        if (ours) wait_at_gate();                          \
        int failed = NEXT(name)(fd);                       \
        if (ours && !failed && ledger_path && fstat(fd, &found) == 0)       \
            note("S %ld %ld %s\n", (long)found.st_dev, (long)found.st_ino, full); \
        return failed;                                     \
    }
ON_SYNC(fsync)
ON_SYNC(fdatasync)
int syncfs(int fd) {
    char full[PATH_MAX];
    int ours = fd_is_ours(fd, full);
    if (ours && strike("syncfs", full)) return -1;
    if (ours) wait_at_gate();
    int failed = NEXT(syncfs)(fd);
    if (ours && !failed) note("A\n");
    return failed;
}

/* Names. A call with two paths is counted by the path that it creates. */
ON_NAME(int, mkdir, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
ON_NAME(int, mkdirat, (int at, const char *path, mode_t mode), at, path, (at, path, mode))
ON_PATH(int, -1, rmdir, (const char *path), AT_FDCWD, path, (path))
ON_PATH(int, -1, unlink, (const char *path), AT_FDCWD, path, (path))
int unlinkat(int at, const char *path, int flags) {
    char full[PATH_MAX];
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlinkat";
    if (path_is_ours(at, path, full) && strike(call, full)) return -1;
    return NEXT(unlinkat)(at, path, flags);
}
ON_NAME(int, rename, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_NAME(int, renameat, (int a, const char *from, int b, const char *to), b, to, (a, from, b, to))
ON_NAME(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), b, to,
        (a, from, b, to, flags))
ON_NAME(int, link, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_NAME(int, linkat, (int a, const char *from, int b, const char *to, int flags), b, to, (a, from, b, to, flags))
ON_NAME(int, symlink, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_NAME(int, symlinkat, (const char *from, int at, const char *to), at, to, (from, at, to))

/* Modes and times. */
ON_PATH(int, -1, chmod, (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))
ON_PATH(int, -1, fchmodat, (int at, const char *path, mode_t mode, int flags), at, path, (at, path, mode, flags))
ON_FD(int, fchmod, (int fd, mode_t mode), fd, (fd, mode))
ON_FD(int, futimens, (int fd, const struct timespec times[2]), fd, (fd, times))
ON_PATH(int, -1, utimensat, (int at, const char *path, const struct timespec times[2], int flags), at, path,
        (at, path, times, flags))

/* Locks change no file, so they are never counted. SHIM_FLOCK applies to every path. */
int flock(int fd, int operation) {
    if (flock_mode && strcmp(flock_mode, "lies") == 0) return 0;
    if (flock_mode && strcmp(flock_mode, "refuses") == 0) {
        errno = ENOLCK;
        return -1;
    }
    return NEXT(flock)(fd, operation);
}
