/*
 * What an SEV-ES guest exits for [APM 15.35.4, 15.35.5].
 *
 * An automatic exit (AE) needs nothing of the guest's registers: the host sees
 * it as it sees a plain guest's. For all others the guest gets the exception
 * #VC instead and asks the host by VMGEXIT for what it wants to be done.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "cpu.h"
#include "exec/exec-all.h"
#include "tcg/helper-tcg.h"
#include "sevlab.h"

static bool is_automatic(uint64_t exit_code, uint64_t exit_info_1)
{
    switch (exit_code) {
    case SVM_EXIT_EXCP_BASE + EXCP12_MCHK:
    case SVM_EXIT_INTR ... SVM_EXIT_VINTR:
    case SVM_EXIT_PAUSE:
    case SVM_EXIT_HLT:
    case SVM_EXIT_SHUTDOWN:
    case SVM_EXIT_EFER_WRITE_TRAP ... SVM_EXIT_CR15_WRITE_TRAP:
    case SVM_EXIT_VMGEXIT:
    case (uint64_t)SVM_EXIT_ERR:
        return true;
    case SVM_EXIT_NPF:
        /* Hosts mark emulated devices by reserved bits in their tables. */
        return !(exit_info_1 & PG_ERROR_RSVD_MASK);
    default:
        return false;
    }
}

/* The host finds RIP behind the instruction: it could not skip it. */
static bool is_trap(uint64_t exit_code)
{
    switch (exit_code) {
    case SVM_EXIT_PAUSE:
    case SVM_EXIT_HLT:
    case SVM_EXIT_EFER_WRITE_TRAP ... SVM_EXIT_CR15_WRITE_TRAP:
    case SVM_EXIT_VMGEXIT:
        return true;
    default:
        return false;
    }
}

uint64_t sevlab_vmexit(CPUX86State *env, uint64_t exit_code,
                       uint64_t exit_info_1)
{
    SevInstruction instruction;

    if (!sev_es_guest(env)) {
        return sevlab_assist(env, exit_code, exit_info_1);
    }
    if (!is_automatic(exit_code, exit_info_1)) {
        raise_exception_err(env, EXCP1D_VC, exit_code);
    }
    if (is_trap(exit_code)) {
        sevlab_decode(env, &instruction);
        env->eip += instruction.length;
        do_end_instruction(env);
    }
    sevlab_open_vmsa(env);
    return exit_info_1;
}

static void write_trap(CPUX86State *env, uint32_t exit_code, uint64_t value,
                       uintptr_t retaddr)
{
    if (sev_es_guest(env) && cpu_svm_has_intercept(env, exit_code)) {
        cpu_vmexit(env, exit_code, value, retaddr);
    }
}

void sevlab_cr_written(CPUX86State *env, int number, uint64_t value,
                       uintptr_t retaddr)
{
    write_trap(env, SVM_EXIT_CR0_WRITE_TRAP + number, value, retaddr);
}

void sevlab_efer_written(CPUX86State *env, uintptr_t retaddr)
{
    write_trap(env, SVM_EXIT_EFER_WRITE_TRAP, env->efer, retaddr);
}

void sevlab_vmmcall(CPUX86State *env, uintptr_t retaddr)
{
    SevInstruction instruction;

    if (!sev_es_guest(env)) {
        return;
    }
    cpu_restore_state(env_cpu(env), retaddr);
    sevlab_decode(env, &instruction);
    if (instruction.repeated) {
        cpu_vmexit(env, SVM_EXIT_VMGEXIT, 0, 0);
    }
}
