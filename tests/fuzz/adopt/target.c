/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What QEMU does with the library, as the input wants. TARGET chooses which part of it:
 *   hello      where the keeper is, and what it sends first; the save image
 *   memory     memfds, mappings, the hand-over
 *   listeners  sockets and files
 *   kvm        ioctls
 *   qmp        all of them, the QMP commands above all
 */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SEV_INIT2 22

enum target { hello, memory, listeners, kvm, qmp };

#define DESCRIPTORS 32

static int descriptors[DESCRIPTORS];
static unsigned int descriptor_count;

static void remember(int fd)
{
    if (fd >= 0 && descriptor_count < DESCRIPTORS)
        descriptors[descriptor_count++] = fd;
}

static int pick(void)
{
    uint8_t choice = input_byte();

    return descriptor_count && choice ? descriptors[choice % descriptor_count] : -1;
}

/* In a block of its own size, so that the sanitizer sees whoever reads past it. */
static void *exactly(size_t size)
{
    void *bytes = world_keep(malloc(size ? size : 1));

    memset(bytes, 0, size);
    input_bytes(bytes, size);
    return bytes;
}

static char *text(size_t longest)
{
    size_t size = input_byte() % longest;
    char *line = world_keep(calloc(1, size + 1));

    input_bytes(line, size);
    return line;
}

/* ---- memory ---- */

static char *addresses[8];
static size_t lengths[8];

static const char *memfd_name(void)
{
    static const char *const names[] = {"memory-backend-memfd", "pc.ram", "test", "system.flash0"};
    uint8_t choice = input_byte();

    return choice < 200 ? names[choice % 4] : text(255);
}

static void map(void)
{
    unsigned int slot = input_byte() % 8;
    size_t length = (size_t)(input_byte() % 5) * 4096;
    int flags = input_chance(8) ? MAP_PRIVATE : MAP_SHARED;
    char *fixed = input_chance(8) && lengths[slot] >= length ? addresses[slot] : NULL;
    char *start = adopt_mmap64(fixed, length, PROT_READ | PROT_WRITE, flags | (fixed ? MAP_FIXED : 0), pick(),
                               (off64_t)(input_byte() % 3) * 4096);

    if (start != MAP_FAILED) {
        addresses[slot] = start;
        lengths[slot] = length;
    }
}

static void unmap(void)
{
    unsigned int slot = input_byte() % 8;
    size_t offset = input_chance(8) ? 4096 : 0;

    if (!addresses[slot] || offset >= lengths[slot])
        return;
    adopt_munmap(addresses[slot] + offset, input_chance(8) ? 4096 : lengths[slot] - offset);
    addresses[slot] = NULL;
    lengths[slot] = 0;
}

static void advise(void)
{
    static const int advice[] = {MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_POPULATE_WRITE, MADV_POPULATE_READ,
                                 MADV_DONTDUMP, MADV_HUGEPAGE, MADV_MERGEABLE, MADV_DONTFORK, MADV_SEQUENTIAL};
    unsigned int slot = input_byte() % 8;

    if (addresses[slot])
        adopt_madvise(addresses[slot], lengths[slot], advice[input_byte() % 10]);
}

static void use_memory(void)
{
    switch (input_byte() % 8) {
    case 0:
    case 1:
        remember(adopt_memfd_create(memfd_name(), input_chance(16) ? MFD_HUGETLB : input_byte() & MFD_CLOEXEC));
        break;
    case 2:
        adopt_ftruncate64(pick(), input_chance(2) ? 0 : 4096 << input_byte() % 9);
        break;
    case 3:
        adopt_fallocate64(pick(), input_byte() & 3, 0, 4096);
        break;
    case 4:
        if (input_chance(2))
            adopt_fcntl64(pick(), F_ADD_SEALS, 7L);
        else
            remember(adopt_fcntl64(pick(), F_DUPFD_CLOEXEC, 0L));
        break;
    case 5:
        map();
        break;
    case 6:
        unmap();
        break;
    case 7:
        if (input_chance(8))
            adopt_mlockall(MCL_CURRENT);
        else
            advise();
    }
}

/* ---- sockets and files ---- */

static void bind_anywhere(void)
{
    static const sa_family_t families[] = {AF_UNIX, AF_UNIX, AF_INET, AF_INET6};
    size_t length = input_byte() % 160;
    uint8_t family = input_byte();
    struct sockaddr *address = exactly(length);

    if (length >= sizeof(sa_family_t) && family < 240)
        memcpy(address, &families[family % 4], sizeof(sa_family_t));
    adopt_bind(pick(), address, (socklen_t)length);
}

static void use_sockets(void)
{
    static const int domains[] = {AF_UNIX, AF_INET, AF_INET6};
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;

    switch (input_byte() % 8) {
    case 0:
        remember(socket(domains[input_byte() % 3], input_chance(8) ? SOCK_DGRAM : SOCK_STREAM | SOCK_CLOEXEC, 0));
        break;
    case 1:
    case 2:
        bind_anywhere();
        break;
    case 3:
        adopt_unlink(input_chance(2) ? text(200) : "/dev/log");
        break;
    case 4:
        adopt_listen(pick(), input_byte());
        break;
    case 5:
        adopt_accept(pick(), (struct sockaddr *)&peer, &length);
        break;
    case 6:
        adopt_accept4(pick(), (struct sockaddr *)&peer, &length, SOCK_CLOEXEC);
        break;
    case 7:
        if (input_chance(4))
            adopt_posix_fadvise64(pick(), 0, 0, (int)(input_byte() % 8));
        else if (input_chance(2))
            adopt_open64(input_chance(4) ? text(64) : "/etc/passwd", (int)(input_word() & (O_TRUNC | O_APPEND | O_ACCMODE)));
        else
            adopt_fopen64(input_chance(4) ? text(64) : "/etc/passwd", input_chance(2) ? "wb" : text(20));
    }
}

/* ---- KVM ---- */

static int vcpus[4];
static unsigned int vcpu_count;

static void *sev_data(uint32_t id)
{
    struct kvm_sev_launch_measure *measure;

    switch (id) {
    case KVM_SEV_LAUNCH_START:
        return exactly(sizeof(struct kvm_sev_launch_start));
    case KVM_SEV_LAUNCH_MEASURE:
        measure = exactly(sizeof *measure);
        measure->len %= 100;
        measure->uaddr = input_chance(4) ? 0 : (uintptr_t)exactly(measure->len);
        return measure;
    default:
        return NULL;
    }
}

static void use_sev(int vm)
{
    struct kvm_sev_cmd *command = exactly(sizeof *command);

    command->id %= SEV_INIT2 + 2;
    command->data = (uintptr_t)sev_data(command->id);
    command->sev_fd = input_chance(8) ? input_word() : (uint32_t)pool_memory[0];
    adopt_ioctl(vm, KVM_MEMORY_ENCRYPT_OP, command);
}

/* Meanwhile QEMU sets a flag in its KVMState, or does what else the input wants. */
static void launch_registers(int vm)
{
    struct kvm_sev_cmd update = {.id = KVM_SEV_LAUNCH_UPDATE_VMSA}, measure = {.id = KVM_SEV_LAUNCH_MEASURE};
    unsigned int changes = input_chance(4) ? input_byte() % 4 : 1, where = input_word() % KVM_STATE_SIZE;
    bool emulated = hop.keeper && vm == world.vm && !world.kernel_moves;
    unsigned char before[KVM_STATE_SIZE];

    memcpy(before, kvm_state, sizeof before);
    adopt_ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &update);
    for (unsigned int i = 0; i < changes; i++)
        kvm_state[1 + (where + i * 7) % (KVM_STATE_SIZE - 1)] = input_chance(8) ? input_byte() : 1;
    measure.data = (uintptr_t)sev_data(measure.id);
    adopt_ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &measure);
    /* It came back, so that was the flag, and QEMU accesses the vCPUs. */
    demand(!emulated || !memcmp(before, kvm_state, sizeof before));
}

static void set_cpuid(int vcpu)
{
    uint32_t entries = input_byte() % 9;
    struct kvm_cpuid2 *cpuid = exactly(sizeof *cpuid + entries * sizeof cpuid->entries[0]);

    cpuid->nent = entries;
    if (entries && input_chance(2))
        cpuid->entries[0].function = 0x8000001f;
    adopt_ioctl(vcpu, KVM_SET_CPUID2, cpuid);
}

static void use_kvm(void)
{
    int vm = input_chance(8) ? pick() : world.vm, vcpu = vcpu_count ? vcpus[input_byte() % vcpu_count] : pick();
    struct kvm_mp_state *state;

    switch (input_byte() % 12) {
    case 0:
        if (world.vm < 0)
            adopt_ioctl(3, KVM_CREATE_VM, (long)(input_chance(16) ? input_byte() : 0));
        break;
    case 1:
        vcpu = adopt_ioctl(vm, KVM_CREATE_VCPU, (long)input_byte());
        if (vcpu >= 0 && vcpu_count < 4)
            vcpus[vcpu_count++] = vcpu;
        break;
    case 2:
        set_cpuid(vcpu);
        break;
    case 3:
        adopt_ioctl(vcpu, KVM_SET_SREGS, exactly(sizeof(struct kvm_sregs)));
        break;
    case 4:
        adopt_ioctl(vcpu, KVM_SET_SREGS2, exactly(sizeof(struct kvm_sregs2)));
        break;
    case 5:
        if (input_chance(2))
            adopt_ioctl(vcpu, KVM_GET_SREGS, exactly(sizeof(struct kvm_sregs)));
        else
            adopt_ioctl(vcpu, KVM_GET_SREGS2, exactly(sizeof(struct kvm_sregs2)));
        break;
    case 6:
    case 7:
        use_sev(vm);
        break;
    case 8:
        adopt_ioctl(vm, input_chance(2) ? KVM_MEMORY_ENCRYPT_REG_REGION : KVM_MEMORY_ENCRYPT_UNREG_REGION,
                    exactly(sizeof(struct kvm_enc_region)));
        break;
    case 9:
        /* Whatever else an ioctl can be; the ones that are known have the arguments above. */
        adopt_ioctl(vcpu, input_chance(2) ? KVM_RUN : (input_word() & 0x00ff) | 0x5400, NULL);
        break;
    case 10:
        state = exactly(sizeof *state);
        state->mp_state %= KVM_MP_STATE_AP_RESET_HOLD + 1;
        adopt_ioctl(vcpu, KVM_SET_MP_STATE, state);
        break;
    case 11:
        launch_registers(vm);
    }
}

/* ---- QMP and the main loop ---- */

static void command(void)
{
    static const char *const keys[] = {"fd", "stream", "header-size", ""};
    QDict *arguments = input_chance(8) ? NULL : qdict_new();
    QObject *result = NULL;
    Error *error = NULL;
    QmpCommandFunc *function;

    if (!world.commands)
        return;
    if (input_chance(world.announced ? 2 : 8))
        function = qemu_command(input_byte());
    else
        function = world.command[input_byte() % world.commands].function;
    if (arguments && input_chance(3)) {
        qdict_put_str(arguments, "stream", "stream");
        qdict_put_int(arguments, "header-size", input_byte());
    }
    for (unsigned int count = input_byte() % 4; arguments && count; count--) {
        const char *key = keys[input_byte() % 4];

        if (qdict_haskey(arguments, key))
            continue;
        if (input_chance(4))
            qdict_put_int(arguments, key, (int64_t)input_word());
        else
            qdict_put_str(arguments, key, text(40));
    }
    function(arguments, &result, &error);
    demand(!result != !error);
}

static void read_stream(void)
{
    char buffer[256];
    struct iovec vector = {.iov_base = buffer, .iov_len = sizeof buffer};

    adopt_readv(pick(), &vector, 1);
}

static void use_qmp(void)
{
    bool run;

    switch (input_byte() % 8) {
    case 3:
        read_stream();
        break;
    case 0:
        if (!world.commands)
            world.notifier->notify(world.notifier, NULL);
        break;
    case 1:
        if (world.bottom_halves) {
            world.bottom_halves--;
            world.bottom_half[world.bottom_halves].function(world.bottom_half[world.bottom_halves].opaque);
        }
        break;
    case 2:
        run = input_chance(2);
        if (world.handler)
            world.handler(NULL, run, input_byte());
        /* It came back: then it may. */
        if (world.handler && run && hop.keeper)
            demand(memory_state() == RAM_SHARED && (hop.context == CONTEXT_NONE || world.kernel_moves));
        break;
    default:
        command();
    }
}

/* ---- one input ---- */

/* Descriptors that came and were not asked for are closed. */
static void check_descriptors(void)
{
    int count = 0;

    for (int fd = world.keeper[0]; fd < world.keeper[0] + 12; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    /* Both ends of the conversation, and the run mark and the source if there are such. */
    demand(count >= 2 && count <= 2 + world.kept_fds);
}

/* It came back: then its descriptor is the stream's, or the image's as before. */
static void replace_image(void)
{
    struct stat before, after;

    world.image = memfd_create("image", MFD_CLOEXEC);
    demand(!fstat(world.image, &before));
    save_image_replace();
    demand(!fstat(world.image, &after) && (S_ISFIFO(after.st_mode) || before.st_ino == after.st_ino));
    taps_find_shared();
}

static void connect_keeper(enum target target)
{
    char where[32];

    if (target == hello && input_chance(4)) {
        const char *anywhere = text(200);

        /* Nobody would answer at our own end. */
        snprintf(where, sizeof where, "fd:%d", world.keeper[1]);
        if (strcmp(anywhere, where))
            keeper_connect(anywhere);
        return;
    }
    snprintf(where, sizeof where, "fd:%d", world.keeper[0]);
    keeper_connect(where);
    check_descriptors();
    if (target == hello)
        replace_image();
}

static void use(enum target target)
{
    switch (target == qmp ? (enum target)(input_byte() % 5) : input_chance(4) ? qmp : target) {
    case memory:
        use_memory();
        break;
    case listeners:
        use_sockets();
        break;
    case kvm:
        use_kvm();
        break;
    default:
        use_qmp();
    }
}

static void execute(const char *name, QDict *arguments)
{
    QObject *result = NULL;
    Error *error = NULL;

    for (unsigned int i = 0; i < world.commands; i++)
        if (!strcmp(world.command[i].name, name))
            world.command[i].function(arguments, &result, &error);
}

/* What made-up input seldom arrives at: a QEMU that waits for the state of an announced guest. */
static void await_state(void)
{
    QDict *arguments = qdict_new();
    char byte;
    struct iovec vector = {.iov_base = &byte, .iov_len = 1};

    qdict_put_str(arguments, "stream", "stream");
    qdict_put_int(arguments, "header-size", 1);
    execute("x-sev-adopt-ram", arguments);
    world.honest = true;
    adopt_readv(pool_memory[0], &vector, 1);
    world.honest = false;
    execute("x-sev-adopt-announce", NULL);
}

/* Likewise: a machine that is complete and has adopted the memory of its source. */
static void start_machine(void)
{
    world.honest = true;
    for (unsigned int slot = 0; slot < POOL_MEMORY; slot++) {
        int fd = adopt_memfd_create(input_chance(8) ? "vga.vram" : "memory-backend-memfd", 0);
        char *start = adopt_mmap64(NULL, (size_t)pool_size[slot], PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

        remember(fd);
        if (start != MAP_FAILED) {
            addresses[slot] = start;
            lengths[slot] = (size_t)pool_size[slot];
        }
    }
    world.honest = false;
    if (hop.context != CONTEXT_NONE && adopt_ioctl(3, KVM_CREATE_VM, 0L) >= 0) {
        struct kvm_sev_cmd launch = {.id = hop.context == CONTEXT_SEV ? KVM_SEV_INIT : KVM_SEV_ES_INIT};

        adopt_ioctl(world.vm, KVM_MEMORY_ENCRYPT_OP, &launch);
    }
    world.notifier->notify(world.notifier, NULL);
    if (input_chance(2))
        await_state();
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static bool started;

    if (!started)
        world_start();
    started = true;
    input_set(bytes, size);
    world_reset();
    descriptor_count = vcpu_count = 0;
    memset(addresses, 0, sizeof addresses);
    memset(lengths, 0, sizeof lengths);
    if (setjmp(world.ended))
        return 0;
    connect_keeper(TARGET);
    if (TARGET == qmp && input_chance(2))
        start_machine();
    for (unsigned int step = 0; TARGET != hello && input_left() && step < 100; step++) {
        use(TARGET);
        world_check();
    }
    return 0;
}
