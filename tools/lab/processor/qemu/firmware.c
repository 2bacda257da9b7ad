/*
 * The SEV firmware as a host sees it: AMD document 55766, "SEV API". Commands,
 * states and statuses have the names and numbers of that document.
 *
 * It keeps the account of platform and guests and refuses what the account
 * forbids. It has no certificates: a guest's owner cannot send keys, so that
 * those of owner.c are the firmware's own, which the account shows, and nothing
 * is signed. SEND, RECEIVE and the commands of certificates are not supported.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/guest-random.h"
#include "qemu/queue.h"
#include "qemu/units.h"
#include "firmware.h"
#include "memory.h"
#include "owner.h"
#include "sevlab.h"

#define API_MAJOR       1
#define API_MINOR       55
#define BUILD           8

typedef enum Command {
    INIT = 0x01,
    SHUTDOWN = 0x02,
    PLATFORM_RESET = 0x03,
    PLATFORM_STATUS = 0x04,
    PEK_GEN = 0x05,
    PEK_CERT_IMPORT = 0x07,
    PDH_CERT_EXPORT = 0x08,
    PDH_GEN = 0x09,
    DF_FLUSH = 0x0a,
    GET_ID = 0x0c,
    INIT_EX = 0x0d,
    NOP = 0x0e,
    DECOMMISSION = 0x20,
    ACTIVATE = 0x21,
    DEACTIVATE = 0x22,
    GUEST_STATUS = 0x23,
    COPY = 0x24,
    ACTIVATE_EX = 0x25,
    LAUNCH_START = 0x30,
    LAUNCH_UPDATE_DATA = 0x31,
    LAUNCH_UPDATE_VMSA = 0x32,
    LAUNCH_MEASURE = 0x33,
    LAUNCH_SECRET = 0x34,
    LAUNCH_FINISH = 0x35,
    ATTESTATION = 0x36,
    SEND_START = 0x40,
    RECEIVE_FINISH = 0x53,
    DBG_DECRYPT = 0x60,
    DBG_ENCRYPT = 0x61,
    SWAP_OUT = 0x70,
    SWAP_IN = 0x71,
} Command;

typedef enum Status {
    SUCCESS = 0x00,
    INVALID_PLATFORM_STATE = 0x01,
    INVALID_GUEST_STATE = 0x02,
    INVALID_LENGTH = 0x04,
    POLICY_FAILURE = 0x07,
    INACTIVE = 0x08,
    INVALID_ADDRESS = 0x09,
    BAD_MEASUREMENT = 0x0b,
    ASID_OWNED = 0x0c,
    INVALID_ASID = 0x0d,
    WBINVD_REQUIRED = 0x0e,
    DFFLUSH_REQUIRED = 0x0f,
    INVALID_GUEST = 0x10,
    INVALID_COMMAND = 0x11,
    ACTIVE = 0x12,
    UNSUPPORTED = 0x15,
    INVALID_PARAM = 0x16,
    RESOURCE_LIMIT = 0x17,
} Status;

typedef enum PlatformState {
    UNINIT, INITIALISED, WORKING,
} PlatformState;

typedef enum GuestState {
    LUPDATE = 1,        /* LAUNCH_START is done, pages are being added */
    LSECRET = 2,        /* measured: secrets may be injected */
    RUNNING = 3,        /* LAUNCH_FINISH is done */
} GuestState;

/* Bits of a guest's policy. */
#define POLICY_NODBG        (1U << 0)
#define POLICY_NOKS         (1U << 1)
#define POLICY_ES           (1U << 2)
#define POLICY_API_MINOR    16
#define POLICY_API_MAJOR    24

#define INIT_FLAG_ES        (1U << 0)

#define TMR_SIZE            MiB         /* and alignment */
#define BLOCK               16          /* the cipher's, in bytes */
#define GUESTS              1024
#define SECRET_MOST         (16 * KiB)

/* Lengths of what the firmware hands out. */
#define ID_LENGTH           64
#define PDH_LENGTH          2084
#define CHAIN_LENGTH        6252
#define ATTESTATION_LENGTH  0xd0

typedef struct Guest {
    uint32_t handle;
    uint32_t policy;
    uint32_t asid;      /* 0: not active */
    GuestState state;
    uint64_t key;
    uint64_t bytes;     /* that LAUNCH_UPDATE_DATA has encrypted */
    uint32_t vmsas;
    SevOwner owner;
    QTAILQ_ENTRY(Guest) link;
} Guest;

struct SevFirmware {
    AddressSpace *as;
    bool initialised;
    bool es;
    uint32_t last_handle;
    unsigned int count;
    QTAILQ_HEAD(, Guest) guests;
    /* ASIDs that a guest may have left since the last DF_FLUSH. */
    DECLARE_BITMAP(unflushed, SEV_ASIDS + 1);
};

/* ---- the host's memory ---- */

static uint32_t read32(SevFirmware *firmware, hwaddr at)
{
    return address_space_ldl_le(firmware->as, at, MEMTXATTRS_UNSPECIFIED, NULL);
}

static uint64_t read64(SevFirmware *firmware, hwaddr at)
{
    return address_space_ldq_le(firmware->as, at, MEMTXATTRS_UNSPECIFIED, NULL);
}

static void write32(SevFirmware *firmware, hwaddr at, uint32_t value)
{
    address_space_stl_le(firmware->as, at, value, MEMTXATTRS_UNSPECIFIED, NULL);
}

static void write_bytes(SevFirmware *firmware, hwaddr at, const void *data,
                        size_t length)
{
    address_space_write(firmware->as, at, MEMTXATTRS_UNSPECIFIED, data, length);
}

/*
 * Is there room for data of a known length? Who does not know it asks with a
 * length that is too small, and gets it.
 */
static Status check_room(SevFirmware *firmware, hwaddr address_field,
                         hwaddr length_field, size_t needed)
{
    uint64_t address = read64(firmware, address_field);
    uint32_t length = read32(firmware, length_field);

    write32(firmware, length_field, needed);
    return address && length >= needed ? SUCCESS : INVALID_LENGTH;
}

/* Hands out zeros, in place of something that the lab does not have. */
static Status hand_out(SevFirmware *firmware, hwaddr address_field,
                       hwaddr length_field, size_t needed)
{
    g_autofree uint8_t *data = g_malloc0(needed);
    Status status = check_room(firmware, address_field, length_field, needed);

    if (status == SUCCESS) {
        write_bytes(firmware, read64(firmware, address_field), data, needed);
    }
    return status;
}

/*
 * Passes memory of a guest through its cipher, from one place to another.
 *
 * :param under: the address that is part of the key.
 * :param measured: it is plaintext that is added to the guest.
 */
static void cipher(SevFirmware *firmware, Guest *guest, hwaddr from, hwaddr to,
                   hwaddr under, uint32_t length, bool measured)
{
    while (length) {
        uint32_t part = MIN(length, TARGET_PAGE_SIZE -
                            (under & ~TARGET_PAGE_MASK));
        ram_addr_t address = sevlab_memory_address(firmware->as, under);
        uint8_t page[TARGET_PAGE_SIZE];

        address_space_read(firmware->as, from, MEMTXATTRS_UNSPECIFIED, page,
                           part);
        if (measured) {
            sevlab_owner_add(&guest->owner, page, part);
        }
        sevlab_memory_cipher(guest->key, address, page, part);
        write_bytes(firmware, to, page, part);
        from += part;
        to += part;
        under += part;
        length -= part;
    }
}

static Status check_blocks(SevFirmware *firmware, hwaddr address,
                           uint32_t length)
{
    if (!QEMU_IS_ALIGNED(address, BLOCK) ||
        sevlab_memory_address(firmware->as, address) == RAM_ADDR_INVALID) {
        return INVALID_ADDRESS;
    }
    return length && QEMU_IS_ALIGNED(length, BLOCK) ? SUCCESS : INVALID_LENGTH;
}

/* ---- the platform ---- */

static PlatformState platform_state(SevFirmware *firmware)
{
    if (!firmware->initialised) {
        return UNINIT;
    }
    return firmware->count ? WORKING : INITIALISED;
}

static Status init(SevFirmware *firmware, hwaddr flags_at, hwaddr tmr_at)
{
    uint32_t flags = read32(firmware, flags_at);
    uint64_t tmr = read64(firmware, tmr_at);
    uint32_t tmr_length = read32(firmware, tmr_at + 8);

    if (firmware->initialised) {
        return INVALID_PLATFORM_STATE;
    }
    if (flags & ~INIT_FLAG_ES) {
        return INVALID_PARAM;
    }
    /* The trusted memory region holds what SEV-ES needs. */
    if (flags & INIT_FLAG_ES) {
        if (!QEMU_IS_ALIGNED(tmr, TMR_SIZE)) {
            return INVALID_ADDRESS;
        }
        if (tmr_length < TMR_SIZE) {
            return INVALID_LENGTH;
        }
    }
    firmware->initialised = true;
    firmware->es = flags & INIT_FLAG_ES;
    /* Nobody knows who used them before. */
    bitmap_fill(firmware->unflushed, SEV_ASIDS + 1);
    sevlab_caches_are_dirty();
    return SUCCESS;
}

static void release_asid(SevFirmware *firmware, Guest *guest)
{
    sevlab_memory_set_key(guest->asid, 0);
    set_bit(guest->asid, firmware->unflushed);
    sevlab_caches_are_dirty();
    guest->asid = 0;
}

static void remove_guest(SevFirmware *firmware, Guest *guest)
{
    if (guest->asid) {
        release_asid(firmware, guest);
    }
    sevlab_owner_finish(&guest->owner);
    QTAILQ_REMOVE(&firmware->guests, guest, link);
    firmware->count--;
    g_free(guest);
}

static Status platform_shutdown(SevFirmware *firmware)
{
    Guest *guest, *next;

    QTAILQ_FOREACH_SAFE(guest, &firmware->guests, link, next) {
        remove_guest(firmware, guest);
    }
    firmware->initialised = false;
    firmware->es = false;
    return SUCCESS;
}

static Status platform_status(SevFirmware *firmware, hwaddr buffer)
{
    /* Behind the state: who owns the platform (itself), and its options. */
    const uint8_t status[] = {
        API_MAJOR, API_MINOR, platform_state(firmware), 0, firmware->es, 0, 0,
        BUILD,
    };

    write_bytes(firmware, buffer, status, sizeof(status));
    write32(firmware, buffer + 8, firmware->count);
    return SUCCESS;
}

static Status pdh_cert_export(SevFirmware *firmware, hwaddr buffer)
{
    Status pdh, chain;

    pdh = hand_out(firmware, buffer, buffer + 8, PDH_LENGTH);
    chain = hand_out(firmware, buffer + 16, buffer + 24, CHAIN_LENGTH);
    return pdh != SUCCESS ? pdh : chain;
}

static Status df_flush(SevFirmware *firmware)
{
    if (!sevlab_caches_written_back()) {
        return WBINVD_REQUIRED;
    }
    bitmap_zero(firmware->unflushed, SEV_ASIDS + 1);
    return SUCCESS;
}

/* ---- guests: from LAUNCH_START to DECOMMISSION ---- */

static Guest *find_guest(SevFirmware *firmware, uint32_t handle)
{
    Guest *guest;

    QTAILQ_FOREACH(guest, &firmware->guests, link) {
        if (guest->handle == handle) {
            return guest;
        }
    }
    return NULL;
}

static bool asid_is_owned(SevFirmware *firmware, uint32_t asid)
{
    Guest *guest;

    QTAILQ_FOREACH(guest, &firmware->guests, link) {
        if (guest->asid == asid) {
            return true;
        }
    }
    return false;
}

static bool policy_allows(SevFirmware *firmware, uint32_t policy)
{
    uint8_t major = policy >> POLICY_API_MAJOR;
    uint8_t minor = policy >> POLICY_API_MINOR;

    if (policy & POLICY_ES && !firmware->es) {
        return false;
    }
    return major < API_MAJOR || (major == API_MAJOR && minor <= API_MINOR);
}

static Status launch_start(SevFirmware *firmware, hwaddr buffer)
{
    uint32_t shared_with = read32(firmware, buffer);
    uint32_t policy = read32(firmware, buffer + 4);
    Guest *other = NULL;
    Guest *guest;

    if (!policy_allows(firmware, policy)) {
        return POLICY_FAILURE;
    }
    if (shared_with) {
        other = find_guest(firmware, shared_with);
        if (!other) {
            return INVALID_GUEST;
        }
        if (other->policy & POLICY_NOKS || other->policy != policy) {
            return POLICY_FAILURE;
        }
    }
    if (firmware->count == GUESTS) {
        return RESOURCE_LIMIT;
    }
    guest = g_new0(Guest, 1);
    guest->handle = ++firmware->last_handle;
    guest->policy = policy;
    guest->state = LUPDATE;
    if (other) {
        guest->key = other->key;
    } else {
        qemu_guest_getrandom_nofail(&guest->key, sizeof(guest->key));
    }
    sevlab_owner_init(&guest->owner);
    QTAILQ_INSERT_TAIL(&firmware->guests, guest, link);
    firmware->count++;
    write32(firmware, buffer, guest->handle);
    return SUCCESS;
}

static Status activate(SevFirmware *firmware, Guest *guest, uint32_t asid)
{
    bool es = guest->policy & POLICY_ES;

    if (!asid || asid > SEV_ASIDS || es != (asid < SEV_FIRST_SEV_ASID)) {
        return INVALID_ASID;
    }
    if (guest->asid) {
        return ACTIVE;
    }
    if (asid_is_owned(firmware, asid)) {
        return ASID_OWNED;
    }
    if (test_bit(asid, firmware->unflushed)) {
        return DFFLUSH_REQUIRED;
    }
    guest->asid = asid;
    sevlab_memory_set_key(asid, guest->key);
    return SUCCESS;
}

static Status deactivate(SevFirmware *firmware, Guest *guest)
{
    if (!guest->asid) {
        return INACTIVE;
    }
    release_asid(firmware, guest);
    return SUCCESS;
}

static Status decommission(SevFirmware *firmware, Guest *guest)
{
    if (guest->asid) {
        return ACTIVE;
    }
    remove_guest(firmware, guest);
    return SUCCESS;
}

static Status guest_status(SevFirmware *firmware, Guest *guest, hwaddr buffer)
{
    uint8_t state = guest->state;

    write32(firmware, buffer + 4, guest->policy);
    write32(firmware, buffer + 8, guest->asid);
    write_bytes(firmware, buffer + 12, &state, sizeof(state));
    return SUCCESS;
}

/* A command on a guest's pages while it is launched. */
static Status check_launching(Guest *guest)
{
    if (guest->state != LUPDATE) {
        return INVALID_GUEST_STATE;
    }
    return guest->asid ? SUCCESS : INACTIVE;
}

static Status launch_update_data(SevFirmware *firmware, Guest *guest,
                                 hwaddr buffer)
{
    hwaddr address = read64(firmware, buffer + 8);
    uint32_t length = read32(firmware, buffer + 16);
    Status status = check_launching(guest);

    if (status == SUCCESS) {
        status = check_blocks(firmware, address, length);
    }
    if (status == SUCCESS) {
        cipher(firmware, guest, address, address, address, length, true);
        guest->bytes += length;
    }
    return status;
}

static Status launch_update_vmsa(SevFirmware *firmware, Guest *guest,
                                 hwaddr buffer)
{
    hwaddr address = read64(firmware, buffer + 8);
    uint32_t length = read32(firmware, buffer + 16);
    Status status = check_launching(guest);

    if (status != SUCCESS) {
        return status;
    }
    if (!(guest->policy & POLICY_ES)) {
        return INVALID_GUEST_STATE;
    }
    if (!QEMU_IS_ALIGNED(address, TARGET_PAGE_SIZE)) {
        return INVALID_ADDRESS;
    }
    if (length != TARGET_PAGE_SIZE) {
        return INVALID_LENGTH;
    }
    cipher(firmware, guest, address, address, address, length, true);
    guest->vmsas++;
    return SUCCESS;
}

static Status launch_measure(SevFirmware *firmware, Guest *guest,
                             hwaddr buffer)
{
    const uint8_t version[] = { API_MAJOR, API_MINOR, BUILD };
    uint8_t measurement[SEV_MEASUREMENT];
    Status status;

    if (guest->state != LUPDATE) {
        return INVALID_GUEST_STATE;
    }
    status = check_room(firmware, buffer + 8, buffer + 16, SEV_MEASUREMENT);
    if (status == SUCCESS) {
        sevlab_owner_measure(&guest->owner, version, guest->policy,
                             measurement);
        write_bytes(firmware, read64(firmware, buffer + 8), measurement,
                    sizeof(measurement));
        guest->state = LSECRET;
    }
    return status;
}

static Status launch_secret(SevFirmware *firmware, Guest *guest, hwaddr buffer)
{
    uint64_t header_at = read64(firmware, buffer + 8);
    hwaddr address = read64(firmware, buffer + 24);
    uint32_t guest_length = read32(firmware, buffer + 32);
    uint64_t data_at = read64(firmware, buffer + 40);
    uint32_t length = read32(firmware, buffer + 48);
    uint8_t header[SEV_PACKET_HEADER];
    g_autofree uint8_t *data = NULL;
    Status status;

    if (guest->state != LSECRET) {
        return INVALID_GUEST_STATE;
    }
    if (!guest->asid) {
        return INACTIVE;
    }
    status = check_blocks(firmware, address, guest_length);
    if (status != SUCCESS) {
        return status;
    }
    if (read32(firmware, buffer + 16) != sizeof(header) ||
        guest_length > SECRET_MOST || length < guest_length ||
        length > SECRET_MOST) {
        return INVALID_LENGTH;
    }
    data = g_malloc(length);
    address_space_read(firmware->as, header_at, MEMTXATTRS_UNSPECIFIED, header,
                       sizeof(header));
    address_space_read(firmware->as, data_at, MEMTXATTRS_UNSPECIFIED, data,
                       length);
    if (!sevlab_owner_open(&guest->owner, header, guest_length, data, length)) {
        return BAD_MEASUREMENT;
    }
    write_bytes(firmware, address, data, guest_length);
    cipher(firmware, guest, address, address, address, guest_length, false);
    return SUCCESS;
}

static Status launch_finish(Guest *guest)
{
    if (guest->state != LSECRET) {
        return INVALID_GUEST_STATE;
    }
    guest->state = RUNNING;
    return SUCCESS;
}

/* The report ends in a signature, which is left zero. */
static Status attestation(SevFirmware *firmware, Guest *guest, hwaddr buffer)
{
    uint8_t report[ATTESTATION_LENGTH] = { 0 };
    Status status;

    status = check_room(firmware, buffer + 8, buffer + 32, sizeof(report));
    if (status == SUCCESS) {
        address_space_read(firmware->as, buffer + 16, MEMTXATTRS_UNSPECIFIED,
                           report, SEV_NONCE);
        sevlab_owner_digest(&guest->owner, report + SEV_NONCE);
        stl_le_p(report + SEV_NONCE + SEV_DIGEST, guest->policy);
        write_bytes(firmware, read64(firmware, buffer + 8), report,
                    sizeof(report));
    }
    return status;
}

/* DBG_DECRYPT and DBG_ENCRYPT differ in which side is the guest's memory. */
static Status debug(SevFirmware *firmware, Guest *guest, hwaddr buffer,
                    bool decrypt)
{
    hwaddr from = read64(firmware, buffer + 8);
    hwaddr to = read64(firmware, buffer + 16);
    uint32_t length = read32(firmware, buffer + 24);
    hwaddr guests = decrypt ? from : to;
    Status status;

    if (guest->policy & POLICY_NODBG) {
        return POLICY_FAILURE;
    }
    status = check_blocks(firmware, guests, length);
    if (status == SUCCESS) {
        cipher(firmware, guest, from, to, guests, length, false);
    }
    return status;
}

static Status execute_for_guest(SevFirmware *firmware, Command command,
                                Guest *guest, hwaddr buffer)
{
    switch (command) {
    case DECOMMISSION:
        return decommission(firmware, guest);
    case ACTIVATE:
        return activate(firmware, guest, read32(firmware, buffer + 4));
    case DEACTIVATE:
        return deactivate(firmware, guest);
    case GUEST_STATUS:
        return guest_status(firmware, guest, buffer);
    case LAUNCH_UPDATE_DATA:
        return launch_update_data(firmware, guest, buffer);
    case LAUNCH_UPDATE_VMSA:
        return launch_update_vmsa(firmware, guest, buffer);
    case LAUNCH_MEASURE:
        return launch_measure(firmware, guest, buffer);
    case LAUNCH_SECRET:
        return launch_secret(firmware, guest, buffer);
    case LAUNCH_FINISH:
        return launch_finish(guest);
    case ATTESTATION:
        return attestation(firmware, guest, buffer);
    case DBG_DECRYPT:
    case DBG_ENCRYPT:
        return debug(firmware, guest, buffer, command == DBG_DECRYPT);
    default:
        return UNSUPPORTED;
    }
}

static Status execute_initialised(SevFirmware *firmware, Command command,
                                  hwaddr buffer)
{
    Guest *guest;

    switch (command) {
    case PDH_CERT_EXPORT:
        return pdh_cert_export(firmware, buffer);
    case DF_FLUSH:
        return df_flush(firmware);
    case LAUNCH_START:
        return launch_start(firmware, buffer);
    case DECOMMISSION ... GUEST_STATUS:
    case LAUNCH_UPDATE_DATA ... ATTESTATION:
    case DBG_DECRYPT:
    case DBG_ENCRYPT:
        guest = find_guest(firmware, read32(firmware, buffer));
        return guest ? execute_for_guest(firmware, command, guest, buffer)
                     : INVALID_GUEST;
    case PEK_GEN ... PEK_CERT_IMPORT:
    case PDH_GEN:
    case COPY:
    case ACTIVATE_EX:
    case SEND_START ... RECEIVE_FINISH:
    case SWAP_OUT:
    case SWAP_IN:
        return UNSUPPORTED;
    default:
        return INVALID_COMMAND;
    }
}

uint16_t sevlab_firmware_execute(SevFirmware *firmware, unsigned int command,
                                 hwaddr buffer)
{
    switch (command) {
    case INIT:
        return init(firmware, buffer, buffer + 8);
    case INIT_EX:
        return init(firmware, buffer + 4, buffer + 8);
    case SHUTDOWN:
        return platform_shutdown(firmware);
    case PLATFORM_RESET:
        return firmware->initialised ? INVALID_PLATFORM_STATE : SUCCESS;
    case PLATFORM_STATUS:
        return platform_status(firmware, buffer);
    case GET_ID:
        return hand_out(firmware, buffer, buffer + 8, ID_LENGTH);
    case NOP:
        return SUCCESS;
    }
    if (!firmware->initialised) {
        return INVALID_PLATFORM_STATE;
    }
    return execute_initialised(firmware, command, buffer);
}

/* ---- the rest ---- */

SevFirmware *sevlab_firmware_new(AddressSpace *as, bool encrypt)
{
    SevFirmware *firmware = g_new0(SevFirmware, 1);

    firmware->as = as;
    QTAILQ_INIT(&firmware->guests);
    if (encrypt) {
        sevlab_memory_encrypt_from_now_on();
    }
    return firmware;
}

static void append_key(GString *text, const char *name, const uint8_t *key)
{
    g_string_append_printf(text, " %s=0x", name);
    for (int i = 0; i < SEV_OWNER_KEY; i++) {
        g_string_append_printf(text, "%02x", key[i]);
    }
}

char *sevlab_firmware_describe(SevFirmware *firmware)
{
    GString *text = g_string_new(NULL);
    Guest *guest;

    g_string_append_printf(text, "platform state=%u es=%u guests=%u\n",
                           platform_state(firmware), firmware->es,
                           firmware->count);
    QTAILQ_FOREACH(guest, &firmware->guests, link) {
        g_string_append_printf(text, "guest handle=%u asid=%u policy=%u "
                               "state=%u bytes=%" PRIu64 " vmsas=%u",
                               guest->handle, guest->asid, guest->policy,
                               guest->state, guest->bytes, guest->vmsas);
        append_key(text, "tik", guest->owner.tik);
        append_key(text, "tek", guest->owner.tek);
        g_string_append_c(text, '\n');
    }
    return g_string_free(text, false);
}
