/*
 * CPUID and MSRs of a processor with SEV: what Linux looks for before it
 * believes in SEV, and the two MSRs that belong to an encrypted guest.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "sevlab.h"

#define CPUID_SVM           0x8000000a
#define CPUID_ENCRYPTION    0x8000001f

#define MSR_SYSCFG          0xc0010010
#define MSR_HWCR            0xc0010015
#define MSR_GHCB            0xc0010130
#define MSR_SEV_STATUS      0xc0010131

#define SYSCFG_MEMORY_ENCRYPTION    (1ULL << 23)
#define HWCR_SMM_LOCK               (1ULL << 0)

#define ENCRYPTION_SEV      (1U << 1)
#define ENCRYPTION_SEV_ES   (1U << 3)

#define SVM_ASIDS           32768

bool sevlab_has_sev(CPUX86State *env)
{
    return env->cpuid_xlevel >= CPUID_ENCRYPTION &&
           env->features[FEAT_8000_0001_ECX] & CPUID_EXT3_SVM;
}

void sevlab_cpuid(CPUX86State *env, uint32_t leaf, uint32_t *eax,
                  uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
    if (!sevlab_has_sev(env)) {
        return;
    }
    switch (leaf) {
    case CPUID_SVM:
        *ebx = SVM_ASIDS;
        break;
    case CPUID_ENCRYPTION:
        *eax = ENCRYPTION_SEV | ENCRYPTION_SEV_ES;
        *ebx = SEV_C_BIT_POSITION | SEV_REDUCED_PHYS_BITS << 6;
        *ecx = SEV_ASIDS;
        *edx = SEV_FIRST_SEV_ASID;
        break;
    }
}

static uint32_t msr_number(CPUX86State *env)
{
    return env->regs[R_ECX];
}

static hwaddr ghcb_field(CPUX86State *env)
{
    return env->vm_vmcb + VMCB_GHCB;
}

bool sevlab_own_msr(CPUX86State *env)
{
    switch (msr_number(env)) {
    case MSR_SEV_STATUS:
        return sev_guest(env);
    case MSR_GHCB:
        return sev_es_guest(env);
    default:
        return false;
    }
}

static bool read_msr(CPUX86State *env, uint64_t *value)
{
    switch (msr_number(env)) {
    case MSR_SYSCFG:
        *value = SYSCFG_MEMORY_ENCRYPTION;
        return true;
    case MSR_HWCR:
        *value = HWCR_SMM_LOCK;
        return true;
    case MSR_SEV_STATUS:
        *value = env->sevlab.status;
        return true;
    case MSR_GHCB:
        *value = sev_es_guest(env) ?
                 x86_ldq_phys(env_cpu(env), ghcb_field(env)) : 0;
        return true;
    default:
        return false;
    }
}

bool sevlab_rdmsr(CPUX86State *env)
{
    uint64_t value;

    if (!sevlab_has_sev(env) || !read_msr(env, &value)) {
        return false;
    }
    env->regs[R_EAX] = (uint32_t)value;
    env->regs[R_EDX] = value >> 32;
    return true;
}

bool sevlab_wrmsr(CPUX86State *env, uint64_t *value)
{
    switch (msr_number(env)) {
    case MSR_GHCB:
        if (sev_es_guest(env)) {
            x86_stq_phys(env_cpu(env), ghcb_field(env), *value);
            return true;
        }
        return false;
    case MSR_EFER:
        /* A guest need not know of SVM, but VMRUN would fail without. */
        if (sev_es_guest(env)) {
            *value |= MSR_EFER_SVME;
        }
        return false;
    default:
        return false;
    }
}
