/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The few functions of QEMU that the library uses, as QEMU 7.2 to 11.1 declare them. Every stock build exports them for
 * its own modules. Weak, because the library is also loaded into other programs (a wrapper script's shell).
 */
#ifndef SEVHOP_QEMU_H
#define SEVHOP_QEMU_H

#include <stdbool.h>
#include <stdint.h>

typedef struct AioContext AioContext;
typedef struct BlockBackend BlockBackend;
typedef struct Error Error;
typedef struct Monitor Monitor;
typedef struct Object Object;
typedef struct QDict QDict;
typedef struct QList QList;
typedef struct QObject QObject; /* the first member of QDict and QList: a pointer to one is a pointer to the other */
typedef struct QmpCommandList QmpCommandList;
typedef struct VMChangeStateEntry VMChangeStateEntry;

typedef struct Notifier Notifier;
struct Notifier {
    void (*notify)(Notifier *notifier, void *data);
    struct {
        Notifier *next;
        Notifier **previous;
    } node;
};

typedef void QmpCommandFunc(QDict *arguments, QObject **result, Error **error);
/* The beginning of it, which has not changed. */
struct QmpCommand {
    const char *name;
    QmpCommandFunc *function;
};

/* The beginning of it, likewise. */
struct BalloonInfo {
    int64_t actual;
};

typedef void VMChangeStateHandler(void *opaque, bool running, int state);
typedef void QEMUBHFunc(void *opaque);

#pragma GCC visibility push(default)
#define WEAK __attribute__((weak))

extern WEAK char qmp_commands[]; /* a QmpCommandList */
WEAK void qmp_register_command(QmpCommandList *list, const char *name, QmpCommandFunc *function, unsigned int options,
                               uint64_t features);
WEAK Monitor *monitor_cur(void);
WEAK int monitor_get_fd(Monitor *monitor, const char *name, Error **error);
WEAK void error_setg_internal(Error **error, const char *source, int line, const char *function, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

WEAK QDict *qdict_new(void);
WEAK void qdict_put_int(QDict *dict, const char *key, int64_t value);
WEAK void qdict_put_bool(QDict *dict, const char *key, bool value);
WEAK void qdict_put_str(QDict *dict, const char *key, const char *value);
WEAK void qdict_put_obj(QDict *dict, const char *key, QObject *value);
WEAK const char *qdict_get_try_str(const QDict *dict, const char *key);
WEAK int64_t qdict_get_try_int(const QDict *dict, const char *key, int64_t otherwise);
WEAK int qdict_haskey(const QDict *dict, const char *key);
WEAK size_t qdict_size(const QDict *dict);
WEAK QList *qlist_new(void);
WEAK void qlist_append_obj(QList *list, QObject *value);

WEAK void qemu_add_machine_init_done_notifier(Notifier *notifier);
WEAK VMChangeStateEntry *qemu_add_vm_change_state_handler_prio(VMChangeStateHandler *handler, void *opaque, int priority);
WEAK bool runstate_is_running(void);
WEAK AioContext *qemu_get_aio_context(void);
WEAK void aio_bh_schedule_oneshot_full(AioContext *context, QEMUBHFunc *function, void *opaque, const char *name);

/* Without it no reboot is recorded, see reboot_mark.c. */
WEAK void qemu_register_shutdown_notifier(Notifier *notifier);

/* Only of SEV-ES guests, see protected_state.c. The second is there if QEMU has the flag. */
extern WEAK unsigned char *kvm_state; /* a KVMState */
WEAK void kvm_mark_guest_state_protected(void);

/* Without these a client can undo it that a reboot is a shutdown, see reboot_action.c. */
WEAK struct QmpCommand *qmp_find_command(QmpCommandList *list, const char *name);
WEAK QmpCommandFunc qmp_marshal_set_action;

/* Without these, and qmp_find_command(), a hop takes longer, see cpu_properties.c. */
WEAK QmpCommandFunc qmp_marshal_qom_list;
WEAK Object *object_resolve_path(const char *path, bool *ambiguous);
WEAK Object *object_dynamic_cast(Object *object, const char *type);
WEAK bool object_property_get_bool(Object *object, const char *name, Error **error);
WEAK void error_free(Error *error);
WEAK QObject *qlist_pop(QList *list);
WEAK void qlist_destroy_obj(QObject *list);

/* Without these a guest cannot be announced before it is here, see announce.c. It also uses qmp_find_command(). */
extern WEAK const char MigrationStatus_lookup[], RunState_lookup[]; /* each a QEnumLookup */
extern WEAK int autostart; /* whether the guest runs when an incoming migration has ended */
WEAK int qapi_enum_parse(const char *lookup, const char *name, int otherwise, Error **error);
WEAK bool runstate_check(int state);
WEAK void qapi_event_send_migration(int status);
WEAK void qapi_event_send_resume(void);
WEAK void qapi_event_send_stop(void);
WEAK QmpCommandFunc qmp_marshal_cont;
WEAK QmpCommandFunc qmp_marshal_stop;
WEAK QmpCommandFunc qmp_marshal_query_status;
WEAK void qmp_cont(Error **error);
WEAK void bdrv_activate_all(Error **error);
WEAK const char *error_get_pretty(const Error *error);

/* Without these a client's view of an announced guest stays out of date, see device_events.c. */
WEAK struct BalloonInfo *qmp_query_balloon(Error **error); /* the caller frees it */
WEAK void qapi_event_send_balloon_change(int64_t actual);
WEAK BlockBackend *blk_all_next(BlockBackend *block);
WEAK bool blk_dev_is_tray_open(BlockBackend *block);
WEAK char *blk_get_attached_dev_id(BlockBackend *block); /* the caller frees it */
WEAK const char *blk_name(const BlockBackend *block);
WEAK void qapi_event_send_device_tray_moved(const char *device, const char *id, bool open);

#pragma GCC visibility pop
#undef WEAK

#define ANNOUNCE_SYMBOLS(X)      \
    X(MigrationStatus_lookup)    \
    X(RunState_lookup)           \
    X(&autostart)                \
    X(qapi_enum_parse)           \
    X(runstate_check)            \
    X(qapi_event_send_migration) \
    X(qapi_event_send_resume)    \
    X(qapi_event_send_stop)      \
    X(qmp_find_command)          \
    X(qmp_marshal_cont)          \
    X(qmp_marshal_stop)          \
    X(qmp_marshal_query_status)  \
    X(qmp_cont)                  \
    X(bdrv_activate_all)         \
    X(error_get_pretty)          \
    X(error_free)

#define QEMU_SYMBOLS(X)                      \
    X(qmp_commands)                          \
    X(qmp_register_command)                  \
    X(monitor_cur)                           \
    X(monitor_get_fd)                        \
    X(error_setg_internal)                   \
    X(qdict_new)                             \
    X(qdict_put_int)                         \
    X(qdict_put_bool)                        \
    X(qdict_put_str)                         \
    X(qdict_put_obj)                         \
    X(qdict_get_try_str)                     \
    X(qdict_get_try_int)                     \
    X(qdict_haskey)                          \
    X(qdict_size)                            \
    X(qlist_new)                             \
    X(qlist_append_obj)                      \
    X(qemu_add_machine_init_done_notifier)   \
    X(qemu_add_vm_change_state_handler_prio) \
    X(runstate_is_running)                   \
    X(qemu_get_aio_context)                  \
    X(aio_bh_schedule_oneshot_full)

#endif
