/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The functions behind the interposed ones: the C library's, or those of another preloaded library. Calls that do not
 * concern the hop are passed to them unchanged.
 */
#include "adopt.h"

#include <dlfcn.h>

struct libc libc_functions;

static void *find(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);

    if (!function)
        fatal("the C library has no %s()", name);
    return function;
}

/*
 * Idempotent, so threads may race here. `ioctl` is written last: libc() tests it.
 */
void find_libc_functions(void)
{
    struct libc *n = &libc_functions;

    *(void **)&n->memfd_create = find("memfd_create");
    *(void **)&n->ftruncate = find("ftruncate64");
    *(void **)&n->fallocate = find("fallocate64");
    *(void **)&n->fcntl = find("fcntl64");
    *(void **)&n->mmap = find("mmap64");
    *(void **)&n->munmap = find("munmap");
    *(void **)&n->mprotect = find("mprotect");
    *(void **)&n->madvise = find("madvise");
    *(void **)&n->mlockall = find("mlockall");
    *(void **)&n->readv = find("readv");
    *(void **)&n->open = find("open64");
    *(void **)&n->fopen = find("fopen64");
    *(void **)&n->fadvise = find("posix_fadvise64");
    *(void **)&n->bind = find("bind");
    *(void **)&n->unlink = find("unlink");
    *(void **)&n->listen = find("listen");
    *(void **)&n->accept = find("accept");
    *(void **)&n->accept4 = find("accept4");
    atomic_thread_fence(memory_order_release);
    *(void **)&n->ioctl = find("ioctl");
}
