/*
 * Which processors have written back their caches. Here nothing is cached; the
 * security processor asks whether the host does what a real machine needs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "cpu.h"
#include "exec/helper-proto.h"
#include "sevlab.h"

void helper_sevlab_wbinvd(CPUX86State *env)
{
    env->sevlab.written_back = true;
}

void sevlab_caches_are_dirty(void)
{
    CPUState *cs;

    CPU_FOREACH(cs) {
        cpu_env(cs)->sevlab.written_back = false;
    }
}

bool sevlab_caches_written_back(void)
{
    CPUState *cs;

    CPU_FOREACH(cs) {
        if (!cpu_env(cs)->sevlab.written_back) {
            return false;
        }
    }
    return true;
}
