/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Taps that the source still uses: a destination that is started beside it has duplicates of its descriptors. What QEMU
 * sets when it starts (a short header, no offloads, one queue) is a property of the interface, and would garble the
 * packets of the guest in the source. So it is deferred until the guest is about to run here; QEMU believes that it was
 * set, as it would be.
 *
 * After a rollback the source finds its taps as they were, however much of the device state was loaded here.
 *
 * A tap is shared if its descriptor was inherited non-blocking: QEMU makes it so, and that is a property of the open
 * file, which both have. One that was opened for this QEMU (libvirt does it) is set at once.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of one request only the last counts. */
struct setting {
    struct setting *next;
    unsigned long request;
    union {
        unsigned long number; /* TUNSETOFFLOAD */
        int integer;
        struct ifreq interface; /* TUNSETQUEUE */
    } value;
};

/* A tap, or one queue of it. */
struct tap {
    struct tap *next;
    int fd;
    struct setting *settings; /* in the order in which they were first made */
};

static struct tap *taps;

/* The kernel looks at 32 bits; QEMU passes some requests sign-extended. */
static bool is(unsigned long request, unsigned long expected)
{
    return (unsigned int)request == (unsigned int)expected;
}

static bool is_setting(unsigned long request)
{
    return is(request, TUNSETOFFLOAD) || is(request, TUNSETVNETHDRSZ) || is(request, TUNSETVNETLE) ||
           is(request, TUNSETSNDBUF) || is(request, TUNSETQUEUE) || is(request, TUNSETSTEERINGEBPF);
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);

    if (!memory)
        fatal("out of memory");
    return memory;
}

static void find_shared(int fd, void *opaque)
{
    struct ifreq interface = {0};
    struct stat file;
    struct tap *tap;
    int flags = fcntl(fd, F_GETFL);

    (void)opaque;
    if (flags < 0 || !(flags & O_NONBLOCK) || fstat(fd, &file) < 0 || !S_ISCHR(file.st_mode) ||
        libc()->ioctl(fd, TUNGETIFF, &interface) < 0)
        return;
    tap = allocate(sizeof *tap);
    tap->fd = fd;
    tap->next = taps;
    taps = tap;
}

void taps_find_shared(void)
{
    if (!hop.source_ended)
        descriptors_each(find_shared, NULL);
}

static struct tap *shared(int fd)
{
    struct tap *tap;

    for (tap = taps; tap && tap->fd != fd; tap = tap->next)
        ;
    return tap;
}

static struct setting *find(const struct tap *tap, unsigned long request)
{
    struct setting *setting;

    for (setting = tap->settings; setting && !is(setting->request, request); setting = setting->next)
        ;
    return setting;
}

/* The program's descriptor is QEMU's, which may close it. */
static int keep_program(int fd)
{
    int kept = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);

    if (fd >= 0 && kept < 0)
        fatal("cannot duplicate the descriptor of a tap's program: %s", strerror(errno));
    return kept;
}

static void release(const struct setting *setting)
{
    if (is(setting->request, TUNSETSTEERINGEBPF) && setting->value.integer >= 0)
        close(setting->value.integer);
}

static void defer(struct tap *tap, unsigned long request, void *argument)
{
    struct setting *setting = find(tap, request), **last;

    if (setting) {
        release(setting);
    } else {
        setting = allocate(sizeof *setting);
        setting->request = request;
        for (last = &tap->settings; *last; last = &(*last)->next)
            ;
        *last = setting;
    }
    if (is(request, TUNSETOFFLOAD))
        setting->value.number = (unsigned long)argument;
    else if (is(request, TUNSETQUEUE))
        setting->value.interface = *(struct ifreq *)argument;
    else if (is(request, TUNSETSTEERINGEBPF))
        setting->value.integer = keep_program(*(int *)argument);
    else
        setting->value.integer = *(int *)argument;
}

/*
 * Whether the kernel would take a setting is not known until it is made. QEMU tries out the offloads that a kernel has
 * by setting them: here it finds that it has all. That matters to a guest that starts again before its next hop.
 */
static bool answer(struct tap *tap, unsigned long request, void *argument)
{
    const struct setting *setting;

    if (is_setting(request)) {
        defer(tap, request, argument);
        return true;
    }
    if (is(request, TUNGETVNETHDRSZ)) {
        setting = find(tap, TUNSETVNETHDRSZ);
        if (setting)
            *(int *)argument = setting->value.integer;
        return setting;
    }
    return false;
}

int tap_ioctl(int fd, unsigned long request, void *argument)
{
    bool answered = false;
    struct tap *tap;

    pthread_mutex_lock(&adopt_lock);
    tap = shared(fd);
    if (tap)
        answered = answer(tap, request, argument);
    pthread_mutex_unlock(&adopt_lock);
    return answered ? 0 : libc()->ioctl(fd, request, argument);
}

static void apply(int fd, struct setting *setting)
{
    void *argument = is(setting->request, TUNSETOFFLOAD) ? (void *)setting->value.number : (void *)&setting->value;

    if (libc()->ioctl(fd, setting->request, argument) >= 0)
        return;
    /* A queue that is attached, or detached, already. */
    if (is(setting->request, TUNSETQUEUE) && errno == EINVAL)
        return;
    warn("cannot set up a network interface: ioctl %#x on descriptor %d: %s", (unsigned int)setting->request, fd,
         strerror(errno));
}

void taps_apply(void)
{
    struct tap *tap;
    struct setting *setting;

    pthread_mutex_lock(&adopt_lock);
    while ((tap = taps)) {
        while ((setting = tap->settings)) {
            apply(tap->fd, setting);
            release(setting);
            tap->settings = setting->next;
            free(setting);
        }
        taps = tap->next;
        free(tap);
    }
    pthread_mutex_unlock(&adopt_lock);
}

int taps_deferred(void)
{
    int count = 0;

    pthread_mutex_lock(&adopt_lock);
    for (struct tap *tap = taps; tap; tap = tap->next)
        for (struct setting *setting = tap->settings; setting; setting = setting->next)
            count++;
    pthread_mutex_unlock(&adopt_lock);
    return count;
}
