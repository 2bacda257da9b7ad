/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a client has asked of an announced guest's devices before their state was loaded: the size of the balloon, and
 * whether trays are open. When the hop is over it is corrected by the events that QEMU sends when a guest changes them.
 *
 * Where QEMU lacks a function, or has no such device, nothing is sent.
 */
#include "adopt.h"
#include "qemu.h"

#include <stdlib.h>

static int64_t recorded_balloon = -1; /* bytes; -1: no balloon */

static int64_t balloon_size(void)
{
    Error *error = NULL;
    struct BalloonInfo *info;
    int64_t size = -1;

    if (!qmp_query_balloon || !qapi_event_send_balloon_change || !error_free)
        return -1;
    info = qmp_query_balloon(&error);
    if (info && !error)
        size = info->actual;
    free(info);
    if (error)
        error_free(error);
    return size;
}

void device_events_record(void)
{
    recorded_balloon = balloon_size();
}

/* Trays are closed in a QEMU that has just been started. */
static void send_open_trays(void)
{
    if (!blk_all_next || !blk_dev_is_tray_open || !blk_get_attached_dev_id || !blk_name ||
        !qapi_event_send_device_tray_moved)
        return;
    for (struct BlockBackend *block = blk_all_next(NULL); block; block = blk_all_next(block)) {
        char *device;

        if (!blk_dev_is_tray_open(block))
            continue;
        device = blk_get_attached_dev_id(block);
        qapi_event_send_device_tray_moved(blk_name(block), device ? device : "", true);
        free(device);
    }
}

void device_events_send(void)
{
    int64_t size = balloon_size();

    if (size >= 0 && size != recorded_balloon)
        qapi_event_send_balloon_change(size);
    send_open_trays();
}
