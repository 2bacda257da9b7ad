// SPDX-License-Identifier: GPL-2.0-only
/*
 * The one symbol whose version depends on the includes of its source file.
 *
 * The kernel computes a symbol's CRC from the types that the compiler has seen when it met the symbol: struct file
 * counts as another type if its members are only declared. So the includes here, and their order, are those of the
 * kernel's own drivers/crypto/ccp/sev-dev.c, and nothing else may be included. The build compares the CRC with the
 * real one: this is where to look when a new kernel reports a mismatch.
 */
#include <linux/version.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
#include <linux/bitfield.h>
#endif
#include <linux/module.h>
#include <linux/kernel.h>
#include <linux/kthread.h>
#include <linux/sched.h>
#include <linux/interrupt.h>
#include <linux/spinlock.h>
#include <linux/spinlock_types.h>
#include <linux/types.h>
#include <linux/mutex.h>
#include <linux/delay.h>
#include <linux/hw_random.h>
#include <linux/ccp.h>
#include <linux/firmware.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
#include <linux/panic_notifier.h>
#endif
#include <linux/gfp.h>
#include <linux/cpufeature.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
#include <linux/psp.h>
#include <linux/amd-iommu.h>
#include <linux/crash_dump.h>
#endif
#include <asm/smp.h>
#include <asm/cacheflush.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
#include <asm/e820/types.h>
#include <asm/sev.h>
#endif
/* What psp-dev.h, sp-dev.h and sev-dev.h, which are no public headers, include. */
#include <linux/device.h>
#include <linux/list.h>
#include <linux/bits.h>
#include <linux/wait.h>
#include <linux/dmapool.h>
#include <linux/bitops.h>
#include <linux/irqreturn.h>
#include <linux/dmaengine.h>
#include <linux/psp-sev.h>
#include <linux/miscdevice.h>
#include <linux/capability.h>

#include "fake_psp.h"

int sev_issue_cmd_external_user(struct file *filep, unsigned int cmd, void *data, int *error)
{
    if (!filep || filep->f_op != &fake_psp_fops)
        return -EBADF;
    return fake_psp_command(cmd, data, error);
}
EXPORT_SYMBOL_GPL(sev_issue_cmd_external_user);
