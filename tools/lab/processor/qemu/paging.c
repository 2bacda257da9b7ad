/*
 * The C-bit: which of a guest's pages are private [APM 15.34.5].
 *
 * It is taken out of every entry of the guest's own page tables before the
 * walk sees it, and out of CR3; it never gets into a physical address. What it
 * says matters to memory.c alone.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "sevlab.h"
#include "memory.h"

void sevlab_walk(CPUX86State *env)
{
    /* Without an entry of 64 bits there is no C-bit: all is private. */
    env->sevlab.leaf_is_private = true;
}

uint64_t sevlab_pte(CPUX86State *env, int ptw_idx, uint64_t pte)
{
    /* The host's tables, and those of plain guests, have no C-bit. */
    if (ptw_idx != MMU_NESTED_IDX || !sev_guest(env)) {
        return pte;
    }
    env->sevlab.leaf_is_private = pte & env->sevlab.c_bit;
    return pte & ~env->sevlab.c_bit;
}

uint64_t sevlab_cr3(CPUX86State *env)
{
    return env->cr[3] & ~env->sevlab.c_bit;
}

void sevlab_page_table(CPUX86State *env, int ptw_idx, void *host)
{
    /* Page tables are private whatever the entry that leads there says. */
    if (ptw_idx == MMU_NESTED_IDX && sev_guest(env) && host) {
        sevlab_memory_open_host(env, host);
    }
}

void sevlab_translated(CPUX86State *env, int mmu_idx, hwaddr address,
                       MMUAccessType access)
{
    if (!sev_guest(env) || mmu_idx == MMU_NESTED_IDX ||
        mmu_idx == MMU_PHYS_IDX) {
        return;
    }
    /* Instructions are always fetched as private. */
    if (env->sevlab.leaf_is_private || access == MMU_INST_FETCH) {
        sevlab_memory_open(env, address);
    } else {
        sevlab_memory_share(env, address);
    }
}
