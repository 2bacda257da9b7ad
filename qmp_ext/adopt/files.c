/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Files that QEMU writes a log to (-serial file:, logfile=, -D): it truncates them when it starts. The source still
 * writes them then, so the destination appends.
 *
 * Disk images: before the guest runs, QEMU has the kernel drop what it has read of them (drop-cache=on of
 * block/file-posix.c), since another host may have written to them. No other host has, and reading them again would
 * make the guest wait.
 *
 * The pid file: written under another name (NAME.hop-TOKEN), while the source has its own. When the hop is over it is
 * renamed. QEMU, which removes it when it exits, does not know the new name.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool is_regular_file(const char *path)
{
    int saved = errno;
    struct stat file;
    bool regular = !stat(path, &file) && S_ISREG(file.st_mode);

    errno = saved;
    return regular;
}

static int appending_flags(const char *path, int flags)
{
    if (hop_in_progress() && flags & O_TRUNC && (flags & O_ACCMODE) == O_WRONLY && is_regular_file(path))
        return (flags & ~O_TRUNC) | O_APPEND;
    return flags;
}

#define OPEN(name)                                                              \
    EXPORT int name(const char *path, int flags, ...)                           \
    {                                                                           \
        va_list arguments;                                                      \
        mode_t mode = 0;                                                        \
                                                                                \
        if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {                   \
            va_start(arguments, flags);                                         \
            mode = va_arg(arguments, mode_t);                                   \
            va_end(arguments);                                                  \
        }                                                                       \
        return libc()->open(path, appending_flags(path, flags), mode);             \
    }

OPEN(open64)
OPEN(open)

/* What open() without a mode becomes in a program that is built with _FORTIFY_SOURCE. */
#define OPEN_FORTIFIED(name)                                          \
    EXPORT int name(const char *path, int flags);                     \
    EXPORT int name(const char *path, int flags)                      \
    {                                                                 \
        return libc()->open(path, appending_flags(path, flags), 0);      \
    }

OPEN_FORTIFIED(__open64_2)
OPEN_FORTIFIED(__open_2)

static FILE *open_stream(const char *path, const char *mode)
{
    char appending[16];

    /* "w", "wb", "we", ..., but not "w+", which also reads from the beginning */
    if (hop_in_progress() && mode[0] == 'w' && !strchr(mode, '+') && strlen(mode) < sizeof appending &&
        is_regular_file(path)) {
        strcpy(appending, mode);
        appending[0] = 'a';
        mode = appending;
    }
    return libc()->fopen(path, mode);
}

EXPORT FILE *fopen64(const char *path, const char *mode)
{
    return open_stream(path, mode);
}

EXPORT FILE *fopen(const char *path, const char *mode)
{
    return open_stream(path, mode);
}

static int advise(int fd, off64_t offset, off64_t length, int advice)
{
    if (hop_in_progress() && advice == POSIX_FADV_DONTNEED)
        return 0;
    return libc()->fadvise(fd, offset, length, advice);
}

EXPORT int posix_fadvise64(int fd, off64_t offset, off64_t length, int advice)
{
    return advise(fd, offset, length, advice);
}

EXPORT int posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
    return advise(fd, offset, length, advice);
}

#define MARK ".hop-"
#define TOKEN 4 /* bytes, in hexadecimal */

/* Whether a pid file has our pid. */
static bool names_us(const char *path)
{
    int file = libc()->open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0);
    char text[16] = "";
    unsigned long long number;
    ssize_t length = file < 0 ? -1 : read(file, text, sizeof text - 1);

    if (file >= 0)
        close(file);
    if (length <= 0)
        return false;
    text[strcspn(text, "\n")] = '\0';
    return parse_number(text, &number) && number == (unsigned long long)getpid();
}

bool pid_file_unlink(const char *path)
{
    size_t length = strlen(path), mark = strlen(MARK) + 2 * TOKEN;
    unsigned char token[TOKEN];
    int saved = errno;
    struct stat file;
    bool gone = false;

    if (!hop.keeper || hop_in_progress() || length <= mark || strncmp(path + length - mark, MARK, strlen(MARK)) ||
        !parse_hex(path + length - 2 * TOKEN, token, TOKEN) || !lstat(path, &file))
        return false;

    char *name = strndup(path, length - mark);

    if (name && names_us(name))
        gone = !libc()->unlink(name);
    free(name);
    errno = saved;
    return gone;
}
