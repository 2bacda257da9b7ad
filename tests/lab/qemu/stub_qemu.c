/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * As much of a QEMU as adopt.so looks for, to be the destination of a SEV guest whose registers have the C-bit in CR3.
 * A real QEMU cannot be that in the lab: it wants the position of the C-bit to be the one of the processor that user
 * space sees, and the lab's has none.
 *
 *   stub_qemu REQUEST SOURCE CR3...
 *     REQUEST  sregs or sregs2: how the registers are set and read
 *     SOURCE   inherited descriptor of the source's VM; -1: the context is not moved, the guest is to run all the same
 *     CR3      of each vCPU, in long mode
 *
 * It does what QEMU does, in QEMU's order: launch, vCPUs, CPUID, registers (they come with the device state), the
 * commands of the hop, the end of the launch, run. Nothing is executed in the guest. What came of each step goes to
 * stdout, a line each, `NAME KEY=VALUE...`; numbers are errno or, for addresses, hexadecimal. `shown` is what the library
 * lets QEMU see of CR3, `kernel` is what the kernel has.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "qemu.h" /* the declarations that the library is built with: a definition here that differs does not compile */

#define C_BIT 51
#define LARGEST_EXTENDED 0x80000000
#define ENCRYPTION 0x8000001f

#define CR0_PE (1ULL << 0)
#define CR0_PG (1ULL << 31)
#define CR4_PAE (1ULL << 5)
#define EFER_LME (1ULL << 8)
#define EFER_LMA (1ULL << 10)

#define MOST_VCPUS 8
#define MOST_LEAVES 256

static void fail(const char *what)
{
    fprintf(stderr, "stub_qemu: %s: %s\n", what, strerror(errno));
    exit(2);
}

/* ---- QEMU's dictionaries; all values are kept as text ---- */

struct QDict {
    size_t size;
    struct {
        const char *key;
        char value[64];
    } entries[32];
};

struct QList {
    char unused;
};

QDict *qdict_new(void)
{
    QDict *dict = calloc(1, sizeof *dict);

    if (!dict)
        fail("calloc");
    return dict;
}

void qdict_put_str(QDict *dict, const char *key, const char *value)
{
    if (dict->size == sizeof dict->entries / sizeof *dict->entries)
        abort();
    dict->entries[dict->size].key = key;
    snprintf(dict->entries[dict->size].value, sizeof dict->entries->value, "%s", value);
    dict->size++;
}

void qdict_put_int(QDict *dict, const char *key, int64_t value)
{
    char text[32];

    snprintf(text, sizeof text, "%lld", (long long)value);
    qdict_put_str(dict, key, text);
}

void qdict_put_bool(QDict *dict, const char *key, bool value)
{
    qdict_put_str(dict, key, value ? "true" : "false");
}

void qdict_put_obj(QDict *dict, const char *key, QObject *value)
{
    (void)value;
    qdict_put_str(dict, key, "...");
}

const char *qdict_get_try_str(const QDict *dict, const char *key)
{
    for (size_t i = 0; i < dict->size; i++)
        if (!strcmp(dict->entries[i].key, key))
            return dict->entries[i].value;
    return NULL;
}

int64_t qdict_get_try_int(const QDict *dict, const char *key, int64_t otherwise)
{
    (void)dict;
    (void)key;
    return otherwise;
}

int qdict_haskey(const QDict *dict, const char *key)
{
    return qdict_get_try_str(dict, key) != NULL;
}

size_t qdict_size(const QDict *dict)
{
    return dict->size;
}

QList *qlist_new(void)
{
    static QList list;

    return &list;
}

void qlist_append_obj(QList *list, QObject *value)
{
    (void)list;
    (void)value;
}

/* ---- QMP ---- */

#define FD_NAME "source"

char qmp_commands[1];

static struct {
    const char *name;
    QmpCommandFunc *function;
} commands[8];
static size_t command_count;
static int source_vm;

void qmp_register_command(QmpCommandList *list, const char *name, QmpCommandFunc *function, unsigned int options,
                          uint64_t features)
{
    (void)options;
    (void)features;
    if ((char *)list != qmp_commands || command_count == sizeof commands / sizeof *commands)
        abort();
    commands[command_count].name = name;
    commands[command_count++].function = function;
}

Monitor *monitor_cur(void)
{
    return NULL;
}

int monitor_get_fd(Monitor *monitor, const char *name, Error **error)
{
    (void)monitor;
    (void)error;
    if (strcmp(name, FD_NAME))
        abort();
    return source_vm;
}

/* No command is expected to be refused here. */
void error_setg_internal(Error **error, const char *source, int line, const char *function, const char *format, ...)
{
    va_list arguments;

    (void)error;
    fprintf(stderr, "stub_qemu: refused by %s, %s:%d: ", function, source, line);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static void execute(const char *name, QDict *arguments)
{
    QObject *result = NULL;
    const QDict *answer;
    size_t i;

    for (i = 0; i < command_count && strcmp(commands[i].name, name); i++)
        ;
    if (i == command_count) {
        errno = ENOENT;
        fail(name);
    }
    commands[i].function(arguments, &result, NULL);
    answer = (const QDict *)result;
    printf("%s", name);
    for (i = 0; i < answer->size; i++)
        printf(" %s=%s", answer->entries[i].key, answer->entries[i].value);
    putchar('\n');
}

/* ---- the rest of QEMU ---- */

static Notifier *when_machine_complete;
static VMChangeStateHandler *before_run;
static void *before_run_opaque;

void qemu_add_machine_init_done_notifier(Notifier *notifier)
{
    when_machine_complete = notifier;
}

VMChangeStateEntry *qemu_add_vm_change_state_handler_prio(VMChangeStateHandler *handler, void *opaque, int priority)
{
    (void)priority;
    before_run = handler;
    before_run_opaque = opaque;
    return NULL;
}

bool runstate_is_running(void)
{
    return false;
}

AioContext *qemu_get_aio_context(void)
{
    return NULL;
}

/* There is no main loop, whose turn it is at once. */
void aio_bh_schedule_oneshot_full(AioContext *context, QEMUBHFunc *function, void *opaque, const char *name)
{
    (void)context;
    (void)name;
    function(opaque);
}

/* ---- the machine ---- */

static int kvm, sev, vm;
static int vcpus[MOST_VCPUS];
static size_t vcpu_count;

static int sev_command(uint32_t id, void *data)
{
    struct kvm_sev_cmd command = {.id = id, .data = (uintptr_t)data, .sev_fd = (uint32_t)sev};

    return ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command) < 0 ? errno : 0;
}

static void launch_command(uint32_t id, void *data)
{
    errno = sev_command(id, data);
    if (errno)
        fail("launch command");
}

static struct kvm_enc_region create_memory(void)
{
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    struct stat file;
    void *memory;

    if (fd < 0 || fstat(fd, &file) < 0)
        fail("memory");
    memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    close(fd);
    return (struct kvm_enc_region){.addr = (uintptr_t)memory, .size = (uint64_t)file.st_size};
}

static struct kvm_cpuid_entry2 *leaf(struct kvm_cpuid2 *cpuid, uint32_t function)
{
    struct kvm_cpuid_entry2 *entry;

    for (uint32_t i = 0; i < cpuid->nent; i++)
        if (cpuid->entries[i].function == function)
            return &cpuid->entries[i];
    if (cpuid->nent == MOST_LEAVES)
        abort();
    entry = &cpuid->entries[cpuid->nent++];
    *entry = (struct kvm_cpuid_entry2){.function = function};
    return entry;
}

/* What KVM supports, with the encryption leaf that QEMU adds for a SEV guest. */
static void set_cpuid(int vcpu)
{
    static union {
        struct kvm_cpuid2 cpuid;
        char space[sizeof(struct kvm_cpuid2) + MOST_LEAVES * sizeof(struct kvm_cpuid_entry2)];
    } all;

    all.cpuid.nent = MOST_LEAVES;
    if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &all.cpuid) < 0)
        fail("KVM_GET_SUPPORTED_CPUID");
    leaf(&all.cpuid, LARGEST_EXTENDED)->eax = ENCRYPTION;
    leaf(&all.cpuid, ENCRYPTION)->eax = 1 << 1;
    leaf(&all.cpuid, ENCRYPTION)->ebx = C_BIT | 1 << 6;
    if (ioctl(vcpu, KVM_SET_CPUID2, &all.cpuid) < 0)
        fail("KVM_SET_CPUID2");
    /* The library has to keep a copy of its own: QEMU's is on the stack. */
    memset(&all, 0, sizeof all);
}

static void create_machine(size_t number_of_vcpus)
{
    struct kvm_sev_launch_start start = {0};
    struct kvm_sev_launch_update_data firmware;
    unsigned char measurement[48];
    struct kvm_sev_launch_measure measure = {.uaddr = (uintptr_t)measurement, .len = sizeof measurement};
    struct kvm_enc_region memory;

    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    sev = open("/dev/sev", O_RDWR | O_CLOEXEC);
    if (kvm < 0 || sev < 0)
        fail("/dev");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        fail("KVM_CREATE_VM");
    launch_command(KVM_SEV_INIT, NULL);
    launch_command(KVM_SEV_LAUNCH_START, &start);
    memory = create_memory();
    if (ioctl(vm, KVM_MEMORY_ENCRYPT_REG_REGION, &memory) < 0)
        fail("KVM_MEMORY_ENCRYPT_REG_REGION");
    firmware = (struct kvm_sev_launch_update_data){.uaddr = memory.addr, .len = 0x1000};
    launch_command(KVM_SEV_LAUNCH_UPDATE_DATA, &firmware);
    for (; vcpu_count < number_of_vcpus; vcpu_count++) {
        vcpus[vcpu_count] = ioctl(vm, KVM_CREATE_VCPU, vcpu_count);
        if (vcpus[vcpu_count] < 0)
            fail("KVM_CREATE_VCPU");
        set_cpuid(vcpus[vcpu_count]);
    }
    launch_command(KVM_SEV_LAUNCH_MEASURE, &measure);
    when_machine_complete->notify(when_machine_complete, NULL);
}

/* ---- registers ---- */

/* Both start with the same fields. */
union registers {
    struct kvm_sregs first;
    struct kvm_sregs2 second;
};

static unsigned long get_request = KVM_GET_SREGS, set_request = KVM_SET_SREGS;

static union registers get_registers(int vcpu)
{
    union registers registers;

    if (ioctl(vcpu, get_request, &registers) < 0)
        fail("KVM_GET_SREGS");
    return registers;
}

/* Past the library. */
static union registers get_registers_of_kernel(int vcpu)
{
    union registers registers;

    if (syscall(SYS_ioctl, vcpu, get_request, &registers) < 0)
        fail("KVM_GET_SREGS");
    return registers;
}

static int set_long_mode(int vcpu, uint64_t cr3)
{
    union registers registers = get_registers(vcpu);

    registers.first.cr0 |= CR0_PE | CR0_PG;
    registers.first.cr4 |= CR4_PAE;
    registers.first.efer |= EFER_LME | EFER_LMA;
    registers.first.cs.l = 1;
    registers.first.cs.db = 0;
    registers.first.cr3 = cr3;
    return ioctl(vcpu, set_request, &registers) < 0 ? errno : 0;
}

static void show_registers(const char *when, size_t number)
{
    const union registers shown = get_registers(vcpus[number]), kernel = get_registers_of_kernel(vcpus[number]);

    printf("%s.%zu shown=%#llx kernel=%#llx efer=%#llx\n", when, number, shown.first.cr3, kernel.first.cr3,
           kernel.first.efer);
}

int main(int count, char **words)
{
    QDict *fd_name = qdict_new();

    setlinebuf(stdout);
    if (count < 4 || count > 3 + MOST_VCPUS || !when_machine_complete) {
        fputs("usage: LD_PRELOAD=adopt.so stub_qemu sregs|sregs2 SOURCE CR3...\n", stderr);
        return 2;
    }
    if (!strcmp(words[1], "sregs2")) {
        get_request = KVM_GET_SREGS2;
        set_request = KVM_SET_SREGS2;
    }
    source_vm = atoi(words[2]);

    create_machine((size_t)count - 3);
    for (size_t i = 0; i < vcpu_count; i++) {
        printf("set.%zu errno=%d\n", i, set_long_mode(vcpus[i], strtoull(words[3 + i], NULL, 16)));
        show_registers("before", i);
    }
    execute("x-sev-adopt-ram", NULL);
    if (source_vm >= 0) {
        qdict_put_str(fd_name, "fd", FD_NAME);
        execute("x-sev-migrate-from", fd_name);
    }
    for (size_t i = 0; i < vcpu_count; i++)
        show_registers("after", i);
    execute("x-sev-adopt-status", NULL);
    printf("launch-finish errno=%d\n", sev_command(KVM_SEV_LAUNCH_FINISH, NULL));
    before_run(before_run_opaque, true, 0);
    printf("run allowed=1\n");
    return 0;
}
