/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef FAKE_PSP_H
#define FAKE_PSP_H

#include <linux/types.h>

struct file_operations;
struct seq_file;

/* ASIDs 1..99 are for SEV-ES guests, 100..509 for SEV guests: the split of a real EPYC. */
#define FAKE_PSP_ASIDS 509
#define FAKE_PSP_FIRST_SEV_ASID 100

/*
 * Executes one command of the SEV firmware API (SEV_CMD_*, <linux/psp-sev.h>) on its command buffer.
 * Returns 0, or -EIO with the firmware's status (SEV_RET_*) in *error, like the real sev_do_cmd().
 */
int fake_psp_command(int command, void *buffer, int *error);

/* Lists the guests that the firmware knows, one a line. */
void fake_psp_list_guests(struct seq_file *to);

/* /dev/sev. KVM accepts no other file as its sev_fd. */
extern const struct file_operations fake_psp_fops;

/* Makes the processor look capable of SEV and SEV-ES to all modules that are loaded after this one. */
void fake_processor_install(void);

#endif
