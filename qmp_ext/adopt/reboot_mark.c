/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The reboot mark: one byte that records that QEMU has shut down because the guest was to be reset.
 *
 * An encrypted guest whose firmware was in private pages of the source cannot be reset in this process, and QEMU is set
 * to shut down instead. To libvirt that is a shutdown like any other. Whoever starts the domain again must know the
 * difference, when this process has exited: the byte is in a file that the command has made. Only its mapping is kept,
 * since a descriptor could be used to enlarge the file.
 */
#include "adopt.h"
#include "qemu.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Of QEMU's ShutdownCause, the same ones since 4.0. */
#define HOST_QMP_SYSTEM_RESET 3
#define GUEST_SHUTDOWN 6
#define GUEST_RESET 7
#define GUEST_PANIC 8

static volatile unsigned char *mark;

/* QEMU may stay after a shutdown, until libvirt ends it by a signal: that is no other shutdown of the guest. */
static void at_shutdown(Notifier *notifier, void *cause)
{
    int number = *(const int *)cause;

    (void)notifier;
    if (number == HOST_QMP_SYSTEM_RESET || number == GUEST_RESET)
        *mark = 1;
    else if (number == GUEST_SHUTDOWN || number == GUEST_PANIC)
        *mark = 0;
}

static Notifier when_shut_down = {.notify = at_shutdown};

int reboot_mark_use(int fd)
{
    struct stat file;
    void *page;

    if (!qemu_register_shutdown_notifier)
        return -ENOSYS;
    if (fstat(fd, &file) < 0)
        return -errno;
    if (file.st_size < 1)
        return -EINVAL; /* to write to its mapping would be fatal */
    page = libc()->mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED)
        return -errno;
    if (!mark)
        qemu_register_shutdown_notifier(&when_shut_down);
    else
        libc()->munmap((void *)mark, 1);
    mark = page;
    return 0;
}
