/*
 * Encryption that can be seen.
 *
 * Memory always has the ciphertext of an encrypted guest's private pages, under
 * a key of its ASID and of the page's address: who copies such a page, or looks
 * at it from the host, another guest or another address, gets garbage. While a
 * vCPU runs the guest, pages that it touches are decrypted in place ("open");
 * when it leaves the guest, or its thread turns to another vCPU, they are
 * encrypted again. This is right with one thread for all vCPUs only.
 *
 * The cipher is a stream of pseudo-random words, added to the data: it is its
 * own inverse, and hides nothing from an attacker.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/rcu.h"
#include "cpu.h"
#include "exec/exec-all.h"
#include "exec/cputlb.h"
#include "exec/tb-flush.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "sevlab.h"
#include "memory.h"

/* A page that the guest on the current vCPU has touched. */
typedef struct Page {
    uint8_t *host;
    ram_addr_t address;
    uint64_t key;
    bool open;          /* else shared with the host */
} Page;

static struct {
    bool on;
    uint64_t keys[SEV_ASIDS + 1];
    uint64_t code_key;      /* under which TCG has translated code */
    GHashTable *touched;    /* number of the page -> Page */
} memory;

/* What a guest whose ASID has no key reads is as good as random. */
#define NO_KEY  0x6e6f6b6579ULL

void sevlab_memory_encrypt_from_now_on(void)
{
    g_assert(!qemu_tcg_mttcg_enabled());
    memory.on = true;
    memory.touched = g_hash_table_new_full(NULL, NULL, NULL, g_free);
}

void sevlab_memory_set_key(uint32_t asid, uint64_t key)
{
    g_assert(asid <= SEV_ASIDS);
    memory.keys[asid] = key;
}

/* One word of the stream: the finaliser of MurmurHash3. */
static uint64_t stream(uint64_t key, uint64_t number)
{
    uint64_t x = key + number * 0x9e3779b97f4a7c15ULL;

    x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
    return x ^ x >> 33;
}

void sevlab_memory_cipher(uint64_t key, ram_addr_t address, uint8_t *data,
                          size_t length)
{
    if (!memory.on) {
        return;
    }
    g_assert(QEMU_IS_ALIGNED(address | length, 8));
    for (size_t at = 0; at < length; at += 8) {
        stq_le_p(data + at, ldq_le_p(data + at) ^
                 stream(key, (address + at) / 8));
    }
}

static uint8_t *find_ram(AddressSpace *as, hwaddr address, ram_addr_t *found)
{
    hwaddr offset, length = 1;
    MemoryRegion *region;

    RCU_READ_LOCK_GUARD();
    region = address_space_translate(as, address, &offset, &length, false,
                                     MEMTXATTRS_UNSPECIFIED);
    if (!memory_region_is_ram(region)) {
        return NULL;
    }
    *found = memory_region_get_ram_addr(region) + offset;
    return (uint8_t *)memory_region_get_ram_ptr(region) + offset;
}

ram_addr_t sevlab_memory_address(AddressSpace *as, hwaddr address)
{
    ram_addr_t found;

    return find_ram(as, address, &found) ? found : RAM_ADDR_INVALID;
}

static void cipher_page(Page *page)
{
    sevlab_memory_cipher(page->key, page->address, page->host,
                         TARGET_PAGE_SIZE);
    page->open = !page->open;
}

/* The key of the running guest. */
static uint64_t current_key(CPUX86State *env)
{
    uint64_t key = memory.keys[env->sevlab.asid] ?: NO_KEY;

    if (key != memory.code_key) {
        /* Code that was translated under another key would still run. */
        memory.code_key = key;
        tb_flush(env_cpu(env));
    }
    return key;
}

static void touch(CPUX86State *env, uint8_t *host, ram_addr_t address,
                  bool private)
{
    gpointer number = GSIZE_TO_POINTER(address >> TARGET_PAGE_BITS);
    Page *page = g_hash_table_lookup(memory.touched, number);

    if (!page) {
        page = g_new0(Page, 1);
        page->key = current_key(env);
        page->address = address & TARGET_PAGE_MASK;
        page->host = host - (address & ~TARGET_PAGE_MASK);
        g_hash_table_insert(memory.touched, number, page);
        if (private) {
            cipher_page(page);
        }
    } else if (page->open != private) {
        /* The guest has changed its mind: nothing may remember the other. */
        cipher_page(page);
        tlb_flush(env_cpu(env));
    }
}

void sevlab_memory_open_host(CPUX86State *env, void *host)
{
    if (memory.on) {
        touch(env, host, qemu_ram_addr_from_host_nofail(host), true);
    }
}

static void touch_address(CPUX86State *env, hwaddr address, bool private)
{
    ram_addr_t found;
    uint8_t *host;

    if (memory.on) {
        host = find_ram(env_cpu(env)->as, address, &found);
        if (host) {
            touch(env, host, found, private);
        }
    }
}

void sevlab_memory_open(CPUX86State *env, hwaddr address)
{
    touch_address(env, address, true);
}

void sevlab_memory_share(CPUX86State *env, hwaddr address)
{
    touch_address(env, address, false);
}

static void close_page(gpointer number, gpointer value, gpointer unused)
{
    Page *page = value;

    if (page->open) {
        cipher_page(page);
    }
}

void sevlab_memory_close_all(CPUX86State *env)
{
    if (memory.on && g_hash_table_size(memory.touched)) {
        g_hash_table_foreach(memory.touched, close_page, NULL);
        g_hash_table_remove_all(memory.touched);
        tlb_flush(env_cpu(env));
    }
}

void sevlab_pause(CPUX86State *env)
{
    if (sev_guest(env)) {
        sevlab_memory_close_all(env);
    }
}
