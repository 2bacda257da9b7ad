/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's memory.
 *
 * When QEMU creates a memfd for guest memory it gets the source's, so the destination has the same command line as the
 * source. Until the hand-over QEMU maps it privately: what it writes at start-up (ROMs, kernel hashes, loader data,
 * reset) goes to copies, and what it would do to the file (truncate, seal, preallocate, punch holes) is not done. At
 * the hand-over the same addresses are mapped again as QEMU asked for, which discards the copies. Before an expected
 * hand-over the guest's RAM is mapped ahead, read-only: making it writable takes no time, while mapping costs time
 * proportional to its size.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MAP_TYPE
#define MAP_TYPE 0x0f
#endif

/* Bytes of address space that one page directory (PMD table) covers. */
#define PAGE_TABLE_SPAN ((uintptr_t)1 << 30)

/* A memfd of the source. */
struct memory {
    struct memory *next;
    char *name;
    dev_t device;
    ino_t inode;
    off64_t size;
    int fd; /* our own, for the mapping at the hand-over; -1 after it */
};

/* Where QEMU mapped one, and how. */
struct mapping {
    struct mapping *next;
    struct memory *memory;
    char *start;
    size_t length;
    int prot, flags;
    off64_t offset;
    bool ahead; /* mapped already, but read-only */
};

/* madvise() settings are lost with their mapping: repeated after the hand-over, in the same order. */
struct advice {
    struct advice *next;
    char *start;
    size_t length;
    int advice;
};

/*
 * How often each memfd name was asked for: all backends of a guest have the same name, so the order distinguishes them.
 */
struct request {
    struct request *next;
    char *name;
    unsigned int count;
};

static struct memory *memories;
static struct mapping *mappings;
static struct advice *advices;
static struct request *requests;
static atomic_int state = RAM_NONE;
static int wanted_lock; /* flags of a deferred mlockall() */

enum ram_state memory_state(void)
{
    return (enum ram_state)atomic_load_explicit(&state, memory_order_relaxed);
}

const char *memory_state_name(void)
{
    static const char *const names[] = {[RAM_NONE] = "none", [RAM_PRIVATE] = "private", [RAM_SHARED] = "shared"};

    return names[memory_state()];
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);

    if (!memory)
        fatal("out of memory");
    return memory;
}

static char *copy_name(const char *name)
{
    return strcpy(allocate(strlen(name) + 1), name);
}

/* ---- adoption ---- */

/* QEMU also creates memfds that are no guest memory. Those are not the source's. */
static bool never_guest_memory(const char *name)
{
    static const char *const names[] = {"test", "displaysurface", "vhost-log"};

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i]))
            return true;
    return false;
}

static bool is_ram(const char *name)
{
    return !strcmp(name, "memory-backend-memfd");
}

static unsigned int count_request(const char *name)
{
    struct request *request;
    unsigned int number;

    pthread_mutex_lock(&adopt_lock);
    for (request = requests; request && strcmp(request->name, name); request = request->next)
        ;
    if (!request) {
        request = allocate(sizeof *request);
        request->name = copy_name(name);
        request->next = requests;
        requests = request;
    }
    number = request->count++;
    pthread_mutex_unlock(&adopt_lock);
    return number;
}

static void check_memory(const char *name, int fd, const char *size, bool huge)
{
    unsigned long long expected;
    struct statfs filesystem;
    struct stat file;

    if (fd < 0 || !parse_number(size, &expected))
        fatal("invalid reply of the keeper about guest memory '%s'", name);
    if (fstat(fd, &file) < 0 || fstatfs(fd, &filesystem) < 0)
        fatal("guest memory '%s' from the keeper: %s", name, strerror(errno));
    if ((unsigned long long)file.st_size != expected)
        fatal("guest memory '%s' has %lld bytes, the keeper reports %llu", name, (long long)file.st_size, expected);
    if ((filesystem.f_type == HUGETLBFS_MAGIC) != huge)
        fatal("guest memory '%s' has %s pages in the old QEMU: use the same hugetlb= setting", name,
            huge ? "small" : "huge");
}

static void remember_memory(const char *name, int fd)
{
    struct memory *memory = allocate(sizeof *memory), **last;
    struct stat file;

    if (fstat(fd, &file) < 0)
        fatal("guest memory '%s' from the keeper: %s", name, strerror(errno));
    memory->name = copy_name(name);
    memory->device = file.st_dev;
    memory->inode = file.st_ino;
    memory->size = file.st_size;
    memory->fd = libc()->fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (memory->fd < 0)
        fatal("cannot duplicate the descriptor of guest memory '%s': %s", name, strerror(errno));

    pthread_mutex_lock(&adopt_lock);
    for (last = &memories; *last; last = &(*last)->next)
        if ((*last)->inode == memory->inode && (*last)->device == memory->device)
            fatal("invalid reply of the keeper: the same guest memory '%s' twice", name);
    *last = memory;
    if (memory_state() == RAM_NONE)
        atomic_store(&state, RAM_PRIVATE);
    pthread_mutex_unlock(&adopt_lock);
}

EXPORT int memfd_create(const char *name, unsigned int flags)
{
    char reply[KEEPER_MESSAGE];
    int fd;

    if (!hop_in_progress() || never_guest_memory(name))
        return libc()->memfd_create(name, flags);
    if (!keeper_ask(reply, &fd, "memfd %u %s", count_request(name), name)) {
        errno = EPIPE;
        return -1;
    }
    if (!strcmp(reply, "none")) {
        /* Without the source's pages in this backend the guest would lose a part of its memory. */
        if (is_ram(name) && !atomic_load(&hop.machine_complete))
            fatal("the old QEMU has fewer memory-backend-memfd objects: use the same memory backends");
        return libc()->memfd_create(name, flags);
    }
    if (strncmp(reply, "fd ", 3))
        fatal("invalid reply of the keeper about guest memory '%s': %s", name, reply);
    check_memory(name, fd, reply + 3, flags & MFD_HUGETLB);
    if (memory_state() == RAM_SHARED) {
        /* Nothing is mapped privately any more, so QEMU's writes could not be kept from this one. */
        warn("guest memory '%s' was created after the hand-over", name);
        close(fd);
        errno = EBUSY;
        return -1;
    }
    remember_memory(name, fd);
    if (!(flags & MFD_CLOEXEC))
        libc()->fcntl(fd, F_SETFD, 0);
    return fd;
}

/* By inode, not by number: QEMU duplicates descriptors. Keeps errno. */
static struct memory *memory_of(int fd)
{
    struct memory *memory = NULL;
    int saved = errno;
    struct stat file;

    if (fd >= 0 && memory_state() != RAM_NONE && !fstat(fd, &file)) {
        pthread_mutex_lock(&adopt_lock);
        for (memory = memories; memory; memory = memory->next)
            if (memory->inode == file.st_ino && memory->device == file.st_dev)
                break;
        pthread_mutex_unlock(&adopt_lock);
    }
    errno = saved;
    return memory;
}

/* ---- what QEMU does to the file ---- */

static int truncate_file(int fd, off64_t length)
{
    struct memory *memory = memory_of(fd);

    if (!memory)
        return libc()->ftruncate(fd, length);
    /* Memory that QEMU sizes later (aux-ram-share) is first cut to nothing, which would wipe the guest. */
    if (length == 0 || length == memory->size)
        return 0;
    fatal("guest memory '%s' has %lld bytes in the old QEMU and %lld here: use the same -m and memory backends",
        memory->name, (long long)memory->size, (long long)length);
}

static int allocate_file(int fd, int mode, off64_t offset, off64_t length)
{
    if (memory_state() == RAM_PRIVATE && memory_of(fd)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return libc()->fallocate(fd, mode, offset, length);
}

/* The source has sealed it already, and its last seal forbids more. */
static int control_file(int fd, int command, void *argument)
{
    if (command == F_ADD_SEALS && memory_of(fd))
        return 0;
    return libc()->fcntl(fd, command, argument);
}

/* ---- what QEMU does to the mapping ---- */

/* The hand-over maps at fixed addresses: what QEMU has unmapped, or mapped over, must not be among them. */
static void forget_mappings(char *start, size_t length)
{
    struct mapping **link = &mappings, *mapping;

    pthread_mutex_lock(&adopt_lock);
    while ((mapping = *link)) {
        bool begins_inside = mapping->start >= start && mapping->start < start + length;
        bool ends_inside = mapping->start + mapping->length > start && mapping->start + mapping->length <= start + length;

        if (begins_inside && ends_inside) {
            *link = mapping->next;
            free(mapping);
            continue;
        }
        if (begins_inside || ends_inside || (start > mapping->start && start < mapping->start + mapping->length))
            fatal("QEMU unmaps a part of guest memory '%s'", mapping->memory->name);
        link = &mapping->next;
    }
    pthread_mutex_unlock(&adopt_lock);
}

static void *map_privately(struct memory *memory, void *address, size_t length, int prot, int flags, int fd,
                           off64_t offset)
{
    struct mapping *mapping;
    void *start;

    if ((flags & MAP_TYPE) == MAP_PRIVATE)
        fatal("guest memory '%s' is to be private here: it needs share=on", memory->name);
    /* Checked by the mapping, since that is what QEMU really uses. */
    if (offset < 0 || offset > memory->size || length > (uint64_t)(memory->size - offset))
        fatal("guest memory '%s' has %lld bytes in the old QEMU, and %zu from %lld on are mapped here", memory->name,
            (long long)memory->size, length, (long long)offset);
    start = libc()->mmap(address, length, prot, (flags & ~(MAP_TYPE | MAP_SYNC)) | MAP_PRIVATE | MAP_NORESERVE, fd, offset);
    if (start == MAP_FAILED)
        return start;
    mapping = allocate(sizeof *mapping);
    *mapping = (struct mapping){.memory = memory,
                                .start = start,
                                .length = length,
                                .prot = prot,
                                .flags = flags & ~MAP_FIXED_NOREPLACE,
                                .offset = offset};
    if (flags & MAP_FIXED)
        forget_mappings(start, length);
    pthread_mutex_lock(&adopt_lock);
    mapping->next = mappings;
    mappings = mapping;
    pthread_mutex_unlock(&adopt_lock);
    return start;
}

static void *map_file(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    struct memory *memory = NULL;
    const bool before = memory_state() == RAM_PRIVATE;
    void *start;

    if (fd >= 0 && before)
        memory = memory_of(fd);
    if (memory)
        return map_privately(memory, address, length, prot, flags, fd, offset);
    start = libc()->mmap(address, length, prot, flags, fd, offset);
    if (before && flags & MAP_FIXED && start != MAP_FAILED)
        forget_mappings(start, length);
    return start;
}

EXPORT int munmap(void *address, size_t length)
{
    if (memory_state() == RAM_PRIVATE)
        forget_mappings(address, length);
    return libc()->munmap(address, length);
}

static bool is_mapping_setting(int advice)
{
    switch (advice) {
    case MADV_DONTFORK:
    case MADV_DOFORK:
    case MADV_MERGEABLE:
    case MADV_UNMERGEABLE:
    case MADV_HUGEPAGE:
    case MADV_NOHUGEPAGE:
    case MADV_DONTDUMP:
    case MADV_DODUMP:
        return true;
    default:
        return false;
    }
}

/* Preallocation would copy every page, which the source has already; discarding would lose pages of the guest. */
static bool is_population(int advice)
{
    switch (advice) {
    case MADV_DONTNEED:
    case MADV_FREE:
    case MADV_REMOVE:
    case MADV_POPULATE_READ:
    case MADV_POPULATE_WRITE:
        return true;
    default:
        return false;
    }
}

static bool is_private_mapping(const char *start, size_t length)
{
    struct mapping *mapping;

    pthread_mutex_lock(&adopt_lock);
    for (mapping = mappings; mapping; mapping = mapping->next)
        if (start < mapping->start + mapping->length && mapping->start < start + length)
            break;
    pthread_mutex_unlock(&adopt_lock);
    return mapping;
}

static void remember_advice(char *start, size_t length, int advice)
{
    struct advice *entry = allocate(sizeof *entry), **last;

    *entry = (struct advice){.start = start, .length = length, .advice = advice};
    pthread_mutex_lock(&adopt_lock);
    for (last = &advices; *last; last = &(*last)->next)
        ;
    *last = entry;
    pthread_mutex_unlock(&adopt_lock);
}

EXPORT int madvise(void *address, size_t length, int advice)
{
    int result;

    if (memory_state() != RAM_PRIVATE || !(is_population(advice) || is_mapping_setting(advice)) ||
        !is_private_mapping(address, length))
        return libc()->madvise(address, length, advice);
    if (is_population(advice))
        return 0;
    result = libc()->madvise(address, length, advice);
    if (!result)
        remember_advice(address, length, advice);
    return result;
}

/*
 * mem-lock=on: locking a private mapping copies all of the guest's memory. Deferred until the hop is over.
 */
EXPORT int mlockall(int flags)
{
    if (!hop_in_progress())
        return libc()->mlockall(flags);
    wanted_lock = flags;
    return 0;
}

static void *lock_pages(void *unused)
{
    (void)unused;
    if (libc()->mlockall(wanted_lock) < 0)
        warn("cannot lock memory as mem-lock=on asks: %s", strerror(errno));
    return NULL;
}

/* In a thread: it faults in every page, which for a large guest takes seconds that QEMU's main loop must not lose. */
void memory_lock_pages(void)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_t thread;

    if (!wanted_lock)
        return;
    sigfillset(&all); /* QEMU's signals are for QEMU's threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &attributes, lock_pages, NULL))
        lock_pages(NULL);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- the hand-over ---- */

static int map_again(const struct mapping *mapping, int prot)
{
    if (libc()->mmap(mapping->start, mapping->length, prot, mapping->flags | MAP_FIXED, mapping->memory->fd,
                     mapping->offset) == MAP_FAILED)
        return -errno;
    return 0;
}

/*
 * The kernel notifies KVM of the whole range if there is a page table in it, empty or not. At the ends there are tables
 * that are shared with neighbouring mappings, so the ends are made writable separately.
 */
static int permit_writing(const struct mapping *mapping)
{
    const uintptr_t start = (uintptr_t)mapping->start, end = start + mapping->length;
    const uintptr_t front = (start + PAGE_TABLE_SPAN - 1) & -PAGE_TABLE_SPAN, back = end & -PAGE_TABLE_SPAN;
    const uintptr_t whole[] = {start, end}, parts[] = {start, front, back, end};
    const uintptr_t *bounds = front <= back ? parts : whole;

    for (size_t i = 0; bounds[i] != end; i++)
        if (bounds[i] != bounds[i + 1] &&
            libc()->mprotect((void *)bounds[i], bounds[i + 1] - bounds[i], mapping->prot) < 0)
            return -errno;
    return 0;
}

static int share_mapping(const struct mapping *mapping)
{
    return mapping->ahead ? permit_writing(mapping) : map_again(mapping, mapping->prot);
}

static int advise_again(void)
{
    for (struct advice *advice = advices; advice; advice = advice->next)
        if (libc()->madvise(advice->start, advice->length, advice->advice) < 0)
            return -errno;
    return 0;
}

/*
 * KVM scans a whole memory slot when its mapping is replaced, which must not be downtime. QEMU does not write to the
 * guest's RAM while it waits for the device state; to memory of devices (aux-ram-share=on) it might.
 */
int memory_share_ahead(void)
{
    int result = 0;

    pthread_mutex_lock(&adopt_lock);
    if (memory_state() == RAM_PRIVATE) {
        for (struct mapping *mapping = mappings; mapping && !result; mapping = mapping->next) {
            if (mapping->ahead || !is_ram(mapping->memory->name))
                continue;
            result = map_again(mapping, mapping->prot & ~PROT_WRITE);
            mapping->ahead = !result;
        }
        if (!result)
            result = advise_again();
    }
    pthread_mutex_unlock(&adopt_lock);
    return result;
}

/* After a failure the state is still private: the guest cannot run, and the call may be repeated. */
int memory_share(void)
{
    int result = 0;

    pthread_mutex_lock(&adopt_lock);
    if (memory_state() == RAM_PRIVATE) {
        for (struct mapping *mapping = mappings; mapping && !result; mapping = mapping->next)
            result = share_mapping(mapping);
        if (!result)
            result = advise_again();
        if (!result) {
            atomic_store(&state, RAM_SHARED);
            for (struct memory *memory = memories; memory; memory = memory->next) {
                close(memory->fd);
                memory->fd = -1;
            }
        }
    }
    pthread_mutex_unlock(&adopt_lock);
    return result;
}

struct memory_counts memory_count(void)
{
    struct memory_counts counts = {0, 0};

    pthread_mutex_lock(&adopt_lock);
    for (struct mapping *mapping = mappings; mapping; mapping = mapping->next) {
        counts.mappings++;
        counts.bytes += (int64_t)mapping->length;
    }
    pthread_mutex_unlock(&adopt_lock);
    return counts;
}

void memory_each(void (*visit)(void *opaque, const char *name, int64_t size, uint64_t inode), void *opaque)
{
    pthread_mutex_lock(&adopt_lock);
    for (struct memory *memory = memories; memory; memory = memory->next)
        visit(opaque, memory->name, memory->size, memory->inode);
    pthread_mutex_unlock(&adopt_lock);
}

/* ---- the interposed functions, each under both names of the C library ---- */

EXPORT void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    return map_file(address, length, prot, flags, fd, offset);
}

EXPORT void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    return map_file(address, length, prot, flags, fd, offset);
}

EXPORT int ftruncate64(int fd, off64_t length)
{
    return truncate_file(fd, length);
}

EXPORT int ftruncate(int fd, off_t length)
{
    return truncate_file(fd, length);
}

EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    return allocate_file(fd, mode, offset, length);
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return allocate_file(fd, mode, offset, length);
}

/* The third argument is an int or a pointer: either arrives whole in a pointer. */
#define FCNTL(name)                                     \
    EXPORT int name(int fd, int command, ...)           \
    {                                                   \
        va_list arguments;                              \
        void *argument;                                 \
                                                        \
        va_start(arguments, command);                   \
        argument = va_arg(arguments, void *);           \
        va_end(arguments);                              \
        return control_file(fd, command, argument);     \
    }

FCNTL(fcntl64)
FCNTL(fcntl)
