/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is around the library: the input, the process, the keeper, the C library, the kernel. */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/kvm.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define MOVE_CAPABILITY 206 /* KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM */
#define MAPPINGS 256
#define ALLOCATIONS 4096

struct world world;
int pool_memory[POOL_MEMORY], pool_listener[POOL_LISTENERS];

static int pool_pipe; /* a stream */
const int64_t pool_size[POOL_MEMORY] = {4096, 8192, 8192, 1 << 20};
static struct stat pool_stat[POOL_MEMORY];
static int first_free;

/* ---- input ---- */

static const uint8_t *at, *end;

void input_set(const uint8_t *bytes, size_t size)
{
    at = bytes;
    end = bytes + size;
}

bool input_left(void)
{
    return at < end;
}

uint8_t input_byte(void)
{
    return at < end ? *at++ : 0;
}

uint32_t input_word(void)
{
    uint32_t word = 0;

    input_bytes(&word, sizeof word);
    return word;
}

size_t input_bytes(void *buffer, size_t size)
{
    if (size > (size_t)(end - at))
        size = (size_t)(end - at);
    memcpy(buffer, at, size);
    at += size;
    return size;
}

/* ---- reset: the library's own variables lie in sections of their own ---- */

extern char __start_adopt_data[], __stop_adopt_data[], __start_adopt_bss[], __stop_adopt_bss[];
static char *saved_data, *saved_bss;

/* The sanitizer's red zones lie between the variables, and are copied with them. */
__attribute__((no_sanitize("address"))) static void copy(char *to, const char *from, size_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

static void *allocated[ALLOCATIONS];
static unsigned int allocations;

void *world_keep(void *memory)
{
    demand(allocations < ALLOCATIONS);
    return allocated[allocations++] = memory;
}

void *world_calloc(size_t count, size_t size);
void *world_calloc(size_t count, size_t size)
{
    return world_keep(calloc(count, size));
}

char *world_strdup(const char *text);
char *world_strdup(const char *text)
{
    return world_keep(strdup(text));
}

void *world_realloc(void *memory, size_t size);
void *world_realloc(void *memory, size_t size)
{
    for (unsigned int i = 0; memory && i < allocations; i++)
        if (allocated[i] == memory)
            return allocated[i] = realloc(memory, size);
    demand(!memory);
    return world_keep(realloc(NULL, size));
}

void world_free(void *memory);
void world_free(void *memory)
{
    for (unsigned int i = 0; memory && i < allocations; i++)
        if (allocated[i] == memory) {
            allocated[i] = allocated[--allocations];
            free(memory);
            return;
        }
    demand(!memory); /* freed what was never allocated, or twice */
}

/* What the library has mapped, by addresses that nobody looks at. */
static struct mapping {
    uintptr_t start;
    size_t length;
    size_t writable; /* bytes */
    bool of_source, shared, early; /* early: from before the hand-over, which it must be part of */
} mappings[MAPPINGS];
static unsigned int mapping_count;
static uintptr_t next_address;

void world_start(void)
{
    int ends[2];

    pool_memory[0] = -1;
    for (int i = 0; i < POOL_MEMORY; i++) {
        pool_memory[i] = memfd_create("pool", MFD_CLOEXEC);
        demand(pool_memory[i] >= 0 && !ftruncate(pool_memory[i], pool_size[i]) && !fstat(pool_memory[i], &pool_stat[i]));
    }
    for (int i = 0; i < POOL_LISTENERS; i++) {
        struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

        pool_listener[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        demand(pool_listener[i] >= 0 && !bind(pool_listener[i], (struct sockaddr *)&any, sizeof any) &&
               !listen(pool_listener[i], 1));
    }
    demand(!pipe2(ends, O_CLOEXEC));
    pool_pipe = ends[0];
    first_free = ends[1] + 1;
    saved_data = malloc((size_t)(__stop_adopt_data - __start_adopt_data));
    saved_bss = malloc((size_t)(__stop_adopt_bss - __start_adopt_bss));
    demand(saved_data && saved_bss && world.notifier);
    copy(saved_data, __start_adopt_data, (size_t)(__stop_adopt_data - __start_adopt_data));
    copy(saved_bss, __start_adopt_bss, (size_t)(__stop_adopt_bss - __start_adopt_bss));
}

void world_reset(void)
{
    Notifier *notifier = world.notifier;

    copy(__start_adopt_data, saved_data, (size_t)(__stop_adopt_data - __start_adopt_data));
    copy(__start_adopt_bss, saved_bss, (size_t)(__stop_adopt_bss - __start_adopt_bss));
    while (allocations)
        free(allocated[--allocations]);
    close_range((unsigned int)first_free, ~0U, 0);
    mapping_count = 0;
    next_address = (1UL << 40) - 6 * 4096; /* the third or so lies on both sides of a boundary between page tables */
    memset(&world, 0, sizeof world);
    world.notifier = notifier;
    world.vm = -1;
    world.image = -1;
    qemu_reset();
    demand(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, world.keeper));
}

/* ---- the end of the process ---- */

void world_exit(int status) __attribute__((noreturn));
void world_exit(int status)
{
    demand(status == 1);
    longjmp(world.ended, 1);
}

/* What the library prints is one line, whoever it quotes. */
ssize_t world_write(int fd, const void *text, size_t length);
ssize_t world_write(int fd, const void *text, size_t length)
{
    const char *line = text;

    demand(fd == STDERR_FILENO && length && length <= 1024 && line[length - 1] == '\n');
    for (size_t i = 0; i + 1 < length; i++)
        demand((unsigned char)line[i] >= ' ' && line[i] != 0x7f);
    return (ssize_t)length;
}

int world_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int world_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    (void)thread, (void)attributes, (void)start, (void)argument;
    return EAGAIN;
}

/* ---- the keeper: answers when it is asked ---- */

static int usual_reply(char *reply, const char *request)
{
    struct stat image;

    if (!strncmp(request, "hello ", 6)) {
        static const char *const contexts[] = {"none", "sev", "sev-es"};

        return sprintf(reply, "ok context=%s source=%s handle=%u", contexts[input_byte() % 3],
                       input_chance(2) ? "ended" : "running", input_word());
    }
    if (!world.honest && input_chance(8))
        return sprintf(reply, "none");
    world.reply_fds = 1;
    if (!strncmp(request, "listener ", 9))
        return sprintf(reply, "fd");
    if (!strcmp(request, "stream") && !fstat(world.image, &image))
        return sprintf(reply, "fd %llu %llu", (unsigned long long)image.st_dev, (unsigned long long)image.st_ino);
    return sprintf(reply, "fd %lld", (long long)pool_size[world.honest ? world.given : input_byte() % POOL_MEMORY]);
}

static int pick_descriptor(void)
{
    unsigned int pick = world.honest ? world.given++ : input_byte() % (POOL_MEMORY + POOL_LISTENERS + 1);

    if (pick == POOL_MEMORY + POOL_LISTENERS)
        return pool_pipe;
    return pick < POOL_MEMORY ? pool_memory[pick] : pool_listener[pick - POOL_MEMORY];
}

static void answer(const char *request, bool usual)
{
    char reply[KEEPER_MESSAGE + 8];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(4 * sizeof(int))];
    } control = {0};
    struct iovec data = {reply, 0};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    int fds[4], length;

    world.reply_fds = 0;
    length = usual_reply(reply, request);
    if (!usual) {
        world.reply_fds = input_byte() % 5;
        if (input_chance(2))
            length = (int)input_bytes(reply, input_chance(16) ? sizeof reply : input_byte());
        else if (length)
            reply[input_byte() % (unsigned int)length] = (char)input_byte();
    }
    data.iov_len = (size_t)length;
    world.kept_fds += world.reply_fds == 1 && strncmp(request, "hello ", 6);
    if (world.reply_fds) {
        for (int i = 0; i < world.reply_fds; i++)
            fds[i] = pick_descriptor();
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE((size_t)world.reply_fds * sizeof(int));
        control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
                                          .cmsg_type = SCM_RIGHTS,
                                          .cmsg_len = CMSG_LEN((size_t)world.reply_fds * sizeof(int))};
        memcpy(CMSG_DATA(&control.header), fds, (size_t)world.reply_fds * sizeof(int));
    }
    /* The library may have closed its end already. */
    if (sendmsg(world.keeper[1], &message, MSG_NOSIGNAL) < 0)
        shutdown(world.keeper[1], SHUT_WR);
}

ssize_t world_send(int fd, const void *text, size_t length, int flags);
ssize_t world_send(int fd, const void *text, size_t length, int flags)
{
    char request[KEEPER_MESSAGE + 1] = {0};
    uint8_t mood = world.honest ? 100 : input_byte();

    (void)fd;
    demand(flags & MSG_NOSIGNAL && length < KEEPER_MESSAGE);
    memcpy(request, text, length);
    if (mood == 1) {
        errno = EPIPE;
        return -1;
    }
    if (mood == 2)
        shutdown(world.keeper[1], SHUT_WR);
    else
        answer(request, mood < 160);
    return (ssize_t)length;
}

/* ---- the kernel, and what the library must never have it do ---- */

bool world_is_pool(int fd)
{
    struct stat file;

    if (fstat(fd, &file))
        return false;
    for (int i = 0; i < POOL_MEMORY; i++)
        if (file.st_ino == pool_stat[i].st_ino && file.st_dev == pool_stat[i].st_dev)
            return true;
    return false;
}

static int perhaps(int result)
{
    static const int errors[] = {EINVAL, EBUSY, EIO, ENOMEM, ENOTTY, EINTR};

    if (!input_chance(16))
        return result;
    errno = errors[input_byte() % 6];
    return -1;
}

static void check_sev(int fd, const struct kvm_sev_cmd *command)
{
    if (fd != world.vm || !hop.keeper || world.kernel_moves)
        return;
    switch (command->id) {
    case KVM_SEV_INIT:
    case KVM_SEV_ES_INIT:
    case KVM_SEV_LAUNCH_START:
    case KVM_SEV_LAUNCH_UPDATE_DATA:
    case KVM_SEV_LAUNCH_UPDATE_VMSA:
    case KVM_SEV_LAUNCH_SECRET:
    case KVM_SEV_LAUNCH_MEASURE:
    case KVM_SEV_LAUNCH_FINISH:
        demand(!"the kernel launches the guest a second time");
    }
}

static int kernel_ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;
    int result = 0;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    switch ((unsigned int)request) {
    case KVM_CREATE_VM:
    case KVM_CREATE_VCPU:
        result = perhaps(100000 + input_byte());
        if (result >= 0 && (unsigned int)request == KVM_CREATE_VM)
            world.vm = result;
        return result;
    case KVM_MEMORY_ENCRYPT_OP:
        if (argument)
            check_sev(fd, argument);
        break;
    case KVM_SET_MP_STATE: /* it would never wake up */
        demand(hop.context != CONTEXT_SEV_ES || !hop_in_progress() ||
               ((struct kvm_mp_state *)argument)->mp_state != KVM_MP_STATE_HALTED);
        break;
    case KVM_ENABLE_CAP:
        if (((struct kvm_enable_cap *)argument)->cap == MOVE_CAPABILITY) {
            demand(!world.kernel_moves);
            demand(memory_state() == RAM_SHARED);
            result = perhaps(0);
            world.kernel_moves += !result;
            return result;
        }
    }
    return perhaps(result);
}

static int kernel_memfd_create(const char *name, unsigned int flags)
{
    return memfd_create(name, flags & MFD_CLOEXEC);
}

static int kernel_ftruncate(int fd, off64_t length)
{
    (void)length;
    demand(!world_is_pool(fd) || !memory_state());
    return perhaps(0);
}

static int kernel_fallocate(int fd, int mode, off64_t offset, off64_t length)
{
    (void)mode, (void)offset, (void)length;
    demand(!world_is_pool(fd) || memory_state() != RAM_PRIVATE);
    return perhaps(0);
}

static int kernel_fcntl(int fd, int command, ...)
{
    va_list arguments;
    long argument;

    va_start(arguments, command);
    argument = va_arg(arguments, long);
    va_end(arguments);
    demand(command != F_ADD_SEALS || !world_is_pool(fd) || !memory_state());
    return fcntl(fd, command, argument);
}

static void forget(uintptr_t start, size_t length)
{
    for (unsigned int i = 0; i < mapping_count;)
        if (mappings[i].start < start + length && start < mappings[i].start + mappings[i].length)
            mappings[i] = mappings[--mapping_count];
        else
            i++;
}

static void *kernel_mmap(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    bool of_source = fd >= 0 && world_is_pool(fd), shared = (flags & 0xf) != MAP_PRIVATE;
    uintptr_t start = (uintptr_t)address;

    (void)offset;
    if (perhaps(0) < 0 || !length)
        return MAP_FAILED;
    /* The mapping at the hand-over is at an address that is mapped privately already; nothing else may be shared. */
    if (of_source && shared && memory_state() == RAM_PRIVATE) {
        bool found = false;

        demand(flags & MAP_FIXED);
        for (unsigned int i = 0; i < mapping_count; i++)
            found |= mappings[i].of_source && mappings[i].start == start && mappings[i].length == length;
        demand(found);
    }
    if (flags & MAP_FIXED)
        forget(start, length);
    else {
        start = next_address;
        next_address += length + 4096;
    }
    demand(mapping_count < MAPPINGS);
    mappings[mapping_count++] =
        (struct mapping){.start = start,
                         .length = length,
                         .writable = prot & PROT_WRITE ? length : 0,
                         .of_source = of_source,
                         .shared = shared,
                         .early = memory_state() == RAM_PRIVATE};
    return (void *)start;
}

static int kernel_munmap(void *address, size_t length)
{
    forget((uintptr_t)address, length);
    return 0;
}

/* At the hand-over, of what was mapped ahead of it; in parts, and once more when it has failed. */
static int kernel_mprotect(void *address, size_t length, int prot)
{
    uintptr_t start = (uintptr_t)address;
    bool found = false;

    demand(memory_state() == RAM_PRIVATE && prot & PROT_WRITE);
    for (unsigned int i = 0; i < mapping_count; i++)
        if (mappings[i].start <= start && start + length <= mappings[i].start + mappings[i].length) {
            demand(mappings[i].of_source && mappings[i].shared);
            mappings[i].writable += length;
            found = true;
        }
    demand(found);
    return perhaps(0);
}

static int kernel_madvise(void *address, size_t length, int advice)
{
    uintptr_t start = (uintptr_t)address;

    for (unsigned int i = 0; i < mapping_count; i++)
        if (mappings[i].of_source && mappings[i].start < start + length && start < mappings[i].start + mappings[i].length &&
            memory_state() == RAM_PRIVATE)
            demand(advice != MADV_DONTNEED && advice != MADV_REMOVE && advice != MADV_FREE &&
                   advice != MADV_POPULATE_WRITE && advice != MADV_POPULATE_READ);
    return perhaps(0);
}

static int kernel_mlockall(int flags)
{
    (void)flags;
    demand(!hop_in_progress());
    return perhaps(0);
}

static ssize_t kernel_readv(int fd, const struct iovec *vector, int count)
{
    (void)fd;
    demand(vector && count > 0);
    if (world.honest)
        return (ssize_t)vector->iov_len;
    if (input_chance(4)) {
        errno = EAGAIN;
        return -1;
    }
    return (ssize_t)(input_word() % (vector->iov_len + 1));
}

static int kernel_open(const char *path, int flags, ...)
{
    demand(strcmp(path, "/etc/passwd") || !hop_in_progress() || !(flags & O_TRUNC) || (flags & O_ACCMODE) != O_WRONLY);
    errno = EACCES;
    return -1;
}

static FILE *kernel_fopen(const char *path, const char *mode)
{
    demand(strcmp(path, "/etc/passwd") || !hop_in_progress() || mode[0] != 'w' || strchr(mode, '+') || strlen(mode) > 15);
    errno = EACCES;
    return NULL;
}

static int kernel_fadvise(int fd, off64_t offset, off64_t length, int advice)
{
    (void)fd, (void)offset, (void)length;
    demand(!hop_in_progress() || advice != POSIX_FADV_DONTNEED);
    return perhaps(0);
}

static int kernel_bind(int fd, const struct sockaddr *address, socklen_t length)
{
    (void)fd, (void)address, (void)length;
    return perhaps(0);
}

static int kernel_unlink(const char *path)
{
    (void)path;
    return perhaps(0);
}

static int kernel_listen(int fd, int backlog)
{
    (void)fd, (void)backlog;
    return perhaps(0);
}

static bool is_listener(int fd)
{
    struct stat file, other;

    for (int i = 0; i < POOL_LISTENERS; i++)
        if (!fstat(fd, &file) && !fstat(pool_listener[i], &other) && file.st_ino == other.st_ino)
            return true;
    return false;
}

static int kernel_accept(int fd, struct sockaddr *address, socklen_t *length)
{
    (void)address, (void)length;
    demand(!is_listener(fd) || !hop_in_progress());
    errno = EAGAIN;
    return -1;
}

static int kernel_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    (void)flags;
    return kernel_accept(fd, address, length);
}

/* Of descriptors that are to be VMs. */
ssize_t world_readlink(const char *path, char *target, size_t size);
ssize_t world_readlink(const char *path, char *target, size_t size)
{
    static const char vm[] = "anon_inode:kvm-vm";

    demand(!strncmp(path, "/proc/self/fd/", 14) && size > sizeof vm);
    if (input_chance(8))
        return -1;
    memcpy(target, input_chance(4) ? "anon_inode:[file]" : vm, sizeof vm - 1);
    return sizeof vm - 1;
}

struct libc libc_functions = {.ioctl = kernel_ioctl,
                              .memfd_create = kernel_memfd_create,
                              .ftruncate = kernel_ftruncate,
                              .fallocate = kernel_fallocate,
                              .fcntl = kernel_fcntl,
                              .mmap = kernel_mmap,
                              .munmap = kernel_munmap,
                              .mprotect = kernel_mprotect,
                              .madvise = kernel_madvise,
                              .mlockall = kernel_mlockall,
                              .readv = kernel_readv,
                              .open = kernel_open,
                              .fopen = kernel_fopen,
                              .fadvise = kernel_fadvise,
                              .bind = kernel_bind,
                              .unlink = kernel_unlink,
                              .listen = kernel_listen,
                              .accept = kernel_accept,
                              .accept4 = kernel_accept4};

void find_libc_functions(void)
{
    demand(!"they are here");
}

/* Behind the hand-over each mapping from before it is shared, all of it. That none is before it, mmap() itself sees to. */
void world_check(void)
{
    for (unsigned int i = 0; i < mapping_count; i++)
        if (mappings[i].of_source && mappings[i].early)
            demand(memory_state() != RAM_SHARED || (mappings[i].shared && mappings[i].writable >= mappings[i].length));
}
