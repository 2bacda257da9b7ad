/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vCPU registers that the kernel accepts only after the move; SEV-ES guests' vCPUs that are halted, or handle an NMI.
 *
 * An encrypted guest has the C-bit set in CR3. To KVM that is a reserved address bit until KVM_SET_CPUID2 is called on
 * a VM that is an SEV guest; the destination becomes one only by the move, long after its CPUID was set. So the device
 * state, which is loaded before the move, would be refused. The registers are checked without the C-bit and deferred:
 * after the move CPUID is set again, and then the registers.
 */
#include "adopt.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>

/* Both start with the same fields; QEMU uses the one that the kernel has. */
union registers {
    struct kvm_sregs first;
    struct kvm_sregs2 second;
};

_Static_assert(offsetof(struct kvm_sregs, cr3) == offsetof(struct kvm_sregs2, cr3), "cr3 is at one place");

struct vcpu {
    struct vcpu *next;
    int fd;
    unsigned long cpuid_request;
    struct kvm_cpuid2 *cpuid;
    unsigned long deferred_request; /* 0: nothing is deferred */
    union registers deferred;
    bool nmis_masked; /* as deferred_events says */
    struct kvm_vcpu_events deferred_events;
};

static struct vcpu *vcpus;

/* Never freed, so that a pointer stays good without the lock. */
static struct vcpu *find(int fd)
{
    struct vcpu *vcpu;

    pthread_mutex_lock(&adopt_lock);
    for (vcpu = vcpus; vcpu && vcpu->fd != fd; vcpu = vcpu->next)
        ;
    pthread_mutex_unlock(&adopt_lock);
    return vcpu;
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);

    if (!memory)
        fatal("out of memory");
    return memory;
}

void vcpu_created(int fd)
{
    struct vcpu *vcpu = allocate(sizeof *vcpu);

    vcpu->fd = fd;
    pthread_mutex_lock(&adopt_lock);
    vcpu->next = vcpus;
    vcpus = vcpu;
    pthread_mutex_unlock(&adopt_lock);
}

static bool before_move(void)
{
    return hop.context != CONTEXT_NONE && !sev_moved();
}

int vcpu_set_cpuid(int fd, unsigned long request, struct kvm_cpuid2 *cpuid)
{
    int result = libc()->ioctl(fd, request, cpuid);
    struct vcpu *vcpu = before_move() && !result ? find(fd) : NULL;

    if (vcpu) {
        size_t size = sizeof *cpuid + cpuid->nent * sizeof cpuid->entries[0];

        pthread_mutex_lock(&adopt_lock);
        free(vcpu->cpuid);
        vcpu->cpuid = memcpy(allocate(size), cpuid, size);
        vcpu->cpuid_request = request;
        pthread_mutex_unlock(&adopt_lock);
    }
    return result;
}

/* Fn8000_001F EBX[5:0]: position of the C-bit in a page table entry. */
static uint64_t encryption_bit(const struct vcpu *vcpu)
{
    for (uint32_t i = 0; vcpu->cpuid && i < vcpu->cpuid->nent; i++)
        if (vcpu->cpuid->entries[i].function == 0x8000001f)
            return 1ULL << (vcpu->cpuid->entries[i].ebx & 63);
    return 0;
}

#define REFUSED "the kernel refuses vCPU registers: %s (cr0 %#llx cr3 %#llx cr4 %#llx efer %#llx apic_base %#llx)"

static void report(const struct kvm_sregs *registers, int error)
{
    warn(REFUSED, strerror(error), registers->cr0, registers->cr3, registers->cr4, registers->efer, registers->apic_base);
}

/* Before the move, so that the hop is rolled back. */
static void __attribute__((noreturn)) refuse(const struct kvm_sregs *registers, int error)
{
    fatal(REFUSED, strerror(error), registers->cr0, registers->cr3, registers->cr4, registers->efer, registers->apic_base);
}

static int defer(struct vcpu *vcpu, unsigned long request, void *registers, uint64_t bit)
{
    const bool first = (unsigned int)request == KVM_SET_SREGS;
    const size_t size = first ? sizeof(struct kvm_sregs) : sizeof(struct kvm_sregs2);
    union registers without;
    int result;

    memcpy(&without, registers, size);
    without.first.cr3 &= ~bit;
    result = libc()->ioctl(vcpu->fd, request, &without);
    if (!result) {
        pthread_mutex_lock(&adopt_lock);
        memcpy(&vcpu->deferred, registers, size);
        vcpu->deferred_request = request;
        pthread_mutex_unlock(&adopt_lock);
    }
    return result;
}

int vcpu_set_registers(int fd, unsigned long request, void *registers)
{
    const struct kvm_sregs *common = registers;
    int result = libc()->ioctl(fd, request, registers);
    struct vcpu *vcpu = before_move() ? find(fd) : NULL;
    uint64_t bit;

    if (vcpu && !result)
        vcpu->deferred_request = 0; /* newer ones are set */
    if (!result)
        return result;
    if (vcpu && errno == EINVAL && (bit = encryption_bit(vcpu)) && common->cr3 & bit)
        result = defer(vcpu, request, registers, bit);
    if (!result)
        return result;
    /* QEMU 7.2 ignores the result, and sets neither MSRs nor events nor the MP state then: the guest could not run. */
    if (vcpu)
        refuse(common, errno);
    report(common, errno);
    return result;
}

/* QEMU may read the registers before the move, and set what it has read: the C-bit must not get lost. */
int vcpu_get_registers(int fd, unsigned long request, void *registers)
{
    int result = libc()->ioctl(fd, request, registers);
    struct vcpu *vcpu = before_move() && !result ? find(fd) : NULL;
    struct kvm_sregs *common = registers;

    if (vcpu && vcpu->deferred_request && common->cr3 == (vcpu->deferred.first.cr3 & ~encryption_bit(vcpu)))
        common->cr3 = vcpu->deferred.first.cr3;
    return result;
}

/*
 * KVM takes the interrupt flag of an SEV-ES vCPU from the int_state of its VMCB. The processor writes that at an exit, and
 * the move does not take it along: in its new VM a halted vCPU seems to have its interrupts disabled, and never wakes up.
 * So it continues after its HLT, as it does after any interrupt.
 */
int vcpu_set_mp_state(int fd, unsigned long request, struct kvm_mp_state *state)
{
    struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};

    if (hop.context == CONTEXT_SEV_ES && hop_in_progress() && state->mp_state == KVM_MP_STATE_HALTED)
        state = &runnable;
    return libc()->ioctl(fd, request, state);
}

/*
 * While a vCPU handles an NMI, KVM intercepts its IRET: not that of an SEV-ES guest, which reports the end itself. But
 * before the move KVM takes this VM for a plain one, and after it never ends the interception, which the guest gets as an
 * exception that it does not know. So NMIs are masked after the move.
 */
int vcpu_set_events(int fd, unsigned long request, struct kvm_vcpu_events *events)
{
    struct vcpu *vcpu = hop.context == CONTEXT_SEV_ES && before_move() ? find(fd) : NULL;
    struct kvm_vcpu_events unmasked = *events;
    int result;

    if (!vcpu)
        return libc()->ioctl(fd, request, events);
    unmasked.nmi.masked = 0;
    result = libc()->ioctl(fd, request, &unmasked);
    if (!result) {
        pthread_mutex_lock(&adopt_lock);
        vcpu->nmis_masked = events->nmi.masked;
        vcpu->deferred_events = *events;
        pthread_mutex_unlock(&adopt_lock);
    }
    return result;
}

/* QEMU may set what it has read here. */
int vcpu_get_events(int fd, unsigned long request, struct kvm_vcpu_events *events)
{
    int result = libc()->ioctl(fd, request, events);
    struct vcpu *vcpu = before_move() && !result ? find(fd) : NULL;

    if (vcpu && vcpu->nmis_masked)
        events->nmi.masked = 1;
    return result;
}

/* After the move, for all vCPUs: first CPUID, which makes the C-bit valid in addresses, then the registers, then NMIs. */
void vcpus_restore(struct move *move)
{
    pthread_mutex_lock(&adopt_lock);
    for (struct vcpu *vcpu = vcpus; vcpu; vcpu = vcpu->next) {
        if (!vcpu->cpuid)
            continue;
        if (libc()->ioctl(vcpu->fd, vcpu->cpuid_request, vcpu->cpuid) < 0) {
            move->restore_error = errno;
            warn("cannot set CPUID again after the move: %s", strerror(errno));
            continue;
        }
        move->vcpus++;
    }
    for (struct vcpu *vcpu = vcpus; vcpu; vcpu = vcpu->next) {
        if (!vcpu->deferred_request)
            continue;
        if (libc()->ioctl(vcpu->fd, vcpu->deferred_request, &vcpu->deferred) < 0) {
            move->restore_error = errno;
            report(&vcpu->deferred.first, errno);
            continue;
        }
        vcpu->deferred_request = 0;
        move->registers++;
    }
    for (struct vcpu *vcpu = vcpus; vcpu; vcpu = vcpu->next) {
        if (!vcpu->nmis_masked)
            continue;
        if (libc()->ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &vcpu->deferred_events) < 0) {
            move->restore_error = errno;
            warn("cannot mask NMIs of a vCPU after the move: %s", strerror(errno));
            continue;
        }
        vcpu->nmis_masked = false;
    }
    pthread_mutex_unlock(&adopt_lock);
}

int vcpus_count(void)
{
    int count = 0;

    pthread_mutex_lock(&adopt_lock);
    for (struct vcpu *vcpu = vcpus; vcpu; vcpu = vcpu->next)
        count++;
    pthread_mutex_unlock(&adopt_lock);
    return count;
}

int vcpus_deferred(void)
{
    int count = 0;

    pthread_mutex_lock(&adopt_lock);
    for (struct vcpu *vcpu = vcpus; vcpu; vcpu = vcpu->next)
        count += vcpu->deferred_request != 0;
    pthread_mutex_unlock(&adopt_lock);
    return count;
}
