/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Listening sockets (monitors, serial consoles, VNC) of the source: the same command line makes the destination listen
 * at the same addresses, where the source still serves. It gets the source's own sockets instead, so that a client can
 * always connect. Only the source accepts until the hop is over.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_ADDRESS sizeof(struct sockaddr_storage)

/* The keeper's reply for an address. unlink() comes before bind(): the reply is for both. */
struct listener {
    struct listener *next;
    unsigned char address[MAX_ADDRESS];
    socklen_t length;
    bool of_source;
    int fd; /* the source's socket while QEMU has no descriptor of it; -1 otherwise */
    bool taken;
    ino_t inode;
    int number, backlog; /* QEMU's arguments of listen(), of a taken one; -1 before */
    ino_t substitute; /* inode of what replaces it at its number while a client waits for the source; 0: nothing does */
    int other_end; /* of the substitute */
};

static struct listener *listeners;

/*
 * As getsockname() returns it in the source: path, one NUL, nothing after it. Abstract names and IP addresses are exact
 * as they are.
 */
static socklen_t kernel_length(const struct sockaddr *address, socklen_t length)
{
    const struct sockaddr_un *local = (const struct sockaddr_un *)address;
    const size_t start = offsetof(struct sockaddr_un, sun_path);

    if (address->sa_family != AF_UNIX || length <= start || !local->sun_path[0])
        return length;
    return (socklen_t)(start + strnlen(local->sun_path, length - start) + 1);
}

static bool is_listening(int fd)
{
    int listening = 0;
    socklen_t length = sizeof listening;

    return !getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) && listening;
}

static void ask(struct listener *listener)
{
    char hex[2 * MAX_ADDRESS + 1], reply[KEEPER_MESSAGE];
    struct stat file;

    for (socklen_t i = 0; i < listener->length; i++)
        sprintf(hex + 2 * i, "%02x", listener->address[i]);
    listener->fd = listener->number = -1;
    if (!keeper_ask(reply, &listener->fd, "listener %s", hex) || !strcmp(reply, "none"))
        return;
    if (strcmp(reply, "fd") || listener->fd < 0)
        fatal("invalid reply of the keeper about a listening socket: %s", reply);
    if (!is_listening(listener->fd) || fstat(listener->fd, &file) < 0)
        fatal("invalid reply of the keeper: the descriptor is not a listening socket");
    listener->of_source = true;
    listener->inode = file.st_ino;
}

/* Called with adopt_lock held. */
static struct listener *find(const struct sockaddr *address, socklen_t length)
{
    struct listener *listener;
    unsigned char bytes[MAX_ADDRESS] = {0};

    if (length >= MAX_ADDRESS) /* the kernel accepts none that long; one more byte may be added below */
        return NULL;
    memcpy(bytes, address, length);
    length = kernel_length(address, length);
    for (listener = listeners; listener; listener = listener->next)
        if (listener->length == length && !memcmp(listener->address, bytes, length))
            return listener;
    listener = calloc(1, sizeof *listener);
    if (!listener)
        fatal("out of memory");
    memcpy(listener->address, bytes, length);
    listener->length = length;
    ask(listener);
    listener->next = listeners;
    listeners = listener;
    return listener;
}

static bool may_be_served(int fd, const struct sockaddr *address, socklen_t length)
{
    int type = 0;
    socklen_t size = sizeof type;

    return hop_in_progress() && length > sizeof(sa_family_t) &&
           (address->sa_family == AF_UNIX || address->sa_family == AF_INET || address->sa_family == AF_INET6) &&
           !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_STREAM;
}

static int take(struct listener *listener, int fd)
{
    int flags = fcntl(fd, F_GETFD);

    if (listener->taken) {
        errno = EADDRINUSE;
        return -1;
    }
    if (flags < 0 || dup3(listener->fd, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0)
        return -1;
    close(listener->fd);
    listener->fd = -1;
    listener->taken = true;
    return 0;
}

EXPORT int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    struct listener *listener;
    int saved = errno, result = 1;

    if (may_be_served(fd, address, length)) {
        pthread_mutex_lock(&adopt_lock);
        listener = find(address, length);
        if (listener && listener->of_source)
            result = take(listener, fd);
        pthread_mutex_unlock(&adopt_lock);
    }
    if (result <= 0)
        return result;
    errno = saved;
    return libc()->bind(fd, address, length);
}

/* QEMU unlinks a socket's path before it binds, and when it exits: not while the source listens there. */
static bool is_served_path(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct listener *listener;
    struct stat file;
    bool served;

    if (strlen(path) >= sizeof address.sun_path || lstat(path, &file) < 0 || !S_ISSOCK(file.st_mode))
        return false;
    strcpy(address.sun_path, path);
    pthread_mutex_lock(&adopt_lock);
    listener = find((struct sockaddr *)&address, sizeof address);
    served = listener && listener->of_source;
    pthread_mutex_unlock(&adopt_lock);
    return served;
}

EXPORT int unlink(const char *path)
{
    int saved = errno;

    if (hop_in_progress() && is_served_path(path))
        return 0;
    errno = saved;
    return pid_file_unlink(path) ? 0 : libc()->unlink(path);
}

/* By inode: a number may have been closed and used again. */
static struct listener *gated(int fd)
{
    struct listener *listener = NULL;
    int saved = errno;
    struct stat file;

    if (hop_in_progress() && !fstat(fd, &file) && S_ISSOCK(file.st_mode)) {
        pthread_mutex_lock(&adopt_lock);
        for (listener = listeners; listener; listener = listener->next)
            if (listener->of_source && listener->inode == file.st_ino)
                break;
        pthread_mutex_unlock(&adopt_lock);
    }
    errno = saved;
    return listener;
}

/*
 * It listens already. SO_PEERCRED returns to clients the process that called listen() last (unix(7)), which has to be
 * the source until the hop is over: so the call is deferred until then.
 */
EXPORT int listen(int fd, int backlog)
{
    struct listener *listener = gated(fd);

    if (!listener)
        return libc()->listen(fd, backlog);
    pthread_mutex_lock(&adopt_lock);
    listener->number = fd;
    listener->backlog = backlog;
    pthread_mutex_unlock(&adopt_lock);
    return 0;
}

static bool is_inode(int fd, ino_t inode)
{
    struct stat file;

    return !fstat(fd, &file) && file.st_ino == inode;
}

/*
 * A client waits for the source to accept it: until then QEMU's poll() would return at once, again and again. So the
 * number gets, until the hop is over, a socket that never becomes readable (its other end is open and unused).
 */
static void mute(struct listener *listener, int fd)
{
    int pair[2], flags = fcntl(fd, F_GETFD);
    struct stat file;

    pthread_mutex_lock(&adopt_lock);
    if (listener->number == fd && !listener->substitute && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
        listener->fd = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
        if (listener->fd >= 0 && !fstat(pair[0], &file) && dup3(pair[0], fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) >= 0) {
            listener->substitute = file.st_ino;
            listener->other_end = pair[1];
        } else {
            close(pair[1]);
        }
        close(pair[0]);
    }
    pthread_mutex_unlock(&adopt_lock);
}

static bool refuse_client(int fd)
{
    struct listener *listener = gated(fd);

    if (!listener)
        return false;
    mute(listener, fd);
    errno = EAGAIN;
    return true;
}

EXPORT int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    if (refuse_client(fd))
        return -1;
    return libc()->accept4(fd, address, length, flags);
}

EXPORT int accept(int fd, struct sockaddr *address, socklen_t *length)
{
    if (refuse_client(fd))
        return -1;
    return libc()->accept(fd, address, length);
}

int listeners_adopted(void)
{
    int count = 0;

    pthread_mutex_lock(&adopt_lock);
    for (struct listener *listener = listeners; listener; listener = listener->next)
        count += listener->taken;
    pthread_mutex_unlock(&adopt_lock);
    return count;
}

/* Called with adopt_lock held. */
static void serve(struct listener *listener)
{
    int flags = fcntl(listener->number, F_GETFD);

    if (listener->substitute) {
        if (is_inode(listener->number, listener->substitute) &&
            dup3(listener->fd, listener->number, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0)
            warn("cannot restore a listening socket: %s", strerror(errno));
        close(listener->other_end);
        listener->substitute = 0;
    }
    if (is_inode(listener->number, listener->inode))
        libc()->listen(listener->number, listener->backlog);
}

/* The hop is over: this process serves what was taken from now on, the rest is closed. */
void listeners_serve(void)
{
    pthread_mutex_lock(&adopt_lock);
    for (struct listener *listener = listeners; listener; listener = listener->next) {
        if (listener->number >= 0)
            serve(listener);
        if (listener->fd >= 0) {
            close(listener->fd);
            listener->fd = -1;
        }
    }
    pthread_mutex_unlock(&adopt_lock);
}
