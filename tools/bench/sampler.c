/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Watches a number in a guest's memory that grows for as long as the guest runs.
 *
 *   sampler MEMORY OFFSET GAP
 *
 * MEMORY is the file behind the guest's memory (/proc/PID/fd/N), OFFSET the offset of the number in it, GAP the shortest gap
 * that is reported, in nanoseconds. Output, with times in nanoseconds of CLOCK_MONOTONIC:
 *
 *   first T       the number has begun to grow, by several steps without a gap: being loaded into memory is one step
 *   gap T U       it did not grow from T to U, and was read several times in between: otherwise the sampler itself may have
 *                 been without a processor
 *   last T        at the end (SIGTERM): when it grew for the last time
 *
 * It runs with a realtime priority, so that other processes do not cause gaps, and sleeps nearly all of the time.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PERIOD 100000 /* ns between two samples, at least */
#define LONGEST 10000000 /* and at most */
#define ERROR 64 /* a gap may be too long by 1/ERROR of it */
#define SAMPLES 4 /* without growth, in a gap */
#define STEPS 4 /* that make growth */

static volatile sig_atomic_t ended;

static void end(int number)
{
    (void)number;
    ended = 1;
}

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Time until the next sample. The process that resumes the guest needs the processor, too. */
static struct timespec period(int64_t still)
{
    int64_t wait = still / ERROR;

    return (struct timespec){.tv_nsec = wait < PERIOD ? PERIOD : wait > LONGEST ? LONGEST : wait};
}

int main(int argc, char **argv)
{
    struct sched_param priority = {.sched_priority = 50};
    int64_t begun = 0, grown = 0, gap;
    uint64_t offset, before;
    int steps = 0, samples = 0, fd;
    char *page;

    if (argc != 4) {
        fprintf(stderr, "usage: sampler MEMORY OFFSET GAP\n");
        return 2;
    }
    offset = strtoull(argv[2], NULL, 0);
    gap = strtoll(argv[3], NULL, 0);
    fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    page = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, (off_t)(offset & ~UINT64_C(4095)));
    if (page == MAP_FAILED) {
        perror(argv[1]);
        return 1;
    }
    signal(SIGTERM, end);
    setvbuf(stdout, NULL, _IOLBF, 0);
    sched_setscheduler(0, SCHED_FIFO, &priority);

    volatile const uint64_t *number = (volatile const uint64_t *)(page + (offset & 4095));

    before = *number;
    while (!ended) {
        struct timespec wait = period(grown ? now() - grown : 0);
        uint64_t value;
        int64_t time;

        clock_nanosleep(CLOCK_MONOTONIC, 0, &wait, NULL);
        value = *number;
        time = now();
        if (value == before) {
            samples++;
            if (steps < STEPS && time - grown >= gap)
                steps = 0;
            continue;
        }
        before = value;
        if (steps < STEPS) {
            if (!steps)
                begun = time;
            if (++steps == STEPS)
                printf("first %" PRId64 "\n", begun);
        } else if (time - grown >= gap && samples >= SAMPLES) {
            printf("gap %" PRId64 " %" PRId64 "\n", grown, time);
        }
        grown = time;
        samples = 0;
    }
    printf("last %" PRId64 "\n", grown);
    return 0;
}
