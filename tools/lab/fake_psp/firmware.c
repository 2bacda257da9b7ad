// SPDX-License-Identifier: GPL-2.0-only
/*
 * The SEV firmware, reduced to what a host can observe of a guest's life without encryption: handles, ASIDs and the
 * state machine of the launch (AMD document 55766, "SEV API", chapter 6).
 *
 * Nothing is encrypted or measured: LAUNCH_MEASURE and ATTESTATION_REPORT return constant bytes. Commands that the
 * hop does not need (SEND_*, RECEIVE_*, DBG_*) answer SEV_RET_UNSUPPORTED.
 */
#include <linux/bitmap.h>
#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/psp-sev.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <asm/io.h>

#include "fake_psp.h"

enum guest_state {
    GUEST_LAUNCHING = 1, /* LAUNCH_START done, pages are being added */
    GUEST_MEASURED = 2,  /* LAUNCH_MEASURE done, secrets may be injected */
    GUEST_RUNNING = 3,   /* LAUNCH_FINISH done */
};

#define MEASUREMENT_LENGTH 48       /* 32 bytes HMAC, 16 bytes nonce */
#define ATTESTATION_LENGTH 0x1d0

struct guest {
    struct list_head link;
    u32 handle, policy;
    u32 asid; /* 0: not active */
    enum guest_state state;
    u64 launched_bytes;
    u32 launched_vmsas;
};

static DEFINE_MUTEX(firmware_lock);
static LIST_HEAD(guests);
static unsigned int guest_count;
static u32 last_handle;
/* ASIDs that a guest has used since the last DF_FLUSH. The firmware does not give them to another guest. */
static DECLARE_BITMAP(unflushed_asids, FAKE_PSP_ASIDS + 1);

static struct guest *guest_by_handle(u32 handle)
{
    struct guest *guest;

    list_for_each_entry(guest, &guests, link)
        if (guest->handle == handle)
            return guest;
    return NULL;
}

static struct guest *guest_by_asid(u32 asid)
{
    struct guest *guest;

    list_for_each_entry(guest, &guests, link)
        if (guest->asid == asid)
            return guest;
    return NULL;
}

static int platform_status(struct sev_user_data_status *status)
{
    *status = (struct sev_user_data_status){
        .api_major = 1,
        .api_minor = 55,
        .build = 8,
        .state = guest_count ? SEV_STATE_WORKING : SEV_STATE_INIT,
        .flags = SEV_STATUS_FLAGS_CONFIG_ES,
        .guest_count = guest_count,
    };
    return SEV_RET_SUCCESS;
}

static int launch_start(struct sev_data_launch_start *start)
{
    struct guest *guest = kzalloc(sizeof(*guest), GFP_KERNEL);

    if (!guest)
        return SEV_RET_RESOURCE_LIMIT;
    guest->handle = ++last_handle;
    guest->policy = start->policy;
    guest->state = GUEST_LAUNCHING;
    list_add_tail(&guest->link, &guests);
    guest_count++;
    start->handle = guest->handle;
    return SEV_RET_SUCCESS;
}

static int activate(struct guest *guest, u32 asid)
{
    if (!asid || asid > FAKE_PSP_ASIDS)
        return SEV_RET_INVALID_ASID;
    if (guest->asid)
        return SEV_RET_ACTIVE;
    if (guest_by_asid(asid))
        return SEV_RET_ASID_OWNED;
    if (test_bit(asid, unflushed_asids))
        return SEV_RET_DFFLUSH_REQUIRED;
    guest->asid = asid;
    return SEV_RET_SUCCESS;
}

static int deactivate(struct guest *guest)
{
    if (!guest->asid)
        return SEV_RET_INACTIVE;
    __set_bit(guest->asid, unflushed_asids);
    guest->asid = 0;
    return SEV_RET_SUCCESS;
}

static int decommission(struct guest *guest)
{
    if (guest->asid)
        return SEV_RET_ACTIVE;
    list_del(&guest->link);
    guest_count--;
    kfree(guest);
    return SEV_RET_SUCCESS;
}

/* Measurement and report: the caller asks with a short buffer first, to learn the length. */
static int fill(u64 address, u32 *length, u32 needed, u8 byte)
{
    if (!address || *length < needed) {
        *length = needed;
        return SEV_RET_INVALID_LEN;
    }
    memset(__va(address), byte, needed);
    *length = needed;
    return SEV_RET_SUCCESS;
}

static int launch_measure(struct guest *guest, struct sev_data_launch_measure *measure)
{
    int status = fill(measure->address, &measure->len, MEASUREMENT_LENGTH, 0x5e);

    if (status)
        return status;
    if (guest->state != GUEST_LAUNCHING)
        return SEV_RET_INVALID_GUEST_STATE;
    guest->state = GUEST_MEASURED;
    return SEV_RET_SUCCESS;
}

static int guest_command(int command, struct guest *guest, void *buffer)
{
    switch (command) {
    case SEV_CMD_ACTIVATE:
        return activate(guest, ((struct sev_data_activate *)buffer)->asid);
    case SEV_CMD_DEACTIVATE:
        return deactivate(guest);
    case SEV_CMD_DECOMMISSION:
        return decommission(guest);
    case SEV_CMD_GUEST_STATUS: {
        struct sev_data_guest_status *status = buffer;

        status->policy = guest->policy;
        status->asid = guest->asid;
        status->state = guest->state;
        return SEV_RET_SUCCESS;
    }
    case SEV_CMD_LAUNCH_UPDATE_DATA:
        if (guest->state != GUEST_LAUNCHING)
            return SEV_RET_INVALID_GUEST_STATE;
        guest->launched_bytes += ((struct sev_data_launch_update_data *)buffer)->len;
        return SEV_RET_SUCCESS;
    case SEV_CMD_LAUNCH_UPDATE_VMSA:
        if (guest->state != GUEST_LAUNCHING)
            return SEV_RET_INVALID_GUEST_STATE;
        guest->launched_vmsas++;
        return SEV_RET_SUCCESS;
    case SEV_CMD_LAUNCH_MEASURE:
        return launch_measure(guest, buffer);
    case SEV_CMD_LAUNCH_UPDATE_SECRET:
        return guest->state == GUEST_MEASURED ? SEV_RET_SUCCESS : SEV_RET_INVALID_GUEST_STATE;
    case SEV_CMD_LAUNCH_FINISH:
        if (guest->state != GUEST_MEASURED)
            return SEV_RET_INVALID_GUEST_STATE;
        guest->state = GUEST_RUNNING;
        return SEV_RET_SUCCESS;
    case SEV_CMD_ATTESTATION_REPORT: {
        struct sev_data_attestation_report *report = buffer;

        return fill(report->address, &report->len, ATTESTATION_LENGTH, 0xa7);
    }
    }
    return SEV_RET_UNSUPPORTED;
}

static int execute(int command, void *buffer)
{
    struct guest *guest;

    switch (command) {
    case SEV_CMD_INIT:
    case SEV_CMD_INIT_EX:
    case SEV_CMD_SHUTDOWN:
        return SEV_RET_SUCCESS;
    case SEV_CMD_DF_FLUSH:
        bitmap_zero(unflushed_asids, FAKE_PSP_ASIDS + 1);
        return SEV_RET_SUCCESS;
    case SEV_CMD_PLATFORM_STATUS:
        return platform_status(buffer);
    case SEV_CMD_LAUNCH_START:
        return launch_start(buffer);
    }
    /* All others are about a guest, and their buffers begin with its handle. */
    if (command < SEV_CMD_DECOMMISSION || command > SEV_CMD_ATTESTATION_REPORT || !buffer)
        return SEV_RET_UNSUPPORTED;
    guest = guest_by_handle(*(u32 *)buffer);
    return guest ? guest_command(command, guest, buffer) : SEV_RET_INVALID_GUEST;
}

int fake_psp_command(int command, void *buffer, int *error)
{
    int status;

    mutex_lock(&firmware_lock);
    status = execute(command, buffer);
    mutex_unlock(&firmware_lock);
    if (error)
        *error = status;
    return status ? -EIO : 0;
}

void fake_psp_list_guests(struct seq_file *to)
{
    struct guest *guest;

    mutex_lock(&firmware_lock);
    list_for_each_entry(guest, &guests, link)
        seq_printf(to, "handle=%u asid=%u policy=%u state=%u bytes=%llu vmsas=%u\n", guest->handle, guest->asid,
                   guest->policy, guest->state, guest->launched_bytes, guest->launched_vmsas);
    mutex_unlock(&firmware_lock);
}
