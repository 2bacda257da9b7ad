/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The world in which adopt.so is fuzzed: the sources as they are, in one process with a keeper, a kernel and a QEMU that say
 * and do what the input wants. See README.md.
 *
 *   world.c   what is around the library: input, reset between two inputs, keeper, C library, kernel
 *   qemu.c    the functions of QEMU that it calls
 *   target.c  what QEMU does with it, as the input wants
 *   random.c  inputs for compilers without libFuzzer
 */
#ifndef SEVHOP_FUZZ_WORLD_H
#define SEVHOP_FUZZ_WORLD_H

#include "adopt.h"
#include "qemu.h"

#include <setjmp.h>

/* ---- input: zeros when it is used up ---- */

void input_set(const uint8_t *bytes, size_t size);
bool input_left(void);
uint8_t input_byte(void);
uint32_t input_word(void);
size_t input_bytes(void *buffer, size_t size); /* up to size bytes, as many as there are */
static inline bool input_chance(unsigned int of) { return input_byte() % of == 0; }

/* ---- the process ---- */

#define POOL_MEMORY 4
#define POOL_LISTENERS 3
#define KVM_STATE_SIZE 512
#define BOTTOM_HALVES 8
#define QEMU_COMMANDS 3

struct world {
    jmp_buf ended; /* where fatal() goes */
    int keeper[2]; /* the library's end, ours */
    int reply_fds; /* descriptors with the next reply */
    int kept_fds; /* replies that came with one, which may be kept: the run mark, the source */
    bool honest; /* the keeper gives one memory of the pool after the other, and a stream is read at once */
    unsigned int given;
    unsigned int kernel_moves; /* contexts that the kernel has moved */
    bool announced, announced_running; /* what monitors were informed of */
    int image; /* libvirt's save image; -1: none was passed */
    int vm;
    Notifier *notifier;
    VMChangeStateHandler *handler;
    struct { QEMUBHFunc *function; void *opaque; } bottom_half[BOTTOM_HALVES];
    unsigned int bottom_halves;
    unsigned int commands;
    struct { const char *name; QmpCommandFunc *function; } command[8];
};

extern struct world world;
extern int pool_memory[POOL_MEMORY], pool_listener[POOL_LISTENERS];
extern const int64_t pool_size[POOL_MEMORY]; /* bytes */

void world_start(void);  /* once */
void world_reset(void);  /* before each input: as after the library's constructor, no descriptor, no allocation left */
void world_check(void);  /* what must hold at every moment */
void *world_keep(void *memory); /* to be freed by the reset */
void qemu_reset(void);  /* part of that: what QEMU has */
QmpCommandFunc *qemu_command(unsigned int number); /* one of QEMU's own commands, as its table has it now */
bool world_is_pool(int fd);  /* guest memory of the source */

#define demand(condition)                                                               \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

/* ---- the library's functions that stand in front of the C library's; objcopy gives them these names ---- */

int adopt_ioctl(int fd, unsigned long request, ...);
int adopt_memfd_create(const char *name, unsigned int flags);
int adopt_ftruncate64(int fd, off64_t length);
int adopt_fallocate64(int fd, int mode, off64_t offset, off64_t length);
int adopt_fcntl64(int fd, int command, ...);
void *adopt_mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset);
int adopt_munmap(void *address, size_t length);
int adopt_madvise(void *address, size_t length, int advice);
int adopt_mlockall(int flags);
ssize_t adopt_readv(int fd, const struct iovec *vector, int count);
int adopt_open64(const char *path, int flags, ...);
FILE *adopt_fopen64(const char *path, const char *mode);
int adopt_posix_fadvise64(int fd, off64_t offset, off64_t length, int advice);
int adopt_bind(int fd, const struct sockaddr *address, socklen_t length);
int adopt_unlink(const char *path);
int adopt_listen(int fd, int backlog);
int adopt_accept(int fd, struct sockaddr *address, socklen_t *length);
int adopt_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags);

/* ---- target.c ---- */

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

#endif
