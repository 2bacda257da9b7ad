// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/sev: what QEMU and libvirt ask of the platform itself. Certificates and the processor's ID are zeros.
 */
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/psp-sev.h>
#include <linux/uaccess.h>

#include "fake_psp.h"

#define PDH_LENGTH 2084   /* one certificate in AMD's own format */
#define CHAIN_LENGTH 6252 /* PEK, OCA, CEK */
#define ID_LENGTH 64

static int platform_status(void __user *to, u32 *error)
{
    struct sev_user_data_status status;
    int ret = fake_psp_command(SEV_CMD_PLATFORM_STATUS, &status, error);

    if (!ret && copy_to_user(to, &status, sizeof(status)))
        ret = -EFAULT;
    return ret;
}

static int export_certificates(void __user *argument, u32 *error)
{
    struct sev_user_data_pdh_cert_export export;
    int ret = 0;

    if (copy_from_user(&export, argument, sizeof(export)))
        return -EFAULT;
    if (export.pdh_cert_len < PDH_LENGTH || export.cert_chain_len < CHAIN_LENGTH) {
        *error = SEV_RET_INVALID_LEN;
        ret = -EIO;
    } else if (clear_user((void __user *)export.pdh_cert_address, PDH_LENGTH) ||
               clear_user((void __user *)export.cert_chain_address, CHAIN_LENGTH)) {
        return -EFAULT;
    }
    export.pdh_cert_len = PDH_LENGTH;
    export.cert_chain_len = CHAIN_LENGTH;
    return copy_to_user(argument, &export, sizeof(export)) ? -EFAULT : ret;
}

static int processor_id(void __user *argument, u32 *error)
{
    struct sev_user_data_get_id2 id;
    int ret = 0;

    if (copy_from_user(&id, argument, sizeof(id)))
        return -EFAULT;
    if (!id.address || id.length < ID_LENGTH) {
        *error = SEV_RET_INVALID_LEN;
        ret = -EIO;
    } else if (clear_user((void __user *)id.address, ID_LENGTH)) {
        return -EFAULT;
    }
    id.length = ID_LENGTH;
    return copy_to_user(argument, &id, sizeof(id)) ? -EFAULT : ret;
}

static long device_ioctl(struct file *file, unsigned int request, unsigned long argument)
{
    struct sev_issue_cmd command;
    void __user *data;
    u32 error = 0;
    int ret;

    if (request != SEV_ISSUE_CMD)
        return -EINVAL;
    if (copy_from_user(&command, (void __user *)argument, sizeof(command)))
        return -EFAULT;
    data = (void __user *)command.data;
    switch (command.cmd) {
    case SEV_PLATFORM_STATUS:
        ret = platform_status(data, &error);
        break;
    case SEV_PDH_CERT_EXPORT:
        ret = export_certificates(data, &error);
        break;
    case SEV_GET_ID2:
        ret = processor_id(data, &error);
        break;
    default:
        ret = -EINVAL;
    }
    command.error = error;
    return copy_to_user((void __user *)argument, &command, sizeof(command)) ? -EFAULT : ret;
}

const struct file_operations fake_psp_fops = {
    .owner = THIS_MODULE,
    .unlocked_ioctl = device_ioctl,
};
