/*
 * The firmware of the security processor: its account of the platform and of
 * its guests. Knows nothing of PCI; the device (psp.c) gives it memory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef SEVLAB_FIRMWARE_H
#define SEVLAB_FIRMWARE_H

#include "exec/memory.h"

typedef struct SevFirmware SevFirmware;

/*
 * :param as: where command buffers, and what they point at, are.
 * :param encrypt: keep the memory of guests encrypted (memory.c).
 */
SevFirmware *sevlab_firmware_new(AddressSpace *as, bool encrypt);

/*
 * Executes a command of the SEV API.
 *
 * :param command: its number, see firmware.c.
 * :param buffer: the physical address of its command buffer.
 * :return: a status of the SEV API.
 */
uint16_t sevlab_firmware_execute(SevFirmware *firmware, unsigned int command,
                                 hwaddr buffer);

/* What the firmware knows, for people and tests: lines of NAME=VALUE. */
char *sevlab_firmware_describe(SevFirmware *firmware);

#endif
