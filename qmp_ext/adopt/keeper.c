/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The keeper: the process that has the source's VM, memory and sockets while one QEMU replaces the other.
 *
 * One AF_UNIX SOCK_SEQPACKET connection, made at start or inherited (SEVHOP_KEEPER is a path or fd:N); one ASCII
 * message per request and per reply:
 *   hello 1          ok context=none|sev|sev-es source=running|ended [handle=N] [measurement=HEX]
 *                      [reboot=shutdown]
 *                    error REASON
 *   memfd N NAME     fd SIZE, with the descriptor | none
 *   listener HEX     fd, with the descriptor      | none
 *   run-mark         fd, with the descriptor      | none
 *   source           fd, with the source's pidfd  | none
 *   stream           fd DEVICE INODE, with a pipe | none
 *   run              no reply: the guest is about to run
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <string.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define REPLY_TIMEOUT 10 /* seconds; the keeper replies from memory, and hangs if it takes longer */

static int connection = -1;
static int source = -1; /* its pidfd */
static pthread_mutex_t conversation = PTHREAD_MUTEX_INITIALIZER;

static bool send_request(const char *request, size_t length)
{
    ssize_t sent;

    do {
        sent = send(connection, request, length, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)length;
}

/* The descriptor that came with a message, -1 if none did. One of several, or one that is not wanted, is closed. */
static int take_descriptor(struct msghdr *message, bool wanted)
{
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    size_t count = 0;
    int fd = -1;

    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
        count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
        memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
        if (count > 1 || !wanted) {
            close(fd);
            fd = -1;
        }
    }
    return fd;
}

static bool receive_reply(char reply[KEEPER_MESSAGE], int *fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {reply, KEEPER_MESSAGE - 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t received;
    bool whole;

    do {
        received = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    } while (received < 0 && errno == EINTR);
    if (received <= 0) {
        if (!received)
            errno = ECONNRESET;
        return false;
    }
    reply[received] = '\0';
    whole = !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
    *fd = take_descriptor(&message, whole && !strncmp(reply, "fd", 2));
    if (!whole)
        errno = EPROTO;
    return whole;
}

bool keeper_ask(char reply[KEEPER_MESSAGE], int *fd, const char *format, ...)
{
    char request[KEEPER_MESSAGE];
    va_list arguments;
    bool answered;
    int length;

    *fd = -1;
    va_start(arguments, format);
    length = vsnprintf(request, sizeof request, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof request) {
        errno = EMSGSIZE;
        return false;
    }

    pthread_mutex_lock(&conversation);
    errno = ENOTCONN;
    answered = connection >= 0 && send_request(request, (size_t)length) && receive_reply(reply, fd);
    pthread_mutex_unlock(&conversation);

    /*
     * During start-up the process can exit without loss. Later it may have the guest already: only the request fails
     * then.
     */
    if (!answered) {
        if (!atomic_load(&hop.machine_complete))
            fatal("the keeper does not answer: %s", errno == EAGAIN ? "timed out" : strerror(errno));
        warn("the keeper does not answer: %s", strerror(errno));
    }
    return answered;
}

bool keeper_notify_start(void)
{
    bool sent;

    pthread_mutex_lock(&conversation);
    sent = connection >= 0 && send_request("run", 3);
    pthread_mutex_unlock(&conversation);
    return sent;
}

static bool parse_hello(const char *word)
{
    unsigned long long number;

    if (!strcmp(word, "context=none"))
        hop.context = CONTEXT_NONE;
    else if (!strcmp(word, "context=sev"))
        hop.context = CONTEXT_SEV;
    else if (!strcmp(word, "context=sev-es"))
        hop.context = CONTEXT_SEV_ES;
    else if (!strcmp(word, "source=running"))
        hop.source_ended = false;
    else if (!strcmp(word, "source=ended"))
        hop.source_ended = true;
    else if (!strcmp(word, "reboot=shutdown"))
        hop.stops_at_reboot = true;
    else if (!strncmp(word, "handle=", 7)) {
        if (!parse_number(word + 7, &number) || number > UINT32_MAX)
            return false;
        hop.handle = (uint32_t)number;
    } else if (!strncmp(word, "measurement=", 12))
        return parse_hex(word + 12, hop.measurement, sizeof hop.measurement);
    else
        return false;
    return true;
}

static void say_hello(void)
{
    char reply[KEEPER_MESSAGE], copy[KEEPER_MESSAGE], *rest = NULL, *word;
    bool context = false, source = false;
    int fd;

    keeper_ask(reply, &fd, "hello 1");
    if (fd >= 0)
        close(fd);
    if (!strncmp(reply, "error ", 6))
        fatal("cannot connect to the keeper: %s", reply + 6);
    strcpy(copy, reply);
    word = strtok_r(copy, " ", &rest);
    if (!word || strcmp(word, "ok"))
        fatal("invalid reply of the keeper: %s", reply);
    while ((word = strtok_r(NULL, " ", &rest))) {
        if (!parse_hello(word))
            fatal("invalid reply of the keeper: %s", reply);
        context |= !strncmp(word, "context=", 8);
        source |= !strncmp(word, "source=", 7);
    }
    if (!context || !source)
        fatal("invalid reply of the keeper: %s", reply);
}

/* A descriptor from the keeper, which the caller owns; -1 if it has none of that name. */
static int take(const char *name)
{
    char reply[KEEPER_MESSAGE];
    int fd, moved;

    keeper_ask(reply, &fd, "%s", name);
    if (fd < 0)
        return -1;
    moved = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (moved < 0)
        fatal("cannot duplicate the descriptor of the %s: %s", name, strerror(errno));
    close(fd);
    return moved;
}

bool source_has_ended(void)
{
    struct pollfd ended = {.fd = source, .events = POLLIN};

    return source >= 0 && poll(&ended, 1, 0) == 1 && (ended.revents & POLLIN);
}

static int reach(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd;

    if (strlen(path) >= sizeof address.sun_path)
        fatal("SEVHOP_KEEPER is too long for a socket: %s", path);
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fatal("cannot connect to the keeper at %s: %s", path, strerror(errno));
    return fd;
}

/* An inherited, connected socket: no other process can use it, and no path is needed. */
static int inherit(const char *text)
{
    unsigned long long number;
    int type = 0;
    socklen_t length = sizeof type;

    if (!parse_number(text, &number) || number > INT_MAX ||
        getsockopt((int)number, SOL_SOCKET, SO_TYPE, &type, &length) < 0 || type != SOCK_SEQPACKET)
        fatal("SEVHOP_KEEPER is not an open socket: fd:%s", text);
    return (int)number;
}

static void check_peer(int fd, const char *where)
{
    struct ucred peer;
    socklen_t length = sizeof peer;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
        fatal("the keeper at %s cannot be identified: %s", where, strerror(errno));
    if (peer.uid != 0 && peer.uid != geteuid())
        fatal("the keeper at %s belongs to user %u, not to root or to this QEMU's user", where, (unsigned int)peer.uid);
}

void keeper_connect(const char *where)
{
    struct timeval timeout = {.tv_sec = REPLY_TIMEOUT};
    int fd = strncmp(where, "fd:", 3) ? reach(where) : inherit(where + 3);

    check_peer(fd, where);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) < 0)
        fatal("cannot set a timeout for the keeper: %s", strerror(errno));
    /* Without stdio the socket may have got one of its numbers, which QEMU or the hop will use otherwise. */
    connection = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    if (connection < 0)
        fatal("cannot duplicate the keeper's socket: %s", strerror(errno));
    close(fd);
    hop.keeper = true;
    say_hello();
    run_mark_use(take("run-mark"));
    source = take("source");
}

void keeper_close(void)
{
    if (source >= 0)
        close(source);
    source = -1;
    pthread_mutex_lock(&conversation);
    if (connection >= 0)
        close(connection);
    connection = -1;
    pthread_mutex_unlock(&conversation);
}
