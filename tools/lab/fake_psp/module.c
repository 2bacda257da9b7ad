// SPDX-License-Identifier: GPL-2.0-only
/*
 * A stand-in for ccp.ko, for tests only: offers what an unmodified kvm-amd.ko imports from the driver of AMD's
 * security processor, on a machine that has none. Guests made with it are NOT encrypted.
 */
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/psp-sev.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/version.h>

#include "fake_psp.h"

/* Since 6.9 kvm-amd knows SNP: it asks for more of ccp.ko, whether or not SNP is there. */
#define WITH_SNP (LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0))

#if WITH_SNP
int sev_platform_init(struct sev_platform_init_args *args)
{
    args->error = 0;
    return 0;
}
#else
int sev_platform_init(int *error)
{
    if (error)
        *error = 0;
    return 0;
}
#endif
EXPORT_SYMBOL_GPL(sev_platform_init);

int sev_guest_activate(struct sev_data_activate *data, int *error)
{
    return fake_psp_command(SEV_CMD_ACTIVATE, data, error);
}
EXPORT_SYMBOL_GPL(sev_guest_activate);

int sev_guest_deactivate(struct sev_data_deactivate *data, int *error)
{
    return fake_psp_command(SEV_CMD_DEACTIVATE, data, error);
}
EXPORT_SYMBOL_GPL(sev_guest_deactivate);

int sev_guest_decommission(struct sev_data_decommission *data, int *error)
{
    return fake_psp_command(SEV_CMD_DECOMMISSION, data, error);
}
EXPORT_SYMBOL_GPL(sev_guest_decommission);

int sev_guest_df_flush(int *error)
{
    return fake_psp_command(SEV_CMD_DF_FLUSH, NULL, error);
}
EXPORT_SYMBOL_GPL(sev_guest_df_flush);

void *psp_copy_user_blob(u64 uaddr, u32 len)
{
    if (!uaddr || !len || len > SEV_FW_BLOB_MAX_SIZE)
        return ERR_PTR(-EINVAL);
    return memdup_user((void __user *)uaddr, len);
}
EXPORT_SYMBOL_GPL(psp_copy_user_blob);

#if WITH_SNP
int sev_do_cmd(int cmd, void *data, int *psp_ret)
{
    return fake_psp_command(cmd, data, psp_ret);
}
EXPORT_SYMBOL_GPL(sev_do_cmd);

void *snp_alloc_firmware_page(gfp_t mask)
{
    return (void *)__get_free_page(mask);
}
EXPORT_SYMBOL_GPL(snp_alloc_firmware_page);

void snp_free_firmware_page(void *addr)
{
    free_page((unsigned long)addr);
}
EXPORT_SYMBOL_GPL(snp_free_firmware_page);

void sev_platform_shutdown(void)
{
}
EXPORT_SYMBOL_GPL(sev_platform_shutdown);
#endif

static struct miscdevice device = {
    .minor = MISC_DYNAMIC_MINOR,
    .name = "sev",
    .fops = &fake_psp_fops,
};

/* /proc/fake_psp: tests read from it whether a guest's context has been kept, and that none is left over. */
static int show_guests(struct seq_file *to, void *unused)
{
    fake_psp_list_guests(to);
    return 0;
}

static int __init fake_psp_init(void)
{
    int ret = misc_register(&device);

    if (ret)
        return ret;
    if (!proc_create_single("fake_psp", 0444, NULL, show_guests)) {
        misc_deregister(&device);
        return -ENOMEM;
    }
    fake_processor_install();
    /* Other modules' calls of CPUID lead here from now on. */
    __module_get(THIS_MODULE);
    pr_info("fake_psp: no security processor here: SEV guests are NOT encrypted\n");
    return 0;
}
module_init(fake_psp_init);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Stand-in for AMD's security processor, for tests (no encryption)");
