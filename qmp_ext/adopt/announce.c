/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Announces a guest whose state has not arrived yet. While it runs in another QEMU, whoever has started this one
 * (libvirt) finishes its work: the event MIGRATION "completed" is sent when QEMU has begun to wait for the state.
 *
 * From then on, until the guest may run here, this QEMU answers for it:
 *   cont          is remembered: the guest runs when its state has been loaded. QEMU 7.2 would try to take the disk
 *                 images, which the other QEMU has, and fail.
 *   stop          is remembered: the guest is paused when its state has been loaded
 *   query-status  reports the guest "running" or "paused" accordingly, instead of "inmigrate"
 * RESUME and STOP are sent as well: without them libvirt would not take the guest for running, and not pass a stop on.
 *
 * A guest with an SEV context must not run at the end of the stream, but after the move: cont is remembered until then,
 * and the move itself lets the guest run. Between the two nobody else comes: there is no way back any more, and whoever
 * has ordered the move may have exited. So the disk images are activated before it, which can fail.
 */
#include "adopt.h"
#include "qemu.h"

#include <string.h>

static enum announced announced = ANNOUNCED_NONE;

static QmpCommandFunc continue_later, stop_later, query_announced;

static struct replacement {
    const char *name;
    QmpCommandFunc *original, *ours;
    struct QmpCommand *command;
} replacements[] = {
    {"cont", qmp_marshal_cont, continue_later, NULL},
    {"stop", qmp_marshal_stop, stop_later, NULL},
    {"query-status", qmp_marshal_query_status, query_announced, NULL},
};

enum { CONT, STOP, QUERY_STATUS, REPLACEMENTS };

bool announce_made(void)
{
    return announced != ANNOUNCED_NONE;
}

const char *announce_state_name(void)
{
    static const char *const names[] = {
        [ANNOUNCED_NONE] = "none", [ANNOUNCED_PAUSED] = "paused", [ANNOUNCED_RUNNING] = "running"};

    return names[announced];
}

bool waits_for_state(void)
{
    return runstate_check(qapi_enum_parse(RunState_lookup, "inmigrate", -1, NULL));
}

/* The guest is elsewhere, and this process answers for it. */
static bool guest_is_elsewhere(void)
{
    return announce_made() && hop_in_progress() && (waits_for_state() || reason_against_running());
}

static void announce(enum announced state)
{
    bool changed = announced != state;

    announced = state;
    if (hop.context == CONTEXT_NONE)
        autostart = state == ANNOUNCED_RUNNING;
    if (changed && state == ANNOUNCED_RUNNING)
        qapi_event_send_resume();
    else if (changed)
        qapi_event_send_stop();
}

static void continue_later(QDict *arguments, QObject **result, Error **error)
{
    if (!guest_is_elsewhere()) {
        replacements[CONT].original(arguments, result, error);
        return;
    }
    announce(ANNOUNCED_RUNNING);
    *result = (QObject *)qdict_new();
}

static void stop_later(QDict *arguments, QObject **result, Error **error)
{
    if (!guest_is_elsewhere()) {
        replacements[STOP].original(arguments, result, error);
        return;
    }
    announce(ANNOUNCED_PAUSED);
    *result = (QObject *)qdict_new();
}

static void query_announced(QDict *arguments, QObject **result, Error **error)
{
    replacements[QUERY_STATUS].original(arguments, result, error);
    if (!*result || !guest_is_elsewhere())
        return;
    qdict_put_str((QDict *)*result, "status", announce_state_name());
    qdict_put_bool((QDict *)*result, "running", announced == ANNOUNCED_RUNNING);
}

/* The entry of QEMU's table has the known layout if name and function are where they are expected. */
static void find_commands(const char **missing)
{
    for (size_t i = 0; i < REPLACEMENTS; i++) {
        struct replacement *one = &replacements[i];

        one->command = qmp_find_command((QmpCommandList *)qmp_commands, one->name);
        if (!one->command || strcmp(one->command->name, one->name) || one->command->function != one->original) {
            *missing = one->name;
            return;
        }
    }
}

static const char *missing_symbol(void)
{
#define FIND(symbol) \
    if (!(symbol))   \
        return #symbol[0] == '&' ? #symbol + 1 : #symbol;
    ANNOUNCE_SYMBOLS(FIND)
#undef FIND
    return NULL;
}

const char *announce_missing(void)
{
    const char *missing = missing_symbol();

    if (!missing && qapi_enum_parse(RunState_lookup, "inmigrate", -1, NULL) < 0)
        missing = "inmigrate";
    if (!missing && qapi_enum_parse(MigrationStatus_lookup, "completed", -1, NULL) < 0)
        missing = "completed";
    if (!missing && !announce_made())
        find_commands(&missing);
    return missing;
}

void announce_start(void)
{
    if (announce_made())
        return;
    for (size_t i = 0; i < REPLACEMENTS; i++)
        replacements[i].command->function = replacements[i].ours;
    announced = autostart && hop.context == CONTEXT_NONE ? ANNOUNCED_RUNNING : ANNOUNCED_PAUSED;
    device_events_record();
    qapi_event_send_migration(qapi_enum_parse(MigrationStatus_lookup, "completed", -1, NULL));
}

bool announce_activate_images(void)
{
    Error *error = NULL;

    if (announced != ANNOUNCED_RUNNING || waits_for_state())
        return true;
    bdrv_activate_all(&error);
    if (!error)
        return true;
    warn("cannot activate the disk images: %s", error_get_pretty(error));
    error_free(error);
    return false;
}

void announce_run(void)
{
    Error *error = NULL;

    if (announced != ANNOUNCED_RUNNING || waits_for_state())
        return;
    qmp_cont(&error);
    if (!error)
        return;
    warn("cannot run the guest yet: %s", error_get_pretty(error));
    error_free(error);
}

void announce_finish(void)
{
    if (!announce_made())
        return;
    for (size_t i = 0; i < REPLACEMENTS; i++)
        replacements[i].command->function = replacements[i].original;
    device_events_send();
}
