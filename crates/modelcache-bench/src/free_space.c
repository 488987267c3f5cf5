/*
 * LD_PRELOAD library that reports more free space than the disk has: every filesystem has 1 TB free, and preallocating
 * a file only sets its length. The data written later still has to fit on
 * the disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define OVERRIDE(name, type, where)                                          \
    int name(where at, struct type *space) {                                 \
        int (*real)(where, struct type *) = dlsym(RTLD_NEXT, #name);         \
        int result = real(at, space);                                        \
        if (result == 0) {                                                   \
            space->f_blocks = space->f_bfree = space->f_bavail = 1000000000000 / space->f_frsize; \
        }                                                                    \
        return result;                                                       \
    }

OVERRIDE(statvfs, statvfs, const char *)
OVERRIDE(statvfs64, statvfs64, const char *)
OVERRIDE(fstatvfs, statvfs, int)
OVERRIDE(fstatvfs64, statvfs64, int)

int fallocate(int fd, int mode, off_t at, off_t len) {
    (void)mode;
    return ftruncate(fd, at + len);
}

int fallocate64(int fd, int mode, off64_t at, off64_t len) {
    (void)mode;
    return ftruncate64(fd, at + len);
}
