/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * During the downtime the threads of this process are boosted: the command gives them a realtime priority
 * (plugin/sevhop/engine/realtime.py). It is reset before the guest runs, which could starve other processes with it.
 *
 * By sched_setattr(2), which the sandbox of QEMU does not filter (-sandbox resourcecontrol=deny). An unprivileged
 * process may not clear the flag that resets the policy of children, so it stays until the command clears it; vCPUs
 * have no children.
 */
#include "adopt.h"
#include "qemu.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PRIORITY 1
#define RESET_ON_FORK 1 /* SCHED_FLAG_RESET_ON_FORK of <linux/sched.h>, which does not go together with <sched.h> */

/* struct sched_attr, as Linux 3.14 had it. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

static struct thread {
    pid_t id;
    int32_t nice;
} *threads;
static size_t count, room;

static bool read_attributes(pid_t thread, struct attributes *attributes)
{
    return !syscall(SYS_sched_getattr, thread, attributes, sizeof *attributes, 0);
}

static void reset(const struct thread *thread)
{
    struct attributes attributes = {0};
    int nice;

    if (!read_attributes(thread->id, &attributes) || attributes.policy != SCHED_RR ||
        !(attributes.flags & RESET_ON_FORK) || attributes.priority != PRIORITY)
        return;
    errno = 0;
    nice = getpriority(PRIO_PROCESS, (id_t)thread->id);
    attributes = (struct attributes){
        .size = sizeof attributes, .policy = SCHED_OTHER, .nice = errno ? thread->nice : nice};
    if (!syscall(SYS_sched_setattr, thread->id, &attributes, 0))
        return;
    attributes.flags = RESET_ON_FORK;
    if (syscall(SYS_sched_setattr, thread->id, &attributes, 0))
        warn("cannot reset the realtime priority of thread %d: %s", (int)thread->id, strerror(errno));
}

static void record(pid_t thread)
{
    struct attributes attributes = {0};

    if (count == room) {
        room += 64;
        threads = realloc(threads, room * sizeof *threads);
        if (!threads)
            fatal("out of memory");
    }
    if (read_attributes(thread, &attributes))
        threads[count++] = (struct thread){thread, attributes.nice};
}

/* Reading them takes 0.1 ms, which must not be downtime. Threads that are created later are not boosted. */
void realtime_record(void)
{
    DIR *directory = opendir("/proc/self/task");
    struct dirent *entry;
    unsigned long long number;

    if (!directory)
        return;
    count = 0;
    while ((entry = readdir(directory)))
        if (parse_number(entry->d_name, &number) && number <= INT_MAX)
            record((pid_t)number);
    closedir(directory);
}

static void reset_first(void *opaque)
{
    (void)opaque;
    for (size_t i = 0; i < count; i++)
        if (threads[i].id == getpid())
            reset(&threads[i]);
}

/* The first thread still has to start the guest, and is reset after that. */
void realtime_reset(void)
{
    for (size_t i = 0; i < count; i++)
        if (threads[i].id != getpid())
            reset(&threads[i]);
    aio_bh_schedule_oneshot_full(qemu_get_aio_context(), reset_first, NULL, "sevhop-realtime");
}
