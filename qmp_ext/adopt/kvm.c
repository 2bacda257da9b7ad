/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which of QEMU's ioctls concern the hop: the VM that is created, the SEV commands, the vCPU registers, taps.
 */
#include "adopt.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/ioctl.h>

#define TAPIO 'T' /* of <linux/if_tun.h>, and of terminals */

static int vm_fd = -1;
static int vm_type;

bool kvm_vm_exists(void)
{
    return vm_fd >= 0;
}

int kvm_vm_fd(void)
{
    return vm_fd;
}

/* Of a VM whose context was moved away the kernel serves no ioctl any more. */
bool kvm_vm_is_dead(void)
{
    return kvm_vm_exists() && libc()->ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) < 0 && errno == EIO;
}

int kvm_vm_type(void)
{
    return vm_type;
}

/* KVM_X86_DEFAULT_VM is 0. The others are newer than the headers that this must build with. */
static const char *vm_type_name(int type)
{
    switch (type) {
    case 1:
        return "software-protected";
    case 2:
        return "SEV (KVM_SEV_INIT2)";
    case 3:
        return "SEV-ES (KVM_SEV_INIT2)";
    case 4:
        return "SEV-SNP";
    case 5:
        return "TDX";
    default:
        return "unknown";
    }
}

/*
 * A VM of a SEV type takes a moved context and can never run it: the kernel still waits for its KVM_SEV_INIT2, and
 * KVM_RUN gives EINVAL. SEV-SNP contexts do not move at all.
 */
static int create_vm(int fd, unsigned long request, void *type)
{
    int number = (int)(long)type, result;

    if (hop.keeper && number != 0)
        fatal("this QEMU creates a VM of type %d, %s, which cannot run a guest that was moved into it%s", number,
            vm_type_name(number), number == 2 || number == 3 ? ": use legacy-vm-type=on" : "");
    result = libc()->ioctl(fd, request, type);
    if (result >= 0) {
        vm_fd = result;
        vm_type = number;
    }
    return result;
}

static int create_vcpu(int fd, unsigned long request, void *id)
{
    int result = libc()->ioctl(fd, request, id);

    if (result >= 0)
        vcpu_created(result);
    return result;
}

static int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    /* The kernel looks at 32 bits; QEMU passes some requests sign-extended. */
    switch ((unsigned int)request) {
    case KVM_CREATE_VM:
        return create_vm(fd, request, argument);
    case KVM_CREATE_VCPU:
        return create_vcpu(fd, request, argument);
    case KVM_SET_CPUID2:
        return vcpu_set_cpuid(fd, request, argument);
    case KVM_SET_SREGS:
    case (unsigned int)KVM_SET_SREGS2:
        return vcpu_set_registers(fd, request, argument);
    case KVM_GET_SREGS:
    case (unsigned int)KVM_GET_SREGS2:
        return vcpu_get_registers(fd, request, argument);
    case KVM_SET_MP_STATE:
        return vcpu_set_mp_state(fd, request, argument);
    case KVM_SET_VCPU_EVENTS:
        return vcpu_set_events(fd, request, argument);
    case KVM_GET_VCPU_EVENTS:
        return vcpu_get_events(fd, request, argument);
    case KVM_MEMORY_ENCRYPT_OP:
        if (argument) /* without one, QEMU only asks whether the kernel knows SEV */
            return sev_command(fd, request, argument);
        break;
    case KVM_MEMORY_ENCRYPT_REG_REGION:
        return sev_register_region(fd, request, argument);
    case KVM_MEMORY_ENCRYPT_UNREG_REGION:
        return sev_unregister_region(fd, request, argument);
    }
    return libc()->ioctl(fd, request, argument);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    /* First the hot path. */
    if (request == KVM_RUN || !hop.keeper)
        return libc()->ioctl(fd, request, argument);
    switch ((request >> _IOC_TYPESHIFT) & _IOC_TYPEMASK) {
    case KVMIO:
        return kvm_ioctl(fd, request, argument);
    case TAPIO:
        return tap_ioctl(fd, request, argument);
    default:
        return libc()->ioctl(fd, request, argument);
    }
}
