/*
 * SEV and SEV-ES for QEMU's emulated x86 processor.
 *
 * The functions below are all that QEMU's own code calls; tools/lab/processor
 * names the places. Numbers in brackets are sections of AMD's Architecture
 * Programmer's Manual (APM), volume 2.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef SEVLAB_SEVLAB_H
#define SEVLAB_SEVLAB_H

#include "cpu.h"

/* Values of CPUID 8000_001F: those of a first-generation EPYC, but for one. */
#define SEV_C_BIT_POSITION      47
#define SEV_REDUCED_PHYS_BITS   1
#define SEV_ASIDS               509
#define SEV_FIRST_SEV_ASID      100     /* those below are for SEV-ES */

/* Bits of the VMCB's field nested_ctl, next to SVM_NPT_ENABLED. */
#define SVM_SEV_ENABLED         (1ULL << 1)
#define SVM_SEV_ES_ENABLED      (1ULL << 2)

/* #VMEXIT codes that QEMU's svm.h does not have. */
#define SVM_EXIT_EFER_WRITE_TRAP    0x08f
#define SVM_EXIT_CR0_WRITE_TRAP     0x090
#define SVM_EXIT_CR15_WRITE_TRAP    0x09f
#define SVM_EXIT_VMGEXIT            0x403

/* Fields of the VMCB's control area that QEMU's svm.h does not have. */
#define VMCB_GHCB               0x0a0
#define VMCB_NEXT_RIP           0x0c8
#define VMCB_INSN_LEN           0x0d0
#define VMCB_INSN_BYTES         0x0d1
#define VMCB_VMSA               0x108

#define SEV_STATUS_SEV          (1ULL << 0)
#define SEV_STATUS_SEV_ES       (1ULL << 1)

static inline bool sev_guest(CPUX86State *env)
{
    return env->sevlab.status & SEV_STATUS_SEV;
}

static inline bool sev_es_guest(CPUX86State *env)
{
    return env->sevlab.status & SEV_STATUS_SEV_ES;
}

/*
 * Where VMRUN and #VMEXIT load and save, given as the address of the VMCB whose
 * save area is there: of an SEV-ES guest it is the first part of the VMSA,
 * which is laid out alike.
 */
static inline uint64_t sevlab_saved_at(CPUX86State *env)
{
    return sev_es_guest(env) ?
           env->sevlab.vmsa - offsetof(struct vmcb, save) : env->vm_vmcb;
}

/* ---- registers.c: CPUID and MSRs ---- */

/* Features of CPUID 8000_000A that TCG has with SEV and lacks without. */
#define SEVLAB_SVM_FEATURES \
    (CPUID_SVM_NRIPSAVE | CPUID_SVM_DECODEASSIST | CPUID_SVM_FLUSHASID | \
     CPUID_SVM_LBRV)

/* True if the processor has SEV: its CPUID reaches leaf 8000_001F. */
bool sevlab_has_sev(CPUX86State *env);

/* Completes the answer to CPUID. */
void sevlab_cpuid(CPUX86State *env, uint32_t leaf, uint32_t *eax,
                  uint32_t *ebx, uint32_t *ecx, uint32_t *edx);

/*
 * RDMSR, WRMSR: true if it was one of ours, and nothing is left to do. A write
 * may change the value that others take.
 */
bool sevlab_rdmsr(CPUX86State *env);
bool sevlab_wrmsr(CPUX86State *env, uint64_t *value);

/* True for an access to an MSR that is the guest's own: never intercepted. */
bool sevlab_own_msr(CPUX86State *env);

/* ---- paging.c: the C-bit [15.34.5] ---- */

/* A page table entry, read through this MMU index, as the walk is to see it. */
uint64_t sevlab_pte(CPUX86State *env, int ptw_idx, uint64_t pte);

/* A walk of the running guest's own page tables begins. */
void sevlab_walk(CPUX86State *env);

/* A page of page tables is about to be read by the walk. */
void sevlab_page_table(CPUX86State *env, int ptw_idx, void *host);

/* A translation is about to enter the TLB. */
void sevlab_translated(CPUX86State *env, int mmu_idx, hwaddr address,
                       MMUAccessType access);

/* The address in CR3, without the C-bit. */
uint64_t sevlab_cr3(CPUX86State *env);

/* ---- instruction.c: decode assists and next RIP [15.7.1, 15.10] ---- */

typedef struct SevInstruction {
    uint8_t bytes[15];
    int fetched;        /* as many of them could be read */
    int length;         /* 0: none of those that can be intercepted */
    int gpr;            /* of MOV to or from CRn or DRn; -1: another one */
    bool repeated;      /* has the prefix F2 or F3 */
} SevInstruction;

void sevlab_fetch(CPUX86State *env, SevInstruction *instruction);
void sevlab_decode(CPUX86State *env, SevInstruction *instruction);

/* Completes the VMCB at a #VMEXIT; returns EXITINFO1. */
uint64_t sevlab_assist(CPUX86State *env, uint64_t exit_code,
                       uint64_t exit_info_1);

/* VMRUN injects a software interrupt or exception: where it returns to. */
void sevlab_inject_software(CPUX86State *env, uint8_t vector);

/* ---- world.c: VMRUN and #VMEXIT [15.34.10, 15.35.8] ---- */

/* VMRUN, before it loads the guest's state: false if it must fail. */
bool sevlab_vmrun(CPUX86State *env, uint64_t nested_ctl, uint32_t asid);

/* The VMSA is about to be read or written. */
void sevlab_open_vmsa(CPUX86State *env);

/* VMRUN, after it has loaded what a VMCB has: the rest of the VMSA. */
void sevlab_loaded(CPUX86State *env);

/* #VMEXIT, after it has saved what a VMCB has. */
void sevlab_saved(CPUX86State *env);

/* #VMEXIT, after it has loaded the host's state. */
void sevlab_left(CPUX86State *env);

/* ---- exits.c: what an SEV-ES guest exits for [15.35.4, 15.35.5] ---- */

/* A #VMEXIT begins; returns EXITINFO1, or raises #VC instead. */
uint64_t sevlab_vmexit(CPUX86State *env, uint64_t exit_code,
                       uint64_t exit_info_1);

/* A control register, or EFER, has been written. */
void sevlab_cr_written(CPUX86State *env, int number, uint64_t value,
                       uintptr_t retaddr);
void sevlab_efer_written(CPUX86State *env, uintptr_t retaddr);

/* VMMCALL: does not return if it is VMGEXIT. */
void sevlab_vmmcall(CPUX86State *env, uintptr_t retaddr);

/* ---- memory.c: encryption that can be seen ---- */

/* The vCPU's thread turns to something else. */
void sevlab_pause(CPUX86State *env);

/* ---- caches.c: WBINVD, as helper_sevlab_wbinvd() ---- */

/* From now on every processor may have cached what must be written back. */
void sevlab_caches_are_dirty(void);

/* True if all processors have executed WBINVD since. */
bool sevlab_caches_written_back(void);

#endif
