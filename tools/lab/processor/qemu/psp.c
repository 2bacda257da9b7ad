/*
 * AMD's security processor as a PCI device: the mailbox through which Linux's
 * ccp driver speaks to the SEV firmware, and ports for tests.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "hw/pci/msi.h"
#include "hw/pci/pci.h"
#include "hw/qdev-properties.h"
#include "qom/object.h"
#include "firmware.h"

#define TYPE_SEV_PSP "sev-psp"
OBJECT_DECLARE_SIMPLE_TYPE(SevPsp, SEV_PSP)

#define DEVICE_ID           0x1456  /* of the first EPYC: "PSP v1" */
#define CLASS_ENCRYPTION    0x1080

/* BAR 2: the mailbox. */
#define MAILBOX_BAR         2
#define MAILBOX_SIZE        0x20000
#define REG_COMMAND         0x10580
#define REG_BUFFER_LOW      0x105e0
#define REG_BUFFER_HIGH     0x105e4
#define REG_CAPABILITY      0x105fc
#define REG_INT_ENABLE      0x10610
#define REG_INT_STATUS      0x10614

#define COMMAND_INTERRUPT   (1U << 0)   /* written: announce the end */
#define COMMAND_SHIFT       16
#define COMMAND_MASK        0x7ff
#define COMMAND_RESPONSE    (1U << 31)  /* read: done, bits 15:0 are a status */
#define INT_COMMAND         (1U << 1)
#define CAPABILITY_SEV      (1U << 0)

/*
 * BAR 4, ports: what the firmware knows, as text. A write to ACCOUNT_TAKE takes
 * a new copy, reads of ACCOUNT_NEXT return its bytes one after the other, then
 * zeros. A command that is written to ACCOUNT_COMMAND is executed without a
 * buffer, at the driver's back; a read returns its status. Ports, because Linux
 * lets user space use those of a device that has a driver.
 */
#define ACCOUNT_BAR         4
#define ACCOUNT_SIZE        16
#define ACCOUNT_TAKE        0
#define ACCOUNT_NEXT        4
#define ACCOUNT_COMMAND     8

struct SevPsp {
    PCIDevice parent;
    MemoryRegion mailbox;
    MemoryRegion account;
    bool encrypt;
    SevFirmware *firmware;
    char *text;         /* the copy, and how much of it has been read */
    size_t read;
    uint8_t status;     /* of a command written to ACCOUNT_COMMAND */
    uint32_t command;
    uint32_t buffer_low;
    uint32_t buffer_high;
    uint32_t int_enable;
    uint32_t int_status;
};

static uint64_t mailbox_read(void *opaque, hwaddr at, unsigned int size)
{
    SevPsp *psp = opaque;

    switch (at) {
    case REG_COMMAND:
        return psp->command;
    case REG_BUFFER_LOW:
        return psp->buffer_low;
    case REG_BUFFER_HIGH:
        return psp->buffer_high;
    case REG_CAPABILITY:
        return CAPABILITY_SEV;
    case REG_INT_ENABLE:
        return psp->int_enable;
    case REG_INT_STATUS:
        return psp->int_status;
    default:
        return 0;
    }
}

static void execute(SevPsp *psp, uint32_t written)
{
    hwaddr buffer = (uint64_t)psp->buffer_high << 32 | psp->buffer_low;
    uint16_t status;

    status = sevlab_firmware_execute(psp->firmware, written >> COMMAND_SHIFT &
                                     COMMAND_MASK, buffer);
    psp->command = COMMAND_RESPONSE | status;
    if (!(written & COMMAND_INTERRUPT)) {
        return;
    }
    psp->int_status |= INT_COMMAND;
    if (psp->int_enable & INT_COMMAND && msi_enabled(&psp->parent)) {
        msi_notify(&psp->parent, 0);
    }
}

static void mailbox_write(void *opaque, hwaddr at, uint64_t value,
                          unsigned int size)
{
    SevPsp *psp = opaque;

    switch (at) {
    case REG_COMMAND:
        execute(psp, value);
        break;
    case REG_BUFFER_LOW:
        psp->buffer_low = value;
        break;
    case REG_BUFFER_HIGH:
        psp->buffer_high = value;
        break;
    case REG_INT_ENABLE:
        psp->int_enable = value;
        break;
    case REG_INT_STATUS:
        psp->int_status &= ~value;
        break;
    }
}

static const MemoryRegionOps mailbox_ops = {
    .read = mailbox_read,
    .write = mailbox_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = { .min_access_size = 4, .max_access_size = 4 },
};

static uint64_t account_read(void *opaque, hwaddr at, unsigned int size)
{
    SevPsp *psp = opaque;
    uint8_t byte = 0;

    if (at >= ACCOUNT_COMMAND) {
        return at == ACCOUNT_COMMAND ? psp->status : 0;
    }
    if (psp->text) {
        byte = psp->text[psp->read];
        psp->read += byte != 0;
    }
    return byte;
}

static void account_write(void *opaque, hwaddr at, uint64_t value,
                          unsigned int size)
{
    SevPsp *psp = opaque;

    if (at == ACCOUNT_TAKE) {
        g_free(psp->text);
        psp->text = sevlab_firmware_describe(psp->firmware);
        psp->read = 0;
    } else if (at == ACCOUNT_COMMAND) {
        psp->status = sevlab_firmware_execute(psp->firmware, value, 0);
    }
}

static const MemoryRegionOps account_ops = {
    .read = account_read,
    .write = account_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = { .min_access_size = 1, .max_access_size = 4 },
    .impl = { .min_access_size = 1, .max_access_size = 1 },
};

static char *psp_account(Object *object, Error **errp)
{
    return sevlab_firmware_describe(SEV_PSP(object)->firmware);
}

static void psp_realize(PCIDevice *device, Error **errp)
{
    SevPsp *psp = SEV_PSP(device);

    if (msi_init(device, 0, 1, true, false, errp)) {
        return;
    }
    psp->firmware = sevlab_firmware_new(&address_space_memory, psp->encrypt);
    memory_region_init_io(&psp->mailbox, OBJECT(psp), &mailbox_ops, psp,
                          "sev-psp-mailbox", MAILBOX_SIZE);
    pci_register_bar(device, MAILBOX_BAR, PCI_BASE_ADDRESS_SPACE_MEMORY,
                     &psp->mailbox);
    memory_region_init_io(&psp->account, OBJECT(psp), &account_ops, psp,
                          "sev-psp-account", ACCOUNT_SIZE);
    pci_register_bar(device, ACCOUNT_BAR, PCI_BASE_ADDRESS_SPACE_IO,
                     &psp->account);
    object_property_add_str(OBJECT(psp), "account", psp_account, NULL);
}

static const Property psp_properties[] = {
    DEFINE_PROP_BOOL("encrypt", SevPsp, encrypt, false),
};

static void psp_class_init(ObjectClass *class, void *data)
{
    PCIDeviceClass *pci = PCI_DEVICE_CLASS(class);
    DeviceClass *device = DEVICE_CLASS(class);

    pci->realize = psp_realize;
    pci->vendor_id = PCI_VENDOR_ID_AMD;
    pci->device_id = DEVICE_ID;
    pci->class_id = CLASS_ENCRYPTION;
    device->desc = "AMD security processor with SEV firmware";
    device->hotpluggable = false;
    device->user_creatable = true;
    device_class_set_props(device, psp_properties);
}

static const TypeInfo psp_type = {
    .name = TYPE_SEV_PSP,
    .parent = TYPE_PCI_DEVICE,
    .instance_size = sizeof(SevPsp),
    .class_init = psp_class_init,
    .interfaces = (InterfaceInfo[]) {
        { INTERFACE_CONVENTIONAL_PCI_DEVICE },
        { }
    },
};

static void psp_register(void)
{
    type_register_static(&psp_type);
}

type_init(psp_register)
