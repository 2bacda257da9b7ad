/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The stream of the device state. Its header is known before, and comes early; the rest is written when the source has
 * stopped. So the first byte after the header is the hand-over: the guest's pages are mapped then, without a command
 * while the guest waits. At the end of the stream QEMU starts the guest if it was started without -S; commands.c
 * notifies the keeper before.
 */
#include "adopt.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>

static atomic_bool awaited;
static atomic_bool header_read; /* whole */
static uint64_t header_left; /* bytes */
static dev_t device;
static ino_t inode;

int stream_await(int fd, uint64_t header_size)
{
    struct stat file;

    if (fstat(fd, &file) < 0)
        return -errno;
    device = file.st_dev;
    inode = file.st_ino;
    header_left = header_size;
    atomic_store(&header_read, false);
    atomic_store(&awaited, true);
    return 0;
}

void stream_forget(void)
{
    atomic_store(&awaited, false);
}

bool stream_waits(void)
{
    return atomic_load(&awaited) && atomic_load(&header_read);
}

/* By inode, not by number: QEMU duplicates descriptors. */
static bool is_stream(int fd)
{
    struct stat file;

    return !fstat(fd, &file) && file.st_ino == inode && file.st_dev == device;
}

static void arrived(size_t count)
{
    int failure;

    if (count <= header_left) {
        header_left -= count;
        atomic_store(&header_read, !header_left);
        return;
    }
    stream_forget();
    failure = memory_share();
    if (failure)
        fatal("guest memory cannot be mapped: %s", strerror(-failure));
}

/* QEMU reads a stream from a pipe by readv(). */
EXPORT ssize_t readv(int fd, const struct iovec *vector, int count)
{
    ssize_t result = libc()->readv(fd, vector, count);

    if (result > 0 && atomic_load_explicit(&awaited, memory_order_relaxed)) {
        int saved = errno;

        if (is_stream(fd))
            arrived((size_t)result);
        errno = saved;
    }
    return result;
}
