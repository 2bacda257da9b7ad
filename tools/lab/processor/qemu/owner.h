/*
 * What the firmware shares with the owner of a guest: the measurement of what
 * was launched, and secrets that only this guest gets.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef SEVLAB_OWNER_H
#define SEVLAB_OWNER_H

#define SEV_OWNER_KEY       16      /* bytes of TIK and TEK */
#define SEV_NONCE           16
#define SEV_DIGEST          32
#define SEV_MEASUREMENT     (SEV_DIGEST + SEV_NONCE)
#define SEV_PACKET_HEADER   52      /* flags, IV, MAC */

typedef struct SevOwner {
    uint8_t tik[SEV_OWNER_KEY];     /* integrity */
    uint8_t tek[SEV_OWNER_KEY];     /* encryption */
    GChecksum *launched;            /* of all that was added */
    uint8_t measure[SEV_DIGEST];
} SevOwner;

/* New random keys: nobody has sent any. */
void sevlab_owner_init(SevOwner *owner);
void sevlab_owner_finish(SevOwner *owner);

/* Plaintext that is added to the guest. */
void sevlab_owner_add(SevOwner *owner, const uint8_t *data, size_t length);

/* The digest of what was added. */
void sevlab_owner_digest(SevOwner *owner, uint8_t digest[SEV_DIGEST]);

/*
 * Measures what was added.
 *
 * :param version: of the API: major, minor, build.
 * :param out: gets SEV_MEASUREMENT bytes.
 */
void sevlab_owner_measure(SevOwner *owner, const uint8_t version[3],
                          uint32_t policy, uint8_t *out);

/*
 * Decrypts a secret in place.
 *
 * :param header: of the packet, SEV_PACKET_HEADER bytes.
 * :param guest_length: of the guest's memory that it is for.
 * :return: false if it is not from the owner, or not for this guest.
 */
bool sevlab_owner_open(SevOwner *owner, const uint8_t *header,
                       uint32_t guest_length, uint8_t *data, uint32_t length);

#endif
