/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The QMP commands (documented in adopt.json), and the guard: a destination that has not adopted its guest does not
 * run.
 */
#include "adopt.h"
#include "qemu.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#define fail(error, ...) error_setg_internal(error, __FILE__, __LINE__, __func__, __VA_ARGS__)

static int refused_starts;
static bool notify_keeper; /* before the guest runs here */

/* ---- arguments ---- */

static bool check_argument_count(const QDict *arguments, size_t count, Error **error)
{
    if (!arguments || qdict_size(arguments) <= count)
        return true;
    fail(error, "Parameter is unexpected");
    return false;
}

static const char *string_argument(const QDict *arguments, const char *name, Error **error)
{
    const char *value = arguments ? qdict_get_try_str(arguments, name) : NULL;

    if (value)
        return value;
    if (arguments && qdict_haskey(arguments, name))
        fail(error, "Invalid parameter type for '%s', expected: string", name);
    else
        fail(error, "Parameter '%s' is missing", name);
    return NULL;
}

/* -1 and *error when it is missing, negative, or no number. */
static int64_t number_argument(const QDict *arguments, const char *name, Error **error)
{
    int64_t value = qdict_get_try_int(arguments, name, -1);

    if (value < 0)
        fail(error, "Parameter '%s' is missing, or no size", name);
    return value;
}

/* ---- x-sev-adopt-ram ---- */

/* The guest's pages are mapped when the state begins to arrive, and the guest may run at the end of the stream. */
static int share_with_stream(const QDict *arguments, Error **error)
{
    const char *name = string_argument(arguments, "stream", error);
    int64_t header_size = name ? number_argument(arguments, "header-size", error) : -1;
    int fd = header_size < 0 ? -1 : monitor_get_fd(monitor_cur(), name, error), failure;

    if (fd < 0)
        return -1;
    failure = stream_await(fd, (uint64_t)header_size);
    close(fd);
    if (failure) {
        fail(error, "The stream cannot be used: %s", strerror(-failure));
        return -1;
    }
    failure = memory_share_ahead();
    if (failure) {
        stream_forget();
        fail(error, "Guest memory cannot be mapped: %s", strerror(-failure));
        return -1;
    }
    notify_keeper = hop.context == CONTEXT_NONE;
    return 0;
}

/* Whoever sends this also sends cont, so the keeper need not be notified. */
static int share_now(Error **error)
{
    int failure;

    stream_forget();
    notify_keeper = false;
    failure = memory_share();
    if (failure)
        fail(error, "Guest memory cannot be mapped: %s", strerror(-failure));
    return failure;
}

static void adopt_ram(QDict *arguments, QObject **result, Error **error)
{
    bool later = arguments && qdict_haskey(arguments, "stream");
    struct memory_counts counts;
    QDict *answer;

    if (!check_argument_count(arguments, later ? 2 : 0, error))
        return;
    if (runstate_is_running()) {
        fail(error, "This VM is running");
        return;
    }
    if (memory_state() == RAM_NONE) {
        fail(error, "No guest memory was adopted");
        return;
    }
    if (later ? share_with_stream(arguments, error) : share_now(error))
        return;
    realtime_record();
    counts = memory_count();
    answer = qdict_new();
    qdict_put_int(answer, "mappings", counts.mappings);
    qdict_put_int(answer, "bytes", counts.bytes);
    *result = (QObject *)answer;
}

/* ---- x-sev-migrate-from ---- */

static const char *reason_against_move(void)
{
    if (runstate_is_running())
        return "This VM is running";
    if (!kvm_vm_exists())
        return "This QEMU has no KVM VM";
    if (sev_moved())
        return "A context has been moved into this VM already";
    if (memory_state() == RAM_PRIVATE)
        return "Guest memory is still private: use x-sev-adopt-ram first";
    if (memory_state() == RAM_NONE)
        return "No guest memory was adopted";
    return NULL;
}

static void migrate_from(QDict *arguments, QObject **result, Error **error)
{
    const char *name = string_argument(arguments, "fd", error), *reason = reason_against_move(), *symbol;
    struct move move;
    QDict *answer;
    int source;

    if (!name || !check_argument_count(arguments, 1, error))
        return;
    if (reason) {
        fail(error, "%s", reason);
        return;
    }
    source = monitor_get_fd(monitor_cur(), name, error);
    if (source < 0)
        return;
    if (!announce_activate_images()) {
        close(source);
        fail(error, "The disk images cannot be activated: see the log of this QEMU");
        return;
    }
    move = sev_move_from(source);
    close(source);
    if (!move.error && !move.restore_error)
        announce_run();
    symbol = move.error ? strerrorname_np(move.error) : "OK";
    answer = qdict_new();
    qdict_put_int(answer, "errno", move.error);
    qdict_put_str(answer, "name", symbol ? symbol : "unknown");
    qdict_put_int(answer, "vcpus", move.vcpus);
    qdict_put_int(answer, "registers", move.registers);
    qdict_put_int(answer, "restore-errno", move.restore_error);
    *result = (QObject *)answer;
}

/* ---- x-sev-adopt-status ---- */

static void add_memory(void *list, const char *name, int64_t size, uint64_t inode)
{
    QDict *memory = qdict_new();

    qdict_put_str(memory, "name", name);
    qdict_put_int(memory, "size", size);
    qdict_put_int(memory, "inode", (int64_t)inode);
    qlist_append_obj(list, (QObject *)memory);
}

static void adopt_status(QDict *arguments, QObject **result, Error **error)
{
    QDict *answer;
    QList *memories;

    if (!check_argument_count(arguments, 0, error))
        return;
    memories = qlist_new();
    memory_each(add_memory, memories);
    answer = qdict_new();
    qdict_put_str(answer, "context", context_name(hop.context));
    qdict_put_str(answer, "source", !hop.keeper ? "none" : hop.source_ended ? "ended" : "running");
    qdict_put_str(answer, "ram", memory_state_name());
    qdict_put_bool(answer, "moved", sev_moved());
    qdict_put_bool(answer, "vm-dead", kvm_vm_is_dead());
    qdict_put_bool(answer, "ran", run_mark_ran());
    qdict_put_bool(answer, "finished", atomic_load(&hop.finished));
    qdict_put_str(answer, "announced", announce_state_name());
    qdict_put_int(answer, "emulated-launch-commands", sev_emulated_commands());
    qdict_put_int(answer, "deferred-regions", sev_deferred_regions());
    qdict_put_int(answer, "refused-starts", refused_starts);
    qdict_put_int(answer, "vm-type", kvm_vm_type());
    qdict_put_int(answer, "vcpus", vcpus_count());
    qdict_put_int(answer, "deferred-registers", vcpus_deferred());
    qdict_put_int(answer, "deferred-tap-settings", taps_deferred());
    qdict_put_int(answer, "protected-state-offset", (int64_t)protected_state_offset());
    qdict_put_int(answer, "listeners", listeners_adopted());
    qdict_put_obj(answer, "memfds", (QObject *)memories);
    *result = (QObject *)answer;
}

/* ---- the guard ---- */

const char *reason_against_running(void)
{
    if (memory_state() == RAM_NONE)
        return "no guest memory was adopted";
    if (memory_state() == RAM_PRIVATE)
        return "the guest's memory is still the old QEMU's";
    if (hop.context != CONTEXT_NONE && !sev_moved())
        return "the guest's SEV context is still the old QEMU's";
    return NULL;
}

/*
 * Before the guest runs here for the first time: write the run mark, for when this process and the command have exited.
 * A hop without an SEV context is committed when the keeper's socket accepts the message. To roll the hop back, the
 * keeper shuts the socket down first: then this fails, and the source may be resumed. If the source has exited it will
 * not be, and only this process has the guest.
 */
static const char *begin_to_run(void)
{
    bool notify = notify_keeper;

    notify_keeper = false;
    if (!run_mark_write(notify ? RUN_MARK_STARTING : RUN_MARK_RAN))
        return "the run mark cannot be written";
    if (!notify)
        return NULL;
    if (!keeper_notify_start() && !source_has_ended()) {
        run_mark_write(RUN_MARK_NOT);
        return "the hop was interrupted";
    }
    run_mark_write(RUN_MARK_RAN);
    return NULL;
}

static void before_run(void *opaque, bool running, int state)
{
    const char *reason = running && hop.keeper ? reason_against_running() : NULL;

    (void)opaque;
    (void)state;
    if (running && !reason && (notify_keeper || !run_mark_ran()))
        reason = begin_to_run();
    if (reason) {
        refused_starts++;
        fatal("this QEMU must not run: %s", reason);
    }
    /* The hop is committed. Before that, the source may be resumed, with its taps as they were. */
    if (running)
        taps_apply();
    if (running && hop_in_progress())
        realtime_reset();
}

/* ---- x-sev-reboot-mark ---- */

static void leave_reboot_mark(QDict *arguments, QObject **result, Error **error)
{
    const char *name = string_argument(arguments, "fd", error);
    int fd, failure;

    if (!name || !check_argument_count(arguments, 1, error))
        return;
    fd = monitor_get_fd(monitor_cur(), name, error);
    if (fd < 0)
        return;
    failure = reboot_mark_use(fd);
    close(fd);
    if (failure)
        fail(error, "The reboot mark cannot be used: %s", strerror(-failure));
    else
        *result = (QObject *)qdict_new();
}

/* ---- x-sev-adopt-announce ---- */

static const char *reason_against_announcing(void)
{
    if (announce_made())
        return NULL;
    if (!hop_in_progress())
        return "No hop is in progress";
    if (!waits_for_state())
        return "This QEMU does not wait for a stream";
    if (!stream_waits())
        return "The header of the stream has not been read";
    return NULL;
}

static void adopt_announce(QDict *arguments, QObject **result, Error **error)
{
    const char *missing = announce_missing(), *reason = missing ? NULL : reason_against_announcing();
    QDict *answer;

    if (!check_argument_count(arguments, 0, error))
        return;
    if (reason) {
        fail(error, "%s", reason);
        return;
    }
    if (!missing)
        announce_start();
    answer = qdict_new();
    qdict_put_bool(answer, "announced", !missing);
    qdict_put_str(answer, "missing", missing ? missing : "");
    *result = (QObject *)answer;
}

/* ---- x-sev-adopt-finish ---- */

static void adopt_finish(QDict *arguments, QObject **result, Error **error)
{
    const char *reason = hop.keeper ? reason_against_running() : NULL;

    if (!check_argument_count(arguments, 0, error))
        return;
    if (reason) {
        fail(error, "The hop is not over: %s", reason);
        return;
    }
    if (!atomic_exchange(&hop.finished, true)) {
        notify_keeper = false;
        protected_state_finish();
        announce_finish();
        taps_apply();
        listeners_serve();
        keeper_close();
        memory_lock_pages();
        hand_over_stderr();
    }
    *result = (QObject *)qdict_new();
}

/* ---- start ---- */

/*
 * The source has exited, and no command orders the hand-over. A bottom half of the main loop is late enough, since
 * start-up has written what it writes (the reset that follows machine-init-done writes, too), and early enough, since
 * the stream is read by the main loop.
 */
static void share_automatically(void *opaque)
{
    int failure = memory_share();

    (void)opaque;
    if (failure)
        fatal("guest memory cannot be mapped: %s", strerror(-failure));
}

static void machine_complete(Notifier *notifier, void *data)
{
    (void)notifier;
    (void)data;
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-adopt-ram", adopt_ram, 0, 0);
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-migrate-from", migrate_from, 0, 0);
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-adopt-status", adopt_status, 0, 0);
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-adopt-announce", adopt_announce, 0, 0);
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-adopt-finish", adopt_finish, 0, 0);
    qmp_register_command((QmpCommandList *)qmp_commands, "x-sev-reboot-mark", leave_reboot_mark, 0, 0);
    /* Before all other handlers: devices start when theirs are called. */
    qemu_add_vm_change_state_handler_prio(before_run, NULL, INT_MIN);
    if (!hop.keeper)
        return;
    sev_check_launch();
    atomic_store(&hop.machine_complete, true);
    if (hop.source_ended)
        cpu_properties_shorten();
    if (hop.stops_at_reboot)
        reboot_action_keep();
    if (hop.source_ended && memory_state() == RAM_PRIVATE)
        aio_bh_schedule_oneshot_full(qemu_get_aio_context(), share_automatically, NULL, "sevhop-adopt");
}

static Notifier when_machine_complete = {.notify = machine_complete};

/* Any of these symbols makes it one; check_symbols() tests whether it has all. */
bool is_qemu(void)
{
    return qmp_commands || qmp_register_command || qemu_add_machine_init_done_notifier;
}

static void check_symbols(void)
{
#define CHECK(symbol) \
    if (!(symbol))    \
        fatal("this QEMU does not export " #symbol ", which adopt.so needs: use a stock build");
    QEMU_SYMBOLS(CHECK)
#undef CHECK
}

void commands_install(void)
{
    check_symbols();
    /* It is too early to register the commands: QEMU initialises its table later. First in, last called. */
    qemu_add_machine_init_done_notifier(&when_machine_complete);
}
