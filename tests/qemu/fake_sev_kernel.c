/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A KVM with SEV, for a machine without: preloaded into QEMU after adopt.so, it emulates those rules of the kernel that
 * adopt.so exists for. Nothing is encrypted. What it answers goes, a line each, to the file $FAKE_SEV_LOG.
 *
 *   /dev/sev opens and reports that the firmware is there
 *   SEV commands and regions: ENOTTY until a context was moved here (KVM_ENABLE_CAP 206), accepted afterwards
 *   SET_SREGS with bit $FAKE_SEV_BIT in CR3: EINVAL, unless CPUID was set since the context is here
 *   GET_SREGS reports CR3 as $FAKE_SEV_CR3, if that is given: an encrypted guest's
 *   VMs of all SEV types are offered
 *   $FAKE_SEV_LAUNCH: there is a context from the beginning, as for a source, and launch commands are accepted
 *   $FAKE_SEV_STATE: vCPU state that is set goes to the log as well: local APIC and MP state
 *   GET_MP_STATE reports $FAKE_SEV_MP_STATE, if that is given
 *   $FAKE_SEV_NMI: GET_VCPU_EVENTS reports that NMIs are masked, as of a vCPU that handles one
 *   $FAKE_SEV_EVENTS: whether NMIs are masked by SET_VCPU_EVENTS goes to the log as well
 *   $FAKE_SEV_MOVE_ERRNO: what the move gives
 *   $FAKE_SEV_DEAD: a file; if it exists, the context was moved out of this VM, and what is asked about it gives EIO
 */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/psp-sev.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CONTEXT_MOVES 206 /* KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM */
#define VM_TYPES 235      /* KVM_CAP_VM_TYPES */

static int vm = -1, sev = -1;
static int has_context;
static unsigned char cpuid_set[65536];
static struct kvm_enc_region regions[16];
static int region_count;

static void note(const char *format, ...)
{
    const char *path = getenv("FAKE_SEV_LOG");
    char line[256];
    va_list arguments;
    int fd, length;

    if (!path)
        return;
    va_start(arguments, format);
    length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, (size_t)length) != length)
        abort();
    close(fd);
}

static unsigned long long number(const char *name)
{
    const char *text = getenv(name);
    unsigned long long value = 0;

    for (; text && *text; text++)
        value = value * 10 + (unsigned long long)(*text - '0');
    return value;
}

static int real(int fd, unsigned long request, void *argument)
{
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static int fail(int error)
{
    errno = error;
    return -1;
}

static int context_is_here(void)
{
    return has_context || getenv("FAKE_SEV_LAUNCH");
}

static int set_registers(int fd, unsigned long request, struct kvm_sregs *registers)
{
    unsigned long long bit = 1ULL << number("FAKE_SEV_BIT"), cr3 = registers->cr3;
    int result;

    if (!(cr3 & bit))
        return real(fd, request, registers);
    if (!cpuid_set[fd & 0xffff])
        return fail(EINVAL);
    note("registers with cr3 %llx\n", cr3);
    registers->cr3 &= ~bit;
    result = real(fd, request, registers);
    registers->cr3 = cr3;
    return result;
}

static int get_registers(int fd, unsigned long request, struct kvm_sregs *registers)
{
    int result = real(fd, request, registers);

    if (!result && getenv("FAKE_SEV_CR3"))
        registers->cr3 = number("FAKE_SEV_CR3");
    return result;
}

static int sev_command(int fd, unsigned long request, struct kvm_sev_cmd *command)
{
    if (!command)
        return fail(EFAULT); /* so the kernel reports that it supports SEV */
    if (fd != vm || !context_is_here())
        return fail(ENOTTY);
    (void)request;
    note("command %u\n", command->id);
    if (command->id == KVM_SEV_LAUNCH_MEASURE)
        ((struct kvm_sev_launch_measure *)(uintptr_t)command->data)->len = 48;
    return 0;
}

static int set_mp_state(int fd, unsigned long request, struct kvm_mp_state *state)
{
    if (getenv("FAKE_SEV_STATE"))
        note("mp state %u\n", state->mp_state);
    return real(fd, request, state);
}

static int get_mp_state(int fd, unsigned long request, struct kvm_mp_state *state)
{
    int result = real(fd, request, state);

    if (!result && getenv("FAKE_SEV_MP_STATE"))
        state->mp_state = (unsigned int)number("FAKE_SEV_MP_STATE");
    return result;
}

static int set_events(int fd, unsigned long request, struct kvm_vcpu_events *events)
{
    if (getenv("FAKE_SEV_EVENTS"))
        note("NMIs %s\n", events->nmi.masked ? "masked" : "not masked");
    return real(fd, request, events);
}

static int get_events(int fd, unsigned long request, struct kvm_vcpu_events *events)
{
    int result = real(fd, request, events);

    if (!result && getenv("FAKE_SEV_NMI"))
        events->nmi.masked = 1;
    return result;
}

static int register_region(const struct kvm_enc_region *region)
{
    if (!context_is_here())
        return fail(ENOTTY);
    if (region_count == sizeof regions / sizeof *regions)
        return fail(ENOMEM);
    regions[region_count++] = *region;
    note("region registered\n");
    return 0;
}

static int unregister_region(const struct kvm_enc_region *region)
{
    if (!context_is_here())
        return fail(ENOTTY);
    for (int i = 0; i < region_count; i++)
        if (regions[i].addr == region->addr && regions[i].size == region->size) {
            regions[i] = regions[--region_count];
            note("region unregistered\n");
            return 0;
        }
    note("region unknown\n");
    return fail(EINVAL);
}

static int enable(int fd, unsigned long request, struct kvm_enable_cap *capability)
{
    if (capability->cap != CONTEXT_MOVES)
        return real(fd, request, capability);
    if (number("FAKE_SEV_MOVE_ERRNO"))
        return fail((int)number("FAKE_SEV_MOVE_ERRNO"));
    has_context = 1;
    note("moved\n");
    return 0;
}

static int platform_command(struct sev_issue_cmd *command)
{
    struct sev_user_data_status *status = (void *)(uintptr_t)command->data;

    if (command->cmd != SEV_PLATFORM_STATUS)
        return fail(ENOTTY);
    *status = (struct sev_user_data_status){.api_major = 1, .api_minor = 51, .state = 1, .flags = 1 << 8, .build = 7};
    return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;
    int result;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    switch ((unsigned int)request) {
    case KVM_CREATE_VM:
        result = real(fd, request, argument);
        if (result >= 0)
            vm = result;
        return result;
    case KVM_CHECK_EXTENSION:
        if ((long)argument == VM_TYPES)
            return 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
        if (fd == vm && getenv("FAKE_SEV_DEAD") && !access(getenv("FAKE_SEV_DEAD"), F_OK))
            return fail(EIO);
        break;
    case KVM_ENABLE_CAP:
        return enable(fd, request, argument);
    case KVM_MEMORY_ENCRYPT_OP:
        return sev_command(fd, request, argument);
    case KVM_MEMORY_ENCRYPT_REG_REGION:
        return register_region(argument);
    case KVM_MEMORY_ENCRYPT_UNREG_REGION:
        return unregister_region(argument);
    case KVM_SET_CPUID2:
        if (has_context) {
            cpuid_set[fd & 0xffff] = 1;
            note("cpuid\n");
        }
        return real(fd, request, argument);
    case KVM_SET_SREGS:
    case (unsigned int)KVM_SET_SREGS2:
        return set_registers(fd, request, argument);
    case KVM_GET_SREGS:
    case (unsigned int)KVM_GET_SREGS2:
        return get_registers(fd, request, argument);
    case KVM_SET_MP_STATE:
        return set_mp_state(fd, request, argument);
    case KVM_GET_MP_STATE:
        return get_mp_state(fd, request, argument);
    case KVM_SET_VCPU_EVENTS:
        return set_events(fd, request, argument);
    case KVM_GET_VCPU_EVENTS:
        return get_events(fd, request, argument);
    case KVM_SET_LAPIC:
        if (getenv("FAKE_SEV_STATE"))
            note("local APIC\n");
        break;
    case SEV_ISSUE_CMD:
        if (fd == sev)
            return platform_command(argument);
        break;
    }
    return real(fd, request, argument);
}

static int open_device(const char *path, int flags, mode_t mode)
{
    if (strcmp(path, "/dev/sev"))
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    sev = (int)syscall(SYS_openat, AT_FDCWD, "/dev/zero", flags & ~O_CREAT, 0);
    return sev;
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    mode_t mode;

    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
    return open_device(path, flags, mode);
}
