/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * adopt.so: preloaded into a stock QEMU, so that it takes over the guest of another QEMU instead of starting one.
 *
 * One file per concept:
 *   main.c       what the process is, its environment; how failures are reported
 *   keeper.c     requests to the keeper, the process that has the source's descriptors
 *   domain.c     what libvirt has passed: a monitor for the keeper; or a copy of that, when there is no hop
 *   descriptors.c  the descriptors that the process was started with
 *   save_image.c  the pipe that takes the place of libvirt's save image
 *   libc.c       the C library's own functions behind the ones that are interposed
 *   memory.c     the guest's memory: mapped privately until the hand-over, shared after it
 *   listeners.c  the source's listening sockets
 *   run_mark.c   records whether the guest has run here, for when this process has exited
 *   reboot_action.c  a reboot stays a shutdown, if the guest cannot be reset here
 *   reboot_mark.c  records whether this process has shut down because of a reboot
 *   stream.c     the stream of the device state, whose first byte is the hand-over
 *   files.c      files that the source still writes
 *   kvm.c        which of QEMU's ioctls concern the hop
 *   taps.c       settings of taps that the source still uses
 *   sev.c        emulated launch commands, the move
 *   registers.c  vCPU registers that the kernel accepts only after the move, and halted vCPUs
 *   protected_state.c  the flag for which QEMU leaves vCPU state alone
 *   realtime.c   resets the realtime priority that the hop has given to threads of this process
 *   announce.c   announces a guest that is still elsewhere, and answers for it
 *   device_events.c  corrects what clients have asked of its devices meanwhile
 *   cpu_properties.c  properties that libvirt need not query while the guest waits
 *   commands.c   the QMP commands and the guard against running too early
 */
#ifndef SEVHOP_ADOPT_H
#define SEVHOP_ADOPT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef _FORTIFY_SOURCE /* its inline wrappers of open() and others would collide with the definitions here */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

#define EXPORT __attribute__((visibility("default")))
#define PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#define likely(condition) __builtin_expect(!!(condition), 1)

/* ---- main.c ---- */

enum guest_context { CONTEXT_NONE, CONTEXT_SEV, CONTEXT_SEV_ES };

#define MEASUREMENT_SIZE 48 /* digest and nonce of LAUNCH_MEASURE, bytes */

/* The keeper's reply to `hello`, and the state of the hop. */
struct hop {
    bool keeper; /* a keeper is configured: this QEMU is the destination of a hop */
    enum guest_context context;
    bool source_ended;
    bool stops_at_reboot; /* the guest cannot be reset here: a reboot is a shutdown */
    uint32_t handle; /* the source's firmware handle, for query-sev */
    unsigned char measurement[MEASUREMENT_SIZE];
    atomic_bool machine_complete;
    atomic_bool finished;
};

extern struct hop hop;

/* True until the hop is over: files, sockets and memory may still be the source's. */
static inline bool hop_in_progress(void)
{
    return hop.keeper && !atomic_load_explicit(&hop.finished, memory_order_relaxed);
}

/* Guards the tables of all files. Recursive: an allocator that was preloaded as well may call back into mmap(). */
extern pthread_mutex_t adopt_lock;

const char *context_name(enum guest_context context);
void warn(const char *format, ...) PRINTF(1, 2); /* one line on stderr, errno is kept */
void fatal(const char *format, ...) PRINTF(1, 2) __attribute__((noreturn)); /* one line on stderr, exit status 1 */
void hand_over_stderr(void);
bool parse_number(const char *text, unsigned long long *number);
bool parse_hex(const char *text, unsigned char *bytes, size_t size);

/* ---- keeper.c ---- */

#define KEEPER_MESSAGE 4096 /* longest request or reply, bytes */

void keeper_connect(const char *where); /* path of its socket, or fd:N */
/*
 * One request, one reply (NUL-terminated in `reply`). A descriptor that came with it is in *fd, else -1.
 * Returns false when the keeper does not reply; during start-up it exits then.
 */
bool keeper_ask(char reply[KEEPER_MESSAGE], int *fd, const char *format, ...) PRINTF(3, 4);
/* Notifies the keeper that the guest is about to run here. Returns false when the keeper has revoked the start. */
bool keeper_notify_start(void);
bool source_has_ended(void); /* false: a thread of it is left, or the keeper gave no pidfd */
void keeper_close(void);

/* ---- domain.c ---- */

bool keeper_is_gone(const char *where); /* the hop is over, or was on another host: this QEMU is no destination */
void monitor_use(const char *path);     /* before the program starts */

/* ---- descriptors.c ---- */

void descriptors_each(void (*visit)(int fd, void *opaque), void *opaque); /* those above stderr's */

/* ---- save_image.c ---- */

void save_image_replace(void); /* if the source lives, and the keeper has a pipe for the stream */

/* ---- run_mark.c ---- */

/* The byte that is written, after which the guest may run: sevhop_qmp/run_mark.py reads it. */
enum run_mark {
    RUN_MARK_NOT = 0,      /* it has not run here */
    RUN_MARK_STARTING = 1, /* it runs here if the keeper takes the message */
    RUN_MARK_RAN = 2,      /* it runs here, or has */
};

void run_mark_use(int fd);
bool run_mark_write(enum run_mark state); /* false: it could not be written; without a mark nothing is written */
bool run_mark_ran(void);

/* ---- reboot_action.c ---- */

void reboot_action_keep(void); /* whatever a client sets from now on */

/* ---- reboot_mark.c ---- */

int reboot_mark_use(int fd); /* 0, or a negative errno; fd stays the caller's */

/* ---- libc.c ---- */

struct libc {
    int (*ioctl)(int, unsigned long, ...);
    int (*memfd_create)(const char *, unsigned int);
    int (*ftruncate)(int, off64_t);
    int (*fallocate)(int, int, off64_t, off64_t);
    int (*fcntl)(int, int, ...);
    void *(*mmap)(void *, size_t, int, int, int, off64_t);
    int (*munmap)(void *, size_t);
    int (*mprotect)(void *, size_t, int);
    int (*madvise)(void *, size_t, int);
    int (*mlockall)(int);
    ssize_t (*readv)(int, const struct iovec *, int);
    int (*open)(const char *, int, ...);
    FILE *(*fopen)(const char *, const char *);
    int (*fadvise)(int, off64_t, off64_t, int);
    int (*bind)(int, const struct sockaddr *, socklen_t);
    int (*unlink)(const char *);
    int (*listen)(int, int);
    int (*accept)(int, struct sockaddr *, socklen_t *);
    int (*accept4)(int, struct sockaddr *, socklen_t *, int);
};

extern struct libc libc_functions;
void find_libc_functions(void);

/* Other libraries' constructors may call us before our own constructor has run: resolve the functions then. */
static inline const struct libc *libc(void)
{
    if (!likely(libc_functions.ioctl))
        find_libc_functions();
    return &libc_functions;
}

/* ---- memory.c ---- */

enum ram_state { RAM_NONE, RAM_PRIVATE, RAM_SHARED };

struct memory_counts {
    int mappings;
    int64_t bytes;
};

enum ram_state memory_state(void);
const char *memory_state_name(void);
int memory_share_ahead(void); /* what can be done before memory_share(); 0, or a negative errno; may be called again */
int memory_share(void); /* 0, or a negative errno; may be called again */
struct memory_counts memory_count(void);
void memory_each(void (*visit)(void *opaque, const char *name, int64_t size, uint64_t inode), void *opaque);
void memory_lock_pages(void); /* does what mlockall() was asked for during the hop */

/* ---- stream.c ---- */

int stream_await(int fd, uint64_t header_size); /* 0, or a negative errno */
void stream_forget(void);
bool stream_waits(void); /* QEMU has read the header, and waits for the state */

/* ---- listeners.c ---- */

int listeners_adopted(void);
void listeners_serve(void); /* the hop is over: clients find this process */

/* ---- files.c ---- */

bool pid_file_unlink(const char *path); /* true: this was our pid file, which has another name now, and it is gone */

/* ---- taps.c ---- */

void taps_find_shared(void); /* before QEMU has opened anything */
int tap_ioctl(int fd, unsigned long request, void *argument);
void taps_apply(void); /* the guest is the source's no more: makes the settings that were deferred */
int taps_deferred(void); /* settings */

/* ---- kvm.c ---- */

bool kvm_vm_exists(void);
int kvm_vm_fd(void);
int kvm_vm_type(void);
bool kvm_vm_is_dead(void);

/* ---- sev.c ---- */

struct kvm_sev_cmd;
struct kvm_enc_region;

struct move {
    int error; /* of the ioctl that moves the context; 0: moved */
    int vcpus; /* vCPUs whose CPUID was set again */
    int registers; /* vCPUs whose deferred registers were set */
    int restore_error; /* of either of these, or of masking NMIs */
};

int sev_command(int vm, unsigned long request, struct kvm_sev_cmd *command);
int sev_register_region(int vm, unsigned long request, struct kvm_enc_region *region);
int sev_unregister_region(int vm, unsigned long request, struct kvm_enc_region *region);
void sev_check_launch(void); /* once the machine is complete: does the command line ask for the guest that was adopted? */
struct move sev_move_from(int source_vm);
bool sev_moved(void);
int sev_emulated_commands(void);
int sev_deferred_regions(void);

/* ---- registers.c ---- */

struct kvm_cpuid2;
struct kvm_mp_state;
struct kvm_vcpu_events;

void vcpu_created(int vcpu);
int vcpu_set_cpuid(int vcpu, unsigned long request, struct kvm_cpuid2 *cpuid);
int vcpu_set_registers(int vcpu, unsigned long request, void *registers);
int vcpu_get_registers(int vcpu, unsigned long request, void *registers);
int vcpu_set_mp_state(int vcpu, unsigned long request, struct kvm_mp_state *state);
int vcpu_set_events(int vcpu, unsigned long request, struct kvm_vcpu_events *events);
int vcpu_get_events(int vcpu, unsigned long request, struct kvm_vcpu_events *events);
void vcpus_restore(struct move *move);
int vcpus_count(void);
int vcpus_deferred(void);

/* ---- protected_state.c ---- */

void protected_state_launch(void);
void protected_state_launched(void);
size_t protected_state_offset(void); /* of the flag in QEMU's KVMState; 0: there is none */
void protected_state_finish(void);

/* ---- realtime.c ---- */

void realtime_record(void); /* all threads, for realtime_reset() */
void realtime_reset(void); /* all threads; the first one, which starts the guest, a moment later */

/* ---- cpu_properties.c ---- */

void cpu_properties_shorten(void); /* in the answer to qom-list, until the hop is over */

/* ---- announce.c ---- */

/* What clients were informed of: the guest is reported in this state. */
enum announced { ANNOUNCED_NONE, ANNOUNCED_PAUSED, ANNOUNCED_RUNNING };

const char *announce_missing(void); /* what this QEMU lacks for it; NULL: nothing */
bool waits_for_state(void); /* QEMU does; only if nothing is missing */
void announce_start(void); /* only if nothing is missing */
bool announce_made(void);
const char *announce_state_name(void);
/* Around the move of an SEV context: if the guest is to run, its images are activated before, and it runs after. */
bool announce_activate_images(void);
void announce_run(void);
void announce_finish(void);

/* ---- device_events.c ---- */

void device_events_record(void); /* what clients are about to ask for */
void device_events_send(void); /* the hop is over: what has changed */

/* ---- commands.c ---- */

const char *reason_against_running(void); /* NULL: the guest may run here */
bool is_qemu(void);
void commands_install(void);

#endif
