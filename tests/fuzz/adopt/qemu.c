/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The functions of QEMU that the library calls; as strict as QEMU's own. */
#include "world.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ENTRIES 24

struct Error {
    char text[2048];
};

/* One type for dictionaries and lists: what matters is that nobody writes past them. */
struct QDict {
    unsigned int count;
    struct {
        char *key, *text;
        int64_t number;
    } entry[ENTRIES];
};

struct QList {
    unsigned int count;
};

char qmp_commands[1];

/* As the launch of an SEV-ES guest changes it; world_reset() clears it. */
static unsigned char state[KVM_STATE_SIZE];
unsigned char *kvm_state = state;

void kvm_mark_guest_state_protected(void)
{
    demand(!"only QEMU itself calls this");
}

static char *copied(const char *text)
{
    char *copy = world_keep(malloc(strlen(text) + 1));

    return strcpy(copy, text);
}

static void put(QDict *dict, const char *key, const char *text, int64_t number)
{
    for (unsigned int i = 0; i < dict->count; i++)
        if (!strcmp(dict->entry[i].key, key)) {
            dict->entry[i].number = number;
            dict->entry[i].text = text ? copied(text) : NULL;
            return;
        }
    demand(dict->count < ENTRIES);
    dict->entry[dict->count].number = number;
    dict->entry[dict->count].key = copied(key);
    dict->entry[dict->count++].text = text ? copied(text) : NULL;
}

QDict *qdict_new(void)
{
    return world_keep(calloc(1, sizeof(QDict)));
}

void qdict_put_int(QDict *dict, const char *key, int64_t value)
{
    put(dict, key, NULL, value);
}

void qdict_put_bool(QDict *dict, const char *key, bool value)
{
    put(dict, key, NULL, value);
}

void qdict_put_str(QDict *dict, const char *key, const char *value)
{
    demand(value);
    put(dict, key, value, 0);
}

void qdict_put_obj(QDict *dict, const char *key, QObject *value)
{
    demand(value);
    put(dict, key, NULL, 0);
}

const char *qdict_get_try_str(const QDict *dict, const char *key)
{
    for (unsigned int i = 0; i < dict->count; i++)
        if (!strcmp(dict->entry[i].key, key))
            return dict->entry[i].text;
    return NULL;
}

int64_t qdict_get_try_int(const QDict *dict, const char *key, int64_t otherwise)
{
    for (unsigned int i = 0; i < dict->count; i++)
        if (!strcmp(dict->entry[i].key, key) && !dict->entry[i].text)
            return dict->entry[i].number;
    return otherwise;
}

int qdict_haskey(const QDict *dict, const char *key)
{
    for (unsigned int i = 0; i < dict->count; i++)
        if (!strcmp(dict->entry[i].key, key))
            return 1;
    return 0;
}

size_t qdict_size(const QDict *dict)
{
    return dict->count;
}

QList *qlist_new(void)
{
    return world_keep(calloc(1, sizeof(QList)));
}

void qlist_append_obj(QList *list, QObject *value)
{
    demand(value);
    list->count++;
}

/* QEMU aborts if an error is set twice, or is no single line. */
void error_setg_internal(Error **error, const char *source, int line, const char *function, const char *format, ...)
{
    Error *made = world_keep(calloc(1, sizeof *made));
    va_list arguments;

    demand(!*error && source && line && function);
    va_start(arguments, format);
    vsnprintf(made->text, sizeof made->text, format, arguments);
    va_end(arguments);
    demand(*made->text && !strchr(made->text, '\n'));
    *error = made;
}

Monitor *monitor_cur(void)
{
    return (Monitor *)&world;
}

int monitor_get_fd(Monitor *monitor, const char *name, Error **error)
{
    demand(monitor && name);
    if (*name == 'x') {
        error_setg_internal(error, __FILE__, __LINE__, __func__, "File descriptor named '%s' has not been found", "x");
        return -1;
    }
    return dup(pool_memory[0]);
}

bool runstate_is_running(void)
{
    return input_chance(16);
}

void qmp_register_command(QmpCommandList *list, const char *name, QmpCommandFunc *function, unsigned int options,
                          uint64_t features)
{
    demand(list == (QmpCommandList *)qmp_commands && !options && !features);
    demand(world.commands < sizeof world.command / sizeof *world.command);
    world.command[world.commands].name = name;
    world.command[world.commands++].function = function;
}

void qemu_add_machine_init_done_notifier(Notifier *notifier)
{
    world.notifier = notifier;
}

VMChangeStateEntry *qemu_add_vm_change_state_handler_prio(VMChangeStateHandler *handler, void *opaque, int priority)
{
    demand(!opaque && priority < 0);
    world.handler = handler;
    return NULL;
}

AioContext *qemu_get_aio_context(void)
{
    return (AioContext *)&world;
}

void aio_bh_schedule_oneshot_full(AioContext *context, QEMUBHFunc *function, void *opaque, const char *name)
{
    demand(context && name);
    if (world.bottom_halves == BOTTOM_HALVES)
        return; /* a main loop that does not come to it */
    world.bottom_half[world.bottom_halves].function = function;
    world.bottom_half[world.bottom_halves++].opaque = opaque;
}

/* ---- what an announced guest needs ---- */

const char MigrationStatus_lookup[1], RunState_lookup[1];
int autostart;

static struct QmpCommand table[QEMU_COMMANDS];

enum { INMIGRATE = 5, COMPLETED = 7 };

void qmp_marshal_cont(QDict *arguments, QObject **result, Error **error)
{
    (void)arguments, (void)error;
    *result = (QObject *)qdict_new();
}

void qmp_marshal_stop(QDict *arguments, QObject **result, Error **error)
{
    (void)arguments, (void)error;
    *result = (QObject *)qdict_new();
}

void qmp_marshal_query_status(QDict *arguments, QObject **result, Error **error)
{
    QDict *status = qdict_new();

    if (arguments && qdict_size(arguments)) {
        error_setg_internal(error, __FILE__, __LINE__, __func__, "Parameter is unexpected");
        return;
    }
    qdict_put_str(status, "status", "inmigrate");
    qdict_put_bool(status, "running", false);
    *result = (QObject *)status;
}

/* The disk images, of an announced guest that is about to get its context. */
void bdrv_activate_all(Error **error)
{
    demand(world.announced && world.announced_running && hop_in_progress());
    if (input_chance(8))
        error_setg_internal(error, __FILE__, __LINE__, __func__, "Failed to get write lock");
}

/* Only the move of the context lets it run. */
void qmp_cont(Error **error)
{
    demand(world.announced && world.announced_running && hop.context != CONTEXT_NONE && sev_moved());
    if (input_chance(8))
        error_setg_internal(error, __FILE__, __LINE__, __func__, "Failed to get write lock");
}

const char *error_get_pretty(const Error *error)
{
    demand(error != NULL);
    return "Failed to get write lock";
}

void error_free(Error *error)
{
    demand(error != NULL);
}

void qemu_reset(void)
{
    table[0] = (struct QmpCommand){"cont", qmp_marshal_cont};
    table[1] = (struct QmpCommand){"stop", qmp_marshal_stop};
    table[2] = (struct QmpCommand){"query-status", qmp_marshal_query_status};
    autostart = 0;
    memset(kvm_state, 0, KVM_STATE_SIZE);
}

QmpCommandFunc *qemu_command(unsigned int number)
{
    return table[number % QEMU_COMMANDS].function;
}

struct QmpCommand *qmp_find_command(QmpCommandList *list, const char *name)
{
    demand(list == (QmpCommandList *)qmp_commands);
    for (unsigned int i = 0; i < QEMU_COMMANDS; i++)
        if (!strcmp(table[i].name, name))
            return &table[i];
    return NULL;
}

int qapi_enum_parse(const char *lookup, const char *name, int otherwise, Error **error)
{
    (void)error;
    if (lookup == RunState_lookup && !strcmp(name, "inmigrate"))
        return INMIGRATE;
    if (lookup == MigrationStatus_lookup && !strcmp(name, "completed"))
        return COMPLETED;
    return otherwise;
}

bool runstate_check(int state)
{
    demand(state == INMIGRATE);
    return !input_chance(8);
}

/* A guest is announced once, paused; its state changes with each event. */
void qapi_event_send_migration(int status)
{
    demand(status == COMPLETED && !world.announced && hop_in_progress());
    world.announced = true;
}

static void send_running(bool running)
{
    demand(world.announced && world.announced_running != running && hop_in_progress());
    demand(autostart == (running && hop.context == CONTEXT_NONE));
    world.announced_running = running;
}

void qapi_event_send_resume(void)
{
    send_running(true);
}

void qapi_event_send_stop(void)
{
    send_running(false);
}
