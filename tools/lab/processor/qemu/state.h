/*
 * What an emulated processor with SEV keeps of the guest that it runs.
 * Included by QEMU's own cpu.h, and a member of CPUX86State.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef SEVLAB_STATE_H
#define SEVLAB_STATE_H

/* The #VMEXIT that a guest handles itself: APM volume 2, 15.35.5. */
#define EXCP1D_VC 29

typedef struct SevCpuState {
    /* MSR C001_0131 as the guest reads it. 0: no encrypted guest is running. */
    uint64_t status;
    /* The bit of a guest's page table entry that says "private"; 0: none. */
    uint64_t c_bit;
    /* Physical address of an SEV-ES guest's VMSA. */
    uint64_t vmsa;
    uint32_t asid;
    /* Of the current page table walk: the C-bit of the last entry read. */
    bool leaf_is_private;
    /* WBINVD has been executed since a guest last left its ASID. */
    bool written_back;
} SevCpuState;

#endif
