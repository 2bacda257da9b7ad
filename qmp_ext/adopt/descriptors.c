/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The descriptors that this process was started with, before QEMU has looked at any of them.
 */
#include "adopt.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

void descriptors_each(void (*visit)(int fd, void *opaque), void *opaque)
{
    DIR *directory = opendir("/proc/self/fd");
    struct dirent *entry;
    unsigned long long number;

    if (!directory)
        fatal("cannot list the descriptors of this process: %s", strerror(errno));
    while ((entry = readdir(directory)))
        if (parse_number(entry->d_name, &number) && number > STDERR_FILENO && number <= INT_MAX &&
            (int)number != dirfd(directory))
            visit((int)number, opaque);
    closedir(directory);
}
