/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A destination that libvirt starts. What is passed to this library is in the XML of its domain, and stays there for as
 * long as the domain runs; so it is in copies of that XML: in snapshots, managed saves and backups, and on the hosts that
 * the domain is migrated to. A QEMU that is started with such a copy is no destination, and must start as without it.
 *
 * So there is nothing in the XML that a QEMU alone could fail at: the keeper's monitor (SEVHOP_MONITOR) is added to the
 * command line in here, and only for a destination.
 */
#include "adopt.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static char *monitor; /* its path, with commas as QEMU wants them */
static int (*qemu_main)(int, char **, char **);

/* The keeper's directory exists until the hop is over. */
bool keeper_is_gone(const char *where)
{
    char directory[PATH_MAX], *name;
    struct stat found;

    if (!strncmp(where, "fd:", 3) || strlen(where) >= sizeof directory)
        return false;
    strcpy(directory, where);
    name = strrchr(directory, '/');
    if (!name || name == directory)
        return false;
    *name = '\0';
    return stat(directory, &found) < 0 && (errno == ENOENT || errno == ENOTDIR);
}

void monitor_use(const char *path)
{
    char *end;

    monitor = malloc(2 * strlen(path) + 1);
    if (!monitor)
        fatal("out of memory");
    for (end = monitor; *path; path++) {
        if (*path == ',')
            *end++ = ',';
        *end++ = *path;
    }
    *end = '\0';
}

static int main_with_monitor(int argc, char **argv, char **environment)
{
    static const char mode[] = "chardev=sevhop-monitor,mode=control";
    char **longer, *chardev;

    if (!monitor)
        return qemu_main(argc, argv, environment);
    longer = calloc((size_t)argc + 5, sizeof *longer);
    chardev = malloc(strlen(monitor) + 80);
    if (!longer || !chardev)
        fatal("out of memory");
    sprintf(chardev, "socket,id=sevhop-monitor,path=%s,server=on,wait=off", monitor);
    memcpy(longer, argv, (size_t)argc * sizeof *longer);
    longer[argc] = (char *)"-chardev";
    longer[argc + 1] = chardev;
    longer[argc + 2] = (char *)"-mon";
    longer[argc + 3] = (char *)mode;
    return qemu_main(argc + 4, longer, environment);
}

/* In front of the C library's, which a program's start calls when constructors have run. */
EXPORT int __libc_start_main(int (*program)(int, char **, char **), int argc, char **argv, void (*init)(void),
                             void (*fini)(void), void (*loader_fini)(void), void *stack_end)
{
    int (*start)(int (*)(int, char **, char **), int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

    *(void **)&start = dlsym(RTLD_NEXT, "__libc_start_main");
    if (!start)
        fatal("the C library has no __libc_start_main()");
    qemu_main = program;
    return start(main_with_monitor, argc, argv, init, fini, loader_fini, stack_end);
}
