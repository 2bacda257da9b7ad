/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The flag by which QEMU remembers that the registers of an SEV-ES guest are protected.
 *
 * QEMU 9.1 and later set it when the launch has encrypted the registers (KVMState.guest_state_protected), and from then on
 * neither read nor write any vCPU state. But only the registers are in the VMSA, which the move takes along. The rest
 * arrives with the device state and has to reach the kernel: local APIC, MSRs, pending events, MP state. So the flag is
 * cleared until the hop is over. QEMU 10.0 would not even start with it: its reset before the stream asserts.
 *
 * Where the flag is depends on version and compiler. It is found by what happens: the one byte of KVMState that changes
 * from 0 to 1 between the two launch commands around it.
 */
#include "adopt.h"
#include "qemu.h"

#include <string.h>

#define SEARCHED 512 /* bytes of KVMState, which is larger */

static unsigned char before[SEARCHED];
static bool launching;
static size_t flag; /* its offset; 0: none, since KVMState begins with a pointer */

/* QEMU calls LAUNCH_UPDATE_VMSA. */
void protected_state_launch(void)
{
    if (!&kvm_state || !kvm_state)
        return;
    memcpy(before, kvm_state, sizeof before);
    launching = true;
}

/* QEMU calls LAUNCH_MEASURE, right after it has set the flag. */
void protected_state_launched(void)
{
    size_t found = 0;

    if (!launching)
        return;
    launching = false;
    for (size_t i = 1; i < sizeof before; i++) {
        if (kvm_state[i] == before[i])
            continue;
        if (found || before[i] != 0 || kvm_state[i] != 1)
            fatal("cannot find out where this QEMU marks the guest's registers as protected: more has changed than a flag");
        found = i;
    }
    if (!found && kvm_mark_guest_state_protected)
        fatal("cannot find out where this QEMU marks the guest's registers as protected: nothing has changed");
    if (found)
        kvm_state[found] = 0;
    flag = found;
}

size_t protected_state_offset(void)
{
    return flag;
}

/* The hop is over: QEMU believes again what is true of any SEV-ES guest, for example that it cannot be reset. */
void protected_state_finish(void)
{
    if (flag)
        kvm_state[flag] = 1;
}
