/* A storage that fails for a moment, for a program that is started with this in LD_PRELOAD.

   STORAGE_FAULTS names a directory with a file for each fault to come: CALL (fsync, rename or open)
   holds an errno. A call of that kind on a path with STORAGE_PART in it takes the file away and
   fails with that errno. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    const char *folder = getenv("STORAGE_FAULTS"), *part = getenv("STORAGE_PART");
    char name[4096], text[16] = {0};
    if (!folder || !part || !strstr(path, part)) return 0;
    snprintf(name, sizeof name, "%s/%s", folder, call);
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    int fd = real(name, O_RDONLY);
    if (fd < 0) return 0;
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got <= 0 || unlink(name)) return 0;
    errno = atoi(text);
    return 1;
}

int fsync(int fd) {
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) > 0 && fails("fsync", path)) return -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int rename(const char *from, const char *to) {
    if (fails("rename", to)) return -1;
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (fails("open", path)) return -1;
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}
