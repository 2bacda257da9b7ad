"""The places in QEMU where our processor differs from QEMU's: file, function, and the words that mark the place."""

from __future__ import annotations

from .hooks import Hook, after, at_end, at_start, before, include

#: Of the source package. Hooks for another one are other hooks.
QEMU = "10.0"

#: Where our files are in the source tree, beside QEMU's own code for AMD's virtualization.
DIRECTORY = "target/i386/tcg/system/sevlab"
#: Which devices the emulator is built with.
DEVICES = "configs/devices/x86_64-softmmu/sevlab.mak"

_CPU = "target/i386/cpu.c"
_CPU_H = "target/i386/cpu.h"
_DECODER = "target/i386/tcg/decode-new.c.inc"
_EMITTER = "target/i386/tcg/emit.c.inc"
_EXCEPTIONS = "target/i386/tcg/seg_helper.c"
_HELPERS = "target/i386/helper.h"
_LOOP = "target/i386/tcg/tcg-cpu.c"
_MESON = "target/i386/tcg/system/meson.build"
_MISC = "target/i386/tcg/system/misc_helper.c"
_PAGING = "target/i386/tcg/system/excp_helper.c"
_SVM = "target/i386/tcg/system/svm_helper.c"

_HEADER = "tcg/system/sevlab/sevlab.h"


def _save_area_of(function: str) -> Hook:
    """The guest's state may be elsewhere than in the VMCB."""
    words = r"env->vm_vmcb(?=\s*\+\s*offsetof\(struct vmcb,\s*save\.)"
    return Hook(_SVM, function, words, "sevlab_saved_at(env)", times=0)


_STATE = [
    before(_CPU_H, "", "typedef struct CPUArchState {", '#include "tcg/system/sevlab/state.h"\n'),
    before(_CPU_H, "", "uint64_t vm_vmcb;", "SevCpuState sevlab;"),
    Hook(_MESON, "", r"\Z", "\nsubdir('sevlab')\n"),
]

_CPUID_AND_MSRS = [
    include(_CPU, _HEADER, behind="sev.h"),
    Hook(_CPU, "", r"^#define TCG_SVM_FEATURES \(", r"\g<0>SEVLAB_SVM_FEATURES | "),
    at_end(_CPU, "cpu_x86_cpuid", "sevlab_cpuid(env, index, eax, ebx, ecx, edx);"),
    include(_MISC, _HEADER, behind="tcg/helper-tcg.h"),
    before(_MISC, "helper_rdmsr", "switch (", "if (sevlab_rdmsr(env)) {\n    return;\n}"),
    before(_MISC, "helper_wrmsr", "switch (", "if (sevlab_wrmsr(env, &val)) {\n    return;\n}"),
    include(_SVM, _HEADER, behind="tcg/helper-tcg.h"),
    before(
        _SVM,
        "cpu_svm_check_intercept_param",
        "if (type == SVM_EXIT_MSR) {",
        "if (type == SVM_EXIT_MSR && sevlab_own_msr(env)) {\n    return;\n}",
    ),
]

_C_BIT = [
    include(_PAGING, _HEADER, behind="tcg/helper-tcg.h"),
    Hook(_PAGING, "ptw_ldq", r"return ([^;]+);", r"return sevlab_pte(in->env, in->ptw_idx, \1);", times=2),
    Hook(_PAGING, "get_physical_address", r"env->cr\[3\]", "sevlab_cr3(env)"),
    before(_PAGING, "get_physical_address", "return mmu_translate(", "sevlab_walk(env);"),
    before(_PAGING, "ptw_translate", "return true;", "sevlab_page_table(inout->env, inout->ptw_idx, inout->haddr);"),
    before(
        _PAGING,
        "x86_cpu_tlb_fill",
        "tlb_set_page_with_attrs(",
        "sevlab_translated(env, mmu_idx, out.paddr, access_type);",
    ),
]

_WORLD_SWITCH = [
    before(
        _SVM,
        "helper_vmrun",
        "env->tsc_offset =",
        "if (!sevlab_vmrun(env, nested_ctl, asid)) {\n    cpu_vmexit(env, SVM_EXIT_ERR, 0, GETPC());\n}",
    ),
    after(_SVM, "helper_vmrun", "env->dr[6] =", "sevlab_loaded(env);"),
    before(_SVM, "helper_vmrun", 'qemu_log_mask(CPU_LOG_TB_IN_ASM, "SOFT")', "sevlab_inject_software(env, vector);"),
    before(_SVM, "helper_vmrun", 'qemu_log_mask(CPU_LOG_TB_IN_ASM, "EXEPT")', "sevlab_inject_software(env, vector);"),
    _save_area_of("helper_vmrun"),
    _save_area_of("do_vmexit"),
    before(_SVM, "do_vmexit", "env->hflags &= ~HF_GUEST_MASK;", "sevlab_saved(env);"),
    before(_SVM, "do_vmexit", "env->hflags2 &= ~HF2_GIF_MASK;", "sevlab_left(env);"),
    include(_LOOP, _HEADER, behind="helper-tcg.h"),
    at_end(_LOOP, "x86_cpu_exec_exit", "sevlab_pause(env);"),
]

_EXITS = [
    after(_SVM, "cpu_vmexit", "cpu_restore_state(", "exit_info_1 = sevlab_vmexit(env, exit_code, exit_info_1);"),
    at_start(_SVM, "helper_vmmcall", "sevlab_vmmcall(env, GETPC());"),
    at_end(_MISC, "helper_write_crN", "sevlab_cr_written(env, reg, t0, GETPC());"),
    after(_MISC, "helper_wrmsr", "cpu_load_efer(", "sevlab_efer_written(env, GETPC());"),
    before(_EXCEPTIONS, "exception_has_error_code", "case 17:", "case EXCP1D_VC:"),
]

# What TCG does for WBINVD: nothing, but for the intercept.
_CACHES = [
    Hook(_DECODER, "", r"X86_OP_ENTRY0\(NOP(?=,\s*svm\(WBINVD\)\))", "X86_OP_ENTRY0(WBINVD"),
    before(
        _EMITTER,
        "",
        "static void gen_WRxxBASE(",
        "static void gen_WBINVD(DisasContext *s, X86DecodedInsn *decode)\n"
        "{\n    gen_helper_sevlab_wbinvd(tcg_env);\n}\n\n",
    ),
    before(_HELPERS, "", "DEF_HELPER_3(vmrun,", "DEF_HELPER_1(sevlab_wbinvd, void, env)"),
]

# Bugs of TCG that hit guests without SEV, too.
_MENDED = [
    # An interrupt that VMRUN has injected would be delivered once more when the vCPU's thread is next interrupted.
    after(_SVM, "helper_vmrun", "do_interrupt_x86_hardirq(", "cs->exception_index = -1;"),
    # Writing CR8 asks for an interrupt without the lock that this needs: an assertion ends the emulator.
    Hook(_MISC, "helper_write_crN", r"(cpu_(?:reset_)?interrupt\([^;]*;)", r"bql_lock(); \1 bql_unlock();", times=2),
    # A read of any control register would exit as one of CR0, whose intercept has the number 0.
    Hook(_DECODER, "decode_op", r"if \(decode->e\.intercept\)", "if (decode->e.has_intercept)", times=2),
]

HOOKS = [*_STATE, *_CPUID_AND_MSRS, *_C_BIT, *_WORLD_SWITCH, *_EXITS, *_CACHES, *_MENDED]
