/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * SEV: the guest was launched in the source. The launch commands that QEMU issues for the same sev-guest object are
 * emulated here; then the context is moved into this VM, and from then on the kernel executes everything.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#ifndef KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM 206
#endif
#define SEV_INIT2 22 /* KVM_SEV_INIT2, Linux 6.10 */

/* A range that was registered before there was a context. */
struct region {
    struct region *next;
    uint64_t address, size;
};

static struct region *regions;
static atomic_bool moved;
static bool launched; /* QEMU has issued the first launch command */
static bool finished_launch;
static int sev_fd = -1;
static int emulated;

bool sev_moved(void)
{
    return atomic_load_explicit(&moved, memory_order_relaxed);
}

static bool passed_to_kernel(int vm)
{
    return vm != kvm_vm_fd() || !hop.keeper;
}

static int initialise(enum guest_context wanted)
{
    if (wanted != hop.context)
        fatal("this QEMU starts a guest of context %s, the old QEMU's is %s: use the same sev-guest object",
            context_name(wanted), context_name(hop.context));
    launched = true;
    return 0;
}

static int launch_start(struct kvm_sev_launch_start *start)
{
    start->handle = hop.handle ? hop.handle : 1; /* QEMU takes 0 for "none yet" */
    return 0;
}

/* QEMU queries the length first. All zeros, which no verifier accepts, if the keeper did not know the measurement. */
static int launch_measure(struct kvm_sev_launch_measure *measure)
{
    bool fits = measure->uaddr && measure->len >= MEASUREMENT_SIZE;

    measure->len = MEASUREMENT_SIZE;
    if (fits)
        memcpy((void *)(uintptr_t)measure->uaddr, hop.measurement, MEASUREMENT_SIZE);
    return 0;
}

/* QEMU finishes the launch when its vCPUs are to run for the first time. */
static int launch_finish(void)
{
    if (!sev_moved()) {
        warn("this QEMU has not adopted the guest yet: it must not run");
        errno = EPERM;
        return -1;
    }
    finished_launch = true;
    return 0;
}

static bool is_launch_command(uint32_t id)
{
    switch (id) {
    case KVM_SEV_INIT:
    case KVM_SEV_ES_INIT:
    case SEV_INIT2:
    case KVM_SEV_LAUNCH_START:
    case KVM_SEV_LAUNCH_UPDATE_DATA:
    case KVM_SEV_LAUNCH_UPDATE_VMSA:
    case KVM_SEV_LAUNCH_SECRET:
    case KVM_SEV_LAUNCH_MEASURE:
    case KVM_SEV_LAUNCH_FINISH:
        return true;
    default:
        return false;
    }
}

static int emulate(const struct kvm_sev_cmd *command)
{
    void *data = (void *)(uintptr_t)command->data;

    switch (command->id) {
    case KVM_SEV_INIT:
        return initialise(CONTEXT_SEV);
    case KVM_SEV_ES_INIT:
        return initialise(CONTEXT_SEV_ES);
    case SEV_INIT2:
        fatal("this QEMU uses KVM_SEV_INIT2, after which a moved guest cannot run: use legacy-vm-type=on");
    case KVM_SEV_LAUNCH_START:
        return launch_start(data);
    case KVM_SEV_LAUNCH_UPDATE_VMSA: /* the source's are encrypted already */
        protected_state_launch();
        return 0;
    case KVM_SEV_LAUNCH_MEASURE:
        protected_state_launched();
        return launch_measure(data);
    case KVM_SEV_LAUNCH_FINISH:
        return launch_finish();
    case KVM_SEV_LAUNCH_SECRET: /* requested by the owner, not a part of every launch: it would be lost */
        errno = EPERM;
        return -1;
    default: /* LAUNCH_UPDATE_DATA: the source's pages are encrypted already */
        return 0;
    }
}

int sev_command(int vm, unsigned long request, struct kvm_sev_cmd *command)
{
    int result;

    if (passed_to_kernel(vm))
        return libc()->ioctl(vm, request, command);
    if (!sev_moved() && (int)command->sev_fd > 0)
        sev_fd = (int)command->sev_fd;
    /* After the move only LAUNCH_FINISH is emulated: the firmware runs the guest already, and would refuse it. */
    if (!is_launch_command(command->id) ||
        (sev_moved() && (command->id != KVM_SEV_LAUNCH_FINISH || finished_launch)))
        return libc()->ioctl(vm, request, command);
    result = emulate(command);
    command->error = 0;
    if (!result)
        emulated++;
    return result;
}

/* ---- regions: memory that the kernel pins. The source's pins come with its context. ---- */

int sev_register_region(int vm, unsigned long request, struct kvm_enc_region *range)
{
    struct region *region;

    if (passed_to_kernel(vm) || hop.context == CONTEXT_NONE || sev_moved())
        return libc()->ioctl(vm, request, range);
    region = calloc(1, sizeof *region);
    if (!region)
        fatal("out of memory");
    *region = (struct region){.address = range->addr, .size = range->size};
    pthread_mutex_lock(&adopt_lock);
    region->next = regions;
    regions = region;
    pthread_mutex_unlock(&adopt_lock);
    return 0;
}

static bool forget_region(const struct kvm_enc_region *range)
{
    struct region **link, *found;

    pthread_mutex_lock(&adopt_lock);
    for (link = &regions; (found = *link); link = &found->next)
        if (found->address == range->addr && found->size == range->size)
            break;
    if (found)
        *link = found->next;
    pthread_mutex_unlock(&adopt_lock);
    free(found);
    return found;
}

/* The kernel does not know a region that was only emulated: it has the source's, at the source's address. */
int sev_unregister_region(int vm, unsigned long request, struct kvm_enc_region *range)
{
    int result;

    if (passed_to_kernel(vm) || hop.context == CONTEXT_NONE)
        return libc()->ioctl(vm, request, range);
    if (!sev_moved()) {
        if (forget_region(range))
            return 0;
        errno = EINVAL;
        return -1;
    }
    result = libc()->ioctl(vm, request, range);
    if (result < 0 && errno == EINVAL && forget_region(range))
        return 0;
    return result;
}

void sev_check_launch(void)
{
    if (hop.context != CONTEXT_NONE && !launched)
        fatal("the old QEMU runs a guest of context %s, this QEMU none: use the same sev-guest object",
            context_name(hop.context));
}

/* ---- the move ---- */

static bool is_vm(int fd)
{
    char link[32], target[32];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return true; /* no /proc here: the kernel checks it as well */
    target[length] = '\0';
    return !strcmp(target, "anon_inode:kvm-vm");
}

/*
 * The kernel moves the context but not the descriptor of /dev/sev that the source had given: that is 0 in the
 * destination for ever. So descriptor 0 has to be /dev/sev, for GUEST_STATUS and attestation.
 */
static void provide_sev_descriptor(void)
{
    if (sev_fd > 0 && dup3(sev_fd, 0, O_CLOEXEC) < 0)
        warn("descriptor 0 cannot become /dev/sev, query-sev will fail: %s", strerror(errno));
}

struct move sev_move_from(int source_vm)
{
    struct kvm_enable_cap capability = {.cap = KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, .args[0] = (unsigned int)source_vm};
    struct move move = {0};

    if (kvm_vm_type() != 0)
        move.error = EOPNOTSUPP;
    else if (!is_vm(source_vm)) /* without SEV in KVM, the kernel returns EINVAL for any descriptor */
        move.error = EBADF;
    else if (libc()->ioctl(kvm_vm_fd(), KVM_ENABLE_CAP, &capability) < 0)
        move.error = errno;
    if (move.error)
        return move;
    atomic_store(&moved, true);
    vcpus_restore(&move);
    provide_sev_descriptor();
    return move;
}

int sev_emulated_commands(void)
{
    return emulated;
}

int sev_deferred_regions(void)
{
    int count = 0;

    pthread_mutex_lock(&adopt_lock);
    for (struct region *region = regions; region; region = region->next)
        count++;
    pthread_mutex_unlock(&adopt_lock);
    return count;
}
