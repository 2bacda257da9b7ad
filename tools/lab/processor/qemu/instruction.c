/*
 * What a #VMEXIT reports to the hypervisor of the instruction: its bytes, its
 * register, and the address of the next one [APM 15.7.1, 15.10].
 *
 * TCG has forgotten the instruction when a helper decides to exit, so it is
 * read and decoded again: those that can be intercepted, not all.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "cpu.h"
#include "exec/exec-all.h"
#include "tcg/helper-tcg.h"
#include "sevlab.h"

#define MAX_LENGTH      15
#define CRX_VALID       (1ULL << 63)    /* EXITINFO1: bits 3:0 are a register */

/* Copies what is on the page of this linear address; returns the number. */
static int fetch_from_page(CPUX86State *env, target_ulong address,
                           uint8_t *to, int wanted)
{
    int on_page = MIN(wanted, (int)-(address | TARGET_PAGE_MASK));
    int mmu_idx = cpu_mmu_index(env_cpu(env), true);
    void *host;
    int flags;

    flags = probe_access_flags(env, address, on_page, MMU_INST_FETCH, mmu_idx,
                               true, &host, 0);
    if (flags & TLB_INVALID_MASK || !host) {
        return 0;
    }
    memcpy(to, host, on_page);
    return on_page;
}

void sevlab_fetch(CPUX86State *env, SevInstruction *instruction)
{
    target_ulong mask = env->hflags & HF_CS64_MASK ? UINT64_MAX : UINT32_MAX;
    target_ulong address = (env->segs[R_CS].base + env->eip) & mask;
    int fetched;

    memset(instruction, 0, sizeof(*instruction));
    instruction->gpr = -1;
    fetched = fetch_from_page(env, address, instruction->bytes, MAX_LENGTH);
    if (fetched && fetched < MAX_LENGTH) {
        fetched += fetch_from_page(env, (address + fetched) & mask,
                                   instruction->bytes + fetched,
                                   MAX_LENGTH - fetched);
    }
    instruction->fetched = fetched;
}

/* Bits of an address or operand: 16, 32 or 64. */
static int default_bits(CPUX86State *env)
{
    if (env->hflags & HF_CS64_MASK) {
        return 64;
    }
    return env->hflags & HF_CS32_MASK ? 32 : 16;
}

/* Length of ModRM, SIB and displacement. */
static int operand_length(const uint8_t *modrm, int address_bits)
{
    int mod = modrm[0] >> 6, rm = modrm[0] & 7, base = rm, length = 1;

    if (mod == 3) {
        return length;
    }
    if (address_bits == 16) {
        return length + (mod == 0 ? (rm == 6 ? 2 : 0) : mod);
    }
    if (rm == 4) {
        length++;
        base = modrm[1] & 7;
    }
    if (mod == 1) {
        return length + 1;
    }
    return length + (mod == 2 || base == 5 ? 4 : 0);
}

/* The second byte of an opcode 0F xx is at `at`. Length from there on, or 0. */
static int two_byte_length(SevInstruction *instruction, const uint8_t *at,
                           int address_bits, int rex_b)
{
    switch (at[0]) {
    case 0x20 ... 0x23: /* MOV to or from CRn, DRn: memory is no operand */
        instruction->gpr = (at[1] & 7) | rex_b;
        return 2;
    case 0x00: case 0x01: case 0xc7: /* groups 6, 7 and 9 */
        return 1 + operand_length(at + 1, address_bits);
    case 0x06: case 0x08: case 0x09: /* CLTS, INVD, WBINVD */
    case 0x30 ... 0x33: /* WRMSR, RDTSC, RDMSR, RDPMC */
    case 0xa2: case 0xaa: /* CPUID, RSM */
        return 1;
    default:
        return 0;
    }
}

static int opcode_length(SevInstruction *instruction, const uint8_t *at,
                         int address_bits, int rex_b)
{
    int length;

    switch (at[0]) {
    case 0x0f:
        length = two_byte_length(instruction, at + 1, address_bits, rex_b);
        return length ? 1 + length : 0;
    case 0x6c ... 0x6f: /* INS, OUTS */
    case 0xec ... 0xef: /* IN, OUT: port in DX */
    case 0x90: /* with F3: PAUSE */
    case 0x9c: case 0x9d: case 0xcf: /* PUSHF, POPF, IRET */
    case 0xcc: case 0xce: case 0xf1: case 0xf4: /* INT3, INTO, INT1, HLT */
        return 1;
    case 0xcd: /* INTn */
    case 0xe4 ... 0xe7: /* IN, OUT: port in the instruction */
        return 2;
    default:
        return 0;
    }
}

void sevlab_decode(CPUX86State *env, SevInstruction *instruction)
{
    bool code64 = env->hflags & HF_CS64_MASK;
    int address_bits = default_bits(env);
    int rex_b = 0, at, length;

    sevlab_fetch(env, instruction);
    for (at = 0; at < MAX_LENGTH - 4; at++) {
        uint8_t byte = instruction->bytes[at];

        if (code64 && (byte & 0xf0) == 0x40) {
            rex_b = (byte & 1) << 3;
            continue;
        }
        switch (byte) {
        case 0x67:
            address_bits = address_bits == 32 ? (code64 ? 64 : 16) : 32;
            continue;
        case 0xf2: case 0xf3:
            instruction->repeated = true;
            continue;
        case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65:
        case 0x66: case 0xf0:
            continue;
        }
        break;
    }
    length = opcode_length(instruction, instruction->bytes + at, address_bits,
                           rex_b);
    if (length && at + length <= instruction->fetched) {
        instruction->length = at + length;
    }
}

/* EXITINFO1 of an intercepted access to a control or debug register. */
static uint64_t register_info(uint64_t exit_code, uint64_t gpr)
{
    bool debug = exit_code >= SVM_EXIT_READ_DR0 &&
                 exit_code < SVM_EXIT_EXCP_BASE;

    return debug ? gpr : gpr | CRX_VALID;
}

uint64_t sevlab_assist(CPUX86State *env, uint64_t exit_code,
                       uint64_t exit_info_1)
{
    CPUState *cs = env_cpu(env);
    uint64_t next_rip = 0;
    SevInstruction instruction;
    int i;

    switch (exit_code) {
    case SVM_EXIT_READ_CR0 ... SVM_EXIT_EXCP_BASE - 1:
    case SVM_EXIT_EXCP_BASE + EXCP03_INT3:
    case SVM_EXIT_EXCP_BASE + EXCP04_INTO:
    case SVM_EXIT_CR0_SEL_WRITE ... SVM_EXIT_MSR:
    case SVM_EXIT_VMRUN ... SVM_EXIT_XSETBV:
        sevlab_decode(env, &instruction);
        if (instruction.length) {
            next_rip = env->eip + instruction.length;
        }
        if (instruction.length && instruction.gpr >= 0) {
            exit_info_1 = register_info(exit_code, instruction.gpr);
        }
        break;
    case SVM_EXIT_EXCP_BASE + EXCP0E_PAGE:
    case SVM_EXIT_NPF:
        sevlab_fetch(env, &instruction);
        x86_stb_phys(cs, env->vm_vmcb + VMCB_INSN_LEN, instruction.fetched);
        for (i = 0; i < MAX_LENGTH; i++) {
            x86_stb_phys(cs, env->vm_vmcb + VMCB_INSN_BYTES + i,
                         instruction.bytes[i]);
        }
        break;
    }
    x86_stq_phys(cs, env->vm_vmcb + VMCB_NEXT_RIP, next_rip);
    return exit_info_1;
}

void sevlab_inject_software(CPUX86State *env, uint8_t vector)
{
    uint64_t next_rip = x86_ldq_phys(env_cpu(env),
                                     env->vm_vmcb + VMCB_NEXT_RIP);

    /* Exceptions by INT3 and INTO are injected as exceptions. */
    if (!env->exception_is_int &&
        vector != EXCP03_INT3 && vector != EXCP04_INTO) {
        return;
    }
    if (env->features[FEAT_SVM] & CPUID_SVM_NRIPSAVE && next_rip) {
        env->exception_is_int = 1;
        env->exception_next_eip = next_rip;
    }
}
