/*
 * A library for LD_PRELOAD that tells a program of more room than the disk has: every filesystem has 1 TB free, and
 * preallocating a file sets its length alone. What is then written has to fit.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define TOLD(name, type, where)                                              \
    int name(where at, struct type *told) {                                  \
        int (*real)(where, struct type *) = dlsym(RTLD_NEXT, #name);         \
        int answer = real(at, told);                                         \
        if (answer == 0) {                                                   \
            told->f_blocks = told->f_bfree = told->f_bavail = 1000000000000 / told->f_frsize; \
        }                                                                    \
        return answer;                                                       \
    }

TOLD(statvfs, statvfs, const char *)
TOLD(statvfs64, statvfs64, const char *)
TOLD(fstatvfs, statvfs, int)
TOLD(fstatvfs64, statvfs64, int)

int fallocate(int fd, int mode, off_t at, off_t len) {
    (void)mode;
    return ftruncate(fd, at + len);
}

int fallocate64(int fd, int mode, off64_t at, off64_t len) {
    (void)mode;
    return ftruncate64(fd, at + len);
}
