/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The properties of CPUs that a destination lists while libvirt starts it and the guest waits.
 *
 * libvirt queries the properties of a CPU (qom-list) and then the value of every boolean one, each by a command: 400 to
 * 470 of them. QEMU reads its monitors byte by byte, so each takes a third of a millisecond; together they were half of
 * the guest's downtime. libvirt uses only those that are true. So the list omits the booleans that are false, and a
 * tenth of the queries remains, with the same result.
 *
 * That is so until the hop is over, and only if the source had exited at the start, as in libvirt's kind of hop.
 * Anything unexpected leaves the list as QEMU made it: this is only an optimisation.
 */
#include "adopt.h"
#include "qemu.h"

#include <string.h>

static QmpCommandFunc *list_all;

static bool is_false(Object *object, const QDict *property)
{
    const char *name = qdict_get_try_str(property, "name"), *type = qdict_get_try_str(property, "type");
    Error *error = NULL;
    bool value;

    if (!name || !type || strcmp(type, "bool"))
        return false;
    value = object_property_get_bool(object, name, &error);
    if (error) {
        error_free(error);
        return false;
    }
    return !value;
}

static QObject *without_false(Object *object, QList *properties)
{
    QList *kept = qlist_new(), *omitted = qlist_new();
    QObject *property;

    while ((property = qlist_pop(properties)))
        qlist_append_obj(is_false(object, (QDict *)property) ? omitted : kept, property);
    qlist_destroy_obj((QObject *)omitted);
    qlist_destroy_obj((QObject *)properties);
    return (QObject *)kept;
}

static void list_without_false(QDict *arguments, QObject **result, Error **error)
{
    const char *path = qdict_get_try_str(arguments, "path");
    Object *object = path && hop_in_progress() ? object_resolve_path(path, NULL) : NULL;

    list_all(arguments, result, error);
    if (*result && object && object_dynamic_cast(object, "cpu"))
        *result = without_false(object, (QList *)*result);
}

void cpu_properties_shorten(void)
{
    struct QmpCommand *command;

    if (!qmp_find_command || !qmp_marshal_qom_list || !object_resolve_path || !object_dynamic_cast ||
        !object_property_get_bool || !error_free || !qlist_pop || !qlist_destroy_obj)
        return;
    command = qmp_find_command((QmpCommandList *)qmp_commands, "qom-list");
    /* Name and function are where they are expected: the entry of QEMU's table has the known layout. */
    if (!command || strcmp(command->name, "qom-list") || command->function != qmp_marshal_qom_list)
        return;
    list_all = command->function;
    command->function = list_without_false;
}
