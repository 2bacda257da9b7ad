// SPDX-License-Identifier: GPL-2.0-only
/*
 * Makes an emulated processor look capable of SEV and SEV-ES.
 *
 * kvm-amd reads the feature bits of boot_cpu_data and CPUID leaf 0x8000001f. The bits are set here; CPUID executes
 * through a paravirtualised call whose sites are patched when a module is loaded, so that only modules loaded after
 * this one see the invented leaf. User space sees the emulator's own CPUID.
 */
#include <linux/bits.h>
#include <linux/cpumask.h>
#include <asm/cpufeature.h>
#include <asm/paravirt.h>
#include <asm/processor.h>

#include "fake_psp.h"

#define LEAF_LARGEST 0x80000000
#define LEAF_ENCRYPTION 0x8000001f
#define ENCRYPTION_BIT 51 /* position of the C-bit in a page table entry */
#define REDUCED_PHYSICAL_BITS 1

/*
 * KVM refuses SEV without DECODEASSISTS and FLUSHBYASID, and SEV-ES without LBRV. NRIPS makes it report SVM guests'
 * next instruction, which the emulator does not fill in: this is why CPUID, RDMSR and alike end a guest in the lab.
 */
static const int features[] = {
    X86_FEATURE_SEV,  X86_FEATURE_SEV_ES, X86_FEATURE_DECODEASSISTS, X86_FEATURE_FLUSHBYASID,
    X86_FEATURE_LBRV, X86_FEATURE_NRIPS,
};

static void cpuid_with_sev(unsigned int *eax, unsigned int *ebx, unsigned int *ecx, unsigned int *edx)
{
    unsigned int leaf = *eax;

    native_cpuid(eax, ebx, ecx, edx);
    if (leaf == LEAF_LARGEST && *eax < LEAF_ENCRYPTION)
        *eax = LEAF_ENCRYPTION;
    if (leaf == LEAF_ENCRYPTION) {
        *eax = BIT(1) | BIT(3); /* SEV, SEV-ES */
        *ebx = ENCRYPTION_BIT | REDUCED_PHYSICAL_BITS << 6;
        *ecx = FAKE_PSP_ASIDS;
        *edx = FAKE_PSP_FIRST_SEV_ASID;
    }
}

void fake_processor_install(void)
{
    unsigned int i;
    int cpu;

    for (i = 0; i < ARRAY_SIZE(features); i++) {
        set_cpu_cap(&boot_cpu_data, features[i]);
        for_each_online_cpu(cpu)
            set_cpu_cap(&cpu_data(cpu), features[i]);
    }
    pv_ops.cpu.cpuid = cpuid_with_sev;
}
