/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The run mark: one byte that records whether the guest has run in this process. It is in a memfd that the keeper has
 * created and that other processes have open as well, so it can still be read when this process and the command have
 * exited.
 */
#include "adopt.h"

#include <unistd.h>

static int mark = -1;
static bool ran;

void run_mark_use(int fd)
{
    mark = fd;
}

bool run_mark_write(enum run_mark state)
{
    char byte = (char)state;
    bool written = mark < 0 || pwrite(mark, &byte, 1, 0) == 1;

    if (state == RUN_MARK_RAN && written) {
        ran = true;
        if (mark >= 0)
            close(mark); /* that is final */
        mark = -1;
    }
    return written;
}

bool run_mark_ran(void)
{
    return ran;
}
