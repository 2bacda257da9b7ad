/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * While the guest waits, the threads of this process have a real-time priority, which who hops has lent them
 * (plugin/sevhop/urgency.py). A guest must not run with that: it could keep a processor from everybody else.
 */
#include "adopt.h"

#include <dirent.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#define PRIORITY 1

static pid_t *threads;
static size_t count, room;

static void lower(pid_t thread)
{
    struct sched_param parameter = {0};

    if (sched_getscheduler(thread) != (SCHED_RR | SCHED_RESET_ON_FORK) || sched_getparam(thread, &parameter) < 0 ||
        parameter.sched_priority != PRIORITY)
        return;
    parameter.sched_priority = 0;
    sched_setscheduler(thread, SCHED_OTHER, &parameter);
}

static void remember(pid_t thread)
{
    if (count == room) {
        room += 64;
        threads = realloc(threads, room * sizeof *threads);
        if (!threads)
            die("out of memory");
    }
    threads[count++] = thread;
}

/* Looking for them takes a tenth of a millisecond, for which the guest need not wait. Those that come later have no priority. */
void urgency_begins(void)
{
    DIR *directory = opendir("/proc/self/task");
    struct dirent *entry;
    unsigned long long number;

    if (!directory)
        return;
    count = 0;
    while ((entry = readdir(directory)))
        if (parse_number(entry->d_name, &number) && number <= INT_MAX && (pid_t)number != getpid())
            remember((pid_t)number);
    closedir(directory);
}

void urgency_ends(void)
{
    for (size_t i = 0; i < count; i++)
        lower(threads[i]);
}
