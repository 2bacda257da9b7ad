/*
 * Measurement and secrets: SEV API, LAUNCH_MEASURE and LAUNCH_SECRET. Real
 * ciphers, and real keys but for their origin.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/guest-random.h"
#include "crypto/aes.h"
#include "owner.h"

/* The first byte of what is authenticated says what it is. */
#define CONTEXT_SECRET      0x01
#define CONTEXT_MEASURE     0x04

/* The header of a packet. */
#define PACKET_IV           4
#define PACKET_MAC          20

void sevlab_owner_init(SevOwner *owner)
{
    qemu_guest_getrandom_nofail(owner->tik, sizeof(owner->tik));
    qemu_guest_getrandom_nofail(owner->tek, sizeof(owner->tek));
    owner->launched = g_checksum_new(G_CHECKSUM_SHA256);
}

void sevlab_owner_finish(SevOwner *owner)
{
    g_clear_pointer(&owner->launched, g_checksum_free);
}

void sevlab_owner_add(SevOwner *owner, const uint8_t *data, size_t length)
{
    g_checksum_update(owner->launched, data, length);
}

void sevlab_owner_digest(SevOwner *owner, uint8_t digest[SEV_DIGEST])
{
    GChecksum *so_far = g_checksum_copy(owner->launched);
    gsize length = SEV_DIGEST;

    g_checksum_get_digest(so_far, digest, &length);
    g_checksum_free(so_far);
}

static GHmac *authenticate(SevOwner *owner, uint8_t context)
{
    GHmac *mac = g_hmac_new(G_CHECKSUM_SHA256, owner->tik, sizeof(owner->tik));

    g_hmac_update(mac, &context, sizeof(context));
    return mac;
}

static void add32(GHmac *mac, uint32_t value)
{
    uint32_t bytes = cpu_to_le32(value);

    g_hmac_update(mac, (const uint8_t *)&bytes, sizeof(bytes));
}

static void finish(GHmac *mac, uint8_t digest[SEV_DIGEST])
{
    gsize length = SEV_DIGEST;

    g_hmac_get_digest(mac, digest, &length);
    g_hmac_unref(mac);
}

void sevlab_owner_measure(SevOwner *owner, const uint8_t version[3],
                          uint32_t policy, uint8_t *out)
{
    uint8_t *nonce = out + SEV_DIGEST;
    uint8_t digest[SEV_DIGEST];
    GHmac *mac;

    sevlab_owner_digest(owner, digest);
    qemu_guest_getrandom_nofail(nonce, SEV_NONCE);
    mac = authenticate(owner, CONTEXT_MEASURE);
    g_hmac_update(mac, version, 3);
    add32(mac, policy);
    g_hmac_update(mac, digest, SEV_DIGEST);
    g_hmac_update(mac, nonce, SEV_NONCE);
    finish(mac, owner->measure);
    memcpy(out, owner->measure, SEV_DIGEST);
}

/* AES-128 in counter mode: its own inverse. */
static void cipher(SevOwner *owner, const uint8_t *iv, uint8_t *data,
                   uint32_t length)
{
    uint8_t counter[AES_BLOCK_SIZE], stream[AES_BLOCK_SIZE];
    AES_KEY key;

    AES_set_encrypt_key(owner->tek, 8 * SEV_OWNER_KEY, &key);
    memcpy(counter, iv, sizeof(counter));
    for (uint32_t at = 0; at < length; at++) {
        if (at % AES_BLOCK_SIZE == 0) {
            AES_encrypt(counter, stream, &key);
            for (int i = AES_BLOCK_SIZE - 1; i >= 0 && !++counter[i]; i--) {
                /* carries into the byte before */
            }
        }
        data[at] ^= stream[at % AES_BLOCK_SIZE];
    }
}

bool sevlab_owner_open(SevOwner *owner, const uint8_t *header,
                       uint32_t guest_length, uint8_t *data, uint32_t length)
{
    GHmac *mac = authenticate(owner, CONTEXT_SECRET);
    uint8_t digest[SEV_DIGEST];

    g_hmac_update(mac, header, PACKET_MAC);
    add32(mac, guest_length);
    add32(mac, length);
    g_hmac_update(mac, data, length);
    g_hmac_update(mac, owner->measure, SEV_DIGEST);
    finish(mac, digest);
    if (memcmp(digest, header + PACKET_MAC, SEV_DIGEST)) {
        return false;
    }
    cipher(owner, header + PACKET_IV, data, length);
    return true;
}
