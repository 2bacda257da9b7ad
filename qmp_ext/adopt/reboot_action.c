/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What this QEMU does when its guest reboots, if the guest cannot be reset here: it shuts down.
 *
 * The keeper reports that, and the command has set it (set-action, reboot=shutdown). A client that changes it back would
 * have the next reboot execute what is no code; libvirt does so when an administrator sets <on_reboot> to restart. So
 * reboot=reset is accepted, and means shutdown: to libvirt's configuration the change is made, and its hook acts on it.
 */
#include "adopt.h"
#include "qemu.h"

#include <string.h>

static QmpCommandFunc *set_action;

static void set_all_but_reset(QDict *arguments, QObject **result, Error **error)
{
    const char *reboot = qdict_get_try_str(arguments, "reboot");

    if (reboot && !strcmp(reboot, "reset")) {
        warn("set-action: reboot=reset means shutdown in this QEMU, since its guest cannot be reset after a hop");
        qdict_put_str(arguments, "reboot", "shutdown");
    }
    set_action(arguments, result, error);
}

void reboot_action_keep(void)
{
    struct QmpCommand *command = NULL;

    if (qmp_find_command && qmp_marshal_set_action)
        command = qmp_find_command((QmpCommandList *)qmp_commands, "set-action");
    /* Name and function are where they are expected: the entry of QEMU's table has the known layout. */
    if (!command || strcmp(command->name, "set-action") || command->function != qmp_marshal_set_action) {
        warn("this QEMU has an unknown set-action: do not set reboot=reset, its guest cannot be reset after a hop");
        return;
    }
    set_action = command->function;
    command->function = set_all_but_reset;
}
