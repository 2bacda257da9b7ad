/*
 * The memory controller of a processor with SEV: see memory.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef SEVLAB_MEMORY_H
#define SEVLAB_MEMORY_H

#include "cpu.h"

/* ---- for the security processor ---- */

/* From now on memory is encrypted. Without this call all else does nothing. */
void sevlab_memory_encrypt_from_now_on(void);

/* The key of an ASID; 0: none, its guest reads garbage. */
void sevlab_memory_set_key(uint32_t asid, uint64_t key);

/*
 * Encrypts, or decrypts, which is the same here: bytes that are at this
 * address, or shall get there.
 */
void sevlab_memory_cipher(uint64_t key, ram_addr_t address, uint8_t *data,
                          size_t length);

/* The address by which a page of memory is known to the cipher; -1: no RAM. */
ram_addr_t sevlab_memory_address(AddressSpace *as, hwaddr address);

/* ---- for the processor ---- */

/* The guest is about to see the page at this address as a private one... */
void sevlab_memory_open(CPUX86State *env, hwaddr address);
/* ... the same, where QEMU has it... */
void sevlab_memory_open_host(CPUX86State *env, void *host);
/* ... or as one that it shares with the host. */
void sevlab_memory_share(CPUX86State *env, hwaddr address);

/* Nobody but the guest may see what its private pages contain. */
void sevlab_memory_close_all(CPUX86State *env);

#endif
