/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * While the guest waits, the threads of this process have a real-time priority, which who hops has lent them
 * (plugin/sevhop/urgency.py). A guest must not run with that: it could keep a processor from everybody else.
 */
#include "adopt.h"

#include <dirent.h>
#include <limits.h>
#include <sched.h>
#include <unistd.h>

#define PRIORITY 1

static void lower(pid_t thread)
{
    struct sched_param parameter = {0};

    if (sched_getscheduler(thread) != (SCHED_RR | SCHED_RESET_ON_FORK) || sched_getparam(thread, &parameter) < 0 ||
        parameter.sched_priority != PRIORITY)
        return;
    parameter.sched_priority = 0;
    sched_setscheduler(thread, SCHED_OTHER, &parameter);
}

void urgency_ends(void)
{
    DIR *threads = opendir("/proc/self/task");
    struct dirent *entry;
    unsigned long long number;

    if (!threads)
        return;
    while ((entry = readdir(threads)))
        if (parse_number(entry->d_name, &number) && number <= INT_MAX && (pid_t)number != getpid())
            lower((pid_t)number);
    closedir(threads);
}
