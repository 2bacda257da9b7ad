/*
 * VMRUN and #VMEXIT of encrypted guests: where their state is, and the part of
 * it that a plain guest's hypervisor saves and loads itself.
 *
 * An SEV-ES guest's registers are in its VMSA [APM appendix B.3], whose first
 * part is laid out like the save area of a VMCB: QEMU's own code loads and
 * saves that part, at sevlab_saved_at(). The rest is done here. For the host
 * there is no such page; what VMRUN does not save, #VMEXIT loads from a save
 * area that the hypervisor has filled [15.35.8].
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "cpu.h"
#include "sevlab.h"
#include "memory.h"

#define SAVE_AREA       offsetof(struct vmcb, save)

/* Offsets in a VMSA, behind what a VMCB's save area has. */
#define VMSA_PAT        0x268
#define VMSA_PKRU       0x2e8
#define VMSA_GPR        0x300   /* by number; those of RAX and RSP are unused */
#define VMSA_XCR0       0x3e8
#define VMSA_MXCSR      0x408
#define VMSA_FTW        0x40c
#define VMSA_FSW        0x40e
#define VMSA_FCW        0x410
#define VMSA_X87        0x420   /* low 64 bits of each, from the top of the stack */
#define VMSA_X87_HIGH   0x460   /* their high 16 bits */
#define VMSA_XMM        0x470
#define VMSA_YMM_HIGH   0x570

#define FSW_TOP         0x3800
#define FSW_TOP_SHIFT   11
#define FCW_INITIAL     0x37f
#define MXCSR_INITIAL   0x1f80

/* VMCB field int_state, bit 1: RFLAGS.IF of an SEV-ES guest. */
#define INT_STATE_GUEST_IF  (1U << 1)

#define XMM_REGISTERS   16

/* ---- what VMLOAD and VMSAVE have in common with an SEV-ES world switch ---- */

typedef struct Register {
    size_t in_env;
    size_t in_save_area;
} Register;

#define REGISTER(env_name, save_name) \
    { offsetof(CPUX86State, env_name), \
      offsetof(struct vmcb_save_area, save_name) }

/* Registers of 64 bits that VMLOAD loads. */
static const Register system_registers[] = {
    REGISTER(kernelgsbase, kernel_gs_base),
    REGISTER(lstar, lstar),
    REGISTER(cstar, cstar),
    REGISTER(fmask, sfmask),
    REGISTER(star, star),
    REGISTER(sysenter_esp, sysenter_esp),
    REGISTER(sysenter_eip, sysenter_eip),
};

static uint64_t *register_of(CPUX86State *env, const Register *reg)
{
    return (uint64_t *)((char *)env + reg->in_env);
}

static SegmentCache read_segment(CPUX86State *env, hwaddr from)
{
    CPUState *cs = env_cpu(env);
    uint16_t attributes = x86_lduw_phys(cs, from +
                                        offsetof(struct vmcb_seg, attrib));

    return (SegmentCache) {
        .selector = x86_lduw_phys(cs, from +
                                  offsetof(struct vmcb_seg, selector)),
        .base = x86_ldq_phys(cs, from + offsetof(struct vmcb_seg, base)),
        .limit = x86_ldl_phys(cs, from + offsetof(struct vmcb_seg, limit)),
        .flags = (attributes & 0xff) << 8 | (attributes & 0xf00) << 12,
    };
}

static void write_segment(CPUX86State *env, hwaddr to,
                          const SegmentCache *segment)
{
    CPUState *cs = env_cpu(env);
    uint16_t attributes = (segment->flags >> 8 & 0xff) |
                          (segment->flags >> 12 & 0xf00);

    x86_stw_phys(cs, to + offsetof(struct vmcb_seg, selector),
                 segment->selector);
    x86_stw_phys(cs, to + offsetof(struct vmcb_seg, attrib), attributes);
    x86_stl_phys(cs, to + offsetof(struct vmcb_seg, limit), segment->limit);
    x86_stq_phys(cs, to + offsetof(struct vmcb_seg, base), segment->base);
}

static void load_data_segment(CPUX86State *env, hwaddr from, X86Seg number)
{
    SegmentCache segment = read_segment(env, from);

    cpu_x86_load_seg_cache(env, number, segment.selector, segment.base,
                           segment.limit, segment.flags);
}

static void load_system_state(CPUX86State *env, hwaddr from)
{
    CPUState *cs = env_cpu(env);

    load_data_segment(env, from + offsetof(struct vmcb_save_area, fs), R_FS);
    load_data_segment(env, from + offsetof(struct vmcb_save_area, gs), R_GS);
    env->tr = read_segment(env, from + offsetof(struct vmcb_save_area, tr));
    env->ldt = read_segment(env, from + offsetof(struct vmcb_save_area, ldtr));
    for (size_t i = 0; i < ARRAY_SIZE(system_registers); i++) {
        const Register *reg = &system_registers[i];

        *register_of(env, reg) = x86_ldq_phys(cs, from +
                                                reg->in_save_area);
    }
    env->sysenter_cs = x86_ldq_phys(cs, from + offsetof(struct vmcb_save_area,
                                                        sysenter_cs));
}

static void save_system_state(CPUX86State *env, hwaddr to)
{
    CPUState *cs = env_cpu(env);

    write_segment(env, to + offsetof(struct vmcb_save_area, fs),
                  &env->segs[R_FS]);
    write_segment(env, to + offsetof(struct vmcb_save_area, gs),
                  &env->segs[R_GS]);
    write_segment(env, to + offsetof(struct vmcb_save_area, tr), &env->tr);
    write_segment(env, to + offsetof(struct vmcb_save_area, ldtr), &env->ldt);
    for (size_t i = 0; i < ARRAY_SIZE(system_registers); i++) {
        const Register *reg = &system_registers[i];

        x86_stq_phys(cs, to + reg->in_save_area, *register_of(env, reg));
    }
    x86_stq_phys(cs, to + offsetof(struct vmcb_save_area, sysenter_cs),
                 env->sysenter_cs);
}

/* ---- general and extended registers ---- */

static bool is_in_vmcb(int gpr)
{
    return gpr == R_EAX || gpr == R_ESP;
}

static void load_extended_state(CPUX86State *env, hwaddr from)
{
    CPUState *cs = env_cpu(env);

    for (int gpr = 0; gpr < CPU_NB_REGS; gpr++) {
        if (!is_in_vmcb(gpr)) {
            env->regs[gpr] = x86_ldq_phys(cs, from + VMSA_GPR + 8 * gpr);
        }
    }
    env->pkru = x86_ldl_phys(cs, from + VMSA_PKRU);
    env->xcr0 = x86_ldq_phys(cs, from + VMSA_XCR0);
    cpu_sync_avx_hflag(env);
}

static void save_extended_state(CPUX86State *env, hwaddr to)
{
    CPUState *cs = env_cpu(env);

    for (int gpr = 0; gpr < CPU_NB_REGS; gpr++) {
        if (!is_in_vmcb(gpr)) {
            x86_stq_phys(cs, to + VMSA_GPR + 8 * gpr, env->regs[gpr]);
        }
    }
    x86_stl_phys(cs, to + VMSA_PKRU, env->pkru);
    x86_stq_phys(cs, to + VMSA_XCR0, env->xcr0);
}

static floatx80 *from_top(CPUX86State *env, int number)
{
    return &env->fpregs[(env->fpstt + number) & 7].d;
}

static void load_fpu(CPUX86State *env, hwaddr from)
{
    CPUState *cs = env_cpu(env);
    uint16_t status = x86_lduw_phys(cs, from + VMSA_FSW);
    uint8_t valid = x86_lduw_phys(cs, from + VMSA_FTW);
    int i;

    cpu_set_fpuc(env, x86_lduw_phys(cs, from + VMSA_FCW));
    env->fpstt = (status & FSW_TOP) >> FSW_TOP_SHIFT;
    env->fpus = status & ~FSW_TOP;
    for (i = 0; i < 8; i++) {
        env->fptags[i] = !(valid & 1 << i);
        from_top(env, i)->low = x86_ldq_phys(cs, from + VMSA_X87 + 8 * i);
        from_top(env, i)->high = x86_lduw_phys(cs, from + VMSA_X87_HIGH +
                                               2 * i);
    }
    cpu_set_mxcsr(env, x86_ldl_phys(cs, from + VMSA_MXCSR));
    for (i = 0; i < XMM_REGISTERS; i++) {
        ZMMReg *reg = &env->xmm_regs[i];

        for (int half = 0; half < 2; half++) {
            hwaddr at = from + 16 * i + 8 * half;

            reg->ZMM_Q(half) = x86_ldq_phys(cs, at + VMSA_XMM);
            reg->ZMM_Q(2 + half) = x86_ldq_phys(cs, at + VMSA_YMM_HIGH);
        }
    }
}

static void save_fpu(CPUX86State *env, hwaddr to)
{
    CPUState *cs = env_cpu(env);
    uint8_t valid = 0;
    int i;

    for (i = 0; i < 8; i++) {
        valid |= !env->fptags[i] << i;
        x86_stq_phys(cs, to + VMSA_X87 + 8 * i, from_top(env, i)->low);
        x86_stw_phys(cs, to + VMSA_X87_HIGH + 2 * i, from_top(env, i)->high);
    }
    x86_stw_phys(cs, to + VMSA_FTW, valid);
    x86_stw_phys(cs, to + VMSA_FSW, (env->fpus & ~FSW_TOP) |
                 env->fpstt << FSW_TOP_SHIFT);
    x86_stw_phys(cs, to + VMSA_FCW, env->fpuc);
    update_mxcsr_from_sse_status(env);
    x86_stl_phys(cs, to + VMSA_MXCSR, env->mxcsr);
    for (i = 0; i < XMM_REGISTERS; i++) {
        const ZMMReg *reg = &env->xmm_regs[i];

        for (int half = 0; half < 2; half++) {
            hwaddr at = to + 16 * i + 8 * half;

            x86_stq_phys(cs, at + VMSA_XMM, reg->ZMM_Q(half));
            x86_stq_phys(cs, at + VMSA_YMM_HIGH, reg->ZMM_Q(2 + half));
        }
    }
}

static void reset_fpu(CPUX86State *env)
{
    memset(env->fpregs, 0, sizeof(env->fpregs));
    memset(env->fptags, 1, sizeof(env->fptags));
    memset(env->xmm_regs, 0, sizeof(env->xmm_regs));
    env->fpstt = 0;
    env->fpus = 0;
    cpu_set_fpuc(env, FCW_INITIAL);
    cpu_set_mxcsr(env, MXCSR_INITIAL);
}

/* ---- the two directions ---- */

static bool asid_fits(uint32_t asid, bool es)
{
    return asid <= SEV_ASIDS && es == (asid < SEV_FIRST_SEV_ASID);
}

bool sevlab_vmrun(CPUX86State *env, uint64_t nested_ctl, uint32_t asid)
{
    X86CPU *cpu = env_archcpu(env);
    bool es = nested_ctl & SVM_SEV_ES_ENABLED;
    uint64_t vmsa = 0;

    env->sevlab = (SevCpuState) { 0 };
    if (!sevlab_has_sev(env) || !(nested_ctl & SVM_SEV_ENABLED)) {
        return true;
    }
    if (!(nested_ctl & SVM_NPT_ENABLED) || !asid_fits(asid, es)) {
        return false;
    }
    if (es) {
        vmsa = x86_ldq_phys(CPU(cpu), env->vm_vmcb + VMCB_VMSA);
        if (vmsa & (0xfff | ~0ULL << cpu->phys_bits)) {
            return false;
        }
    }
    env->sevlab = (SevCpuState) {
        .status = SEV_STATUS_SEV | (es ? SEV_STATUS_SEV_ES : 0),
        .c_bit = 1ULL << SEV_C_BIT_POSITION,
        .asid = asid,
        .vmsa = vmsa,
    };
    sevlab_open_vmsa(env);
    return true;
}

void sevlab_open_vmsa(CPUX86State *env)
{
    if (sev_es_guest(env)) {
        sevlab_memory_open(env, env->sevlab.vmsa);
    }
}

void sevlab_loaded(CPUX86State *env)
{
    CPUState *cs = env_cpu(env);

    if (!sev_es_guest(env)) {
        return;
    }
    x86_stq_phys(cs, env->vm_hsave + SAVE_AREA + VMSA_PAT, env->pat);
    env->pat = x86_ldq_phys(cs, env->sevlab.vmsa + VMSA_PAT);
    load_extended_state(env, env->sevlab.vmsa);
    load_system_state(env, env->sevlab.vmsa);
    load_fpu(env, env->sevlab.vmsa);
}

void sevlab_saved(CPUX86State *env)
{
    CPUState *cs = env_cpu(env);
    hwaddr int_state = env->vm_vmcb + offsetof(struct vmcb, control.int_state);

    if (!sev_es_guest(env)) {
        return;
    }
    x86_stq_phys(cs, env->sevlab.vmsa + VMSA_PAT, env->pat);
    save_extended_state(env, env->sevlab.vmsa);
    save_system_state(env, env->sevlab.vmsa);
    save_fpu(env, env->sevlab.vmsa);
    if (cpu_compute_eflags(env) & IF_MASK) {
        x86_stl_phys(cs, int_state,
                     x86_ldl_phys(cs, int_state) | INT_STATE_GUEST_IF);
    }
}

void sevlab_left(CPUX86State *env)
{
    if (sev_es_guest(env)) {
        hwaddr host = env->vm_hsave + SAVE_AREA;

        load_extended_state(env, host);
        load_system_state(env, host);
        env->pat = x86_ldq_phys(env_cpu(env), host + VMSA_PAT);
        reset_fpu(env);
    }
    if (sev_guest(env)) {
        sevlab_memory_close_all(env);
    }
    env->sevlab = (SevCpuState) { 0 };
}
