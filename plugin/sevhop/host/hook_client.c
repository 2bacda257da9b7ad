/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * libvirt's hook for a domain that is in a hop: passes the call on to the keeper of that hop.
 *
 *   hook_client DIRECTORY COMMAND... NAME OPERATION SUB-OPERATION EXTRA
 *
 * DIRECTORY is the keeper's. Its socket "hook" gets one message: libvirt's four arguments, separated by NULs, and with
 * it the descriptors of standard input, output and error. The keeper is a running Python, reads the domain's XML and
 * writes the changed one; its reply is one byte, the exit status. So the start of a Python adds nothing to the guest's
 * downtime (sevhop/libvirt/hook_server.py).
 *
 * If nobody listens there, COMMAND... NAME OPERATION SUB-OPERATION EXTRA is run instead.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define MESSAGE 4096 /* longest call, bytes */
#define ARGUMENTS 4 /* that libvirt passes */
#define PATIENCE 40 /* seconds until the keeper must have replied; its own timeout is shorter */

/* A connected socket, or -1. The name of a domain may be longer than the address of a socket. */
static int keeper_of(const char *directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "hook"};
    struct timeval patience = {.tv_sec = PATIENCE};
    int keeper;

    if (chdir(directory) < 0)
        return -1;
    keeper = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (keeper < 0 || connect(keeper, (struct sockaddr *)&address, sizeof address) < 0 || chdir("/") < 0)
        return -1;
    setsockopt(keeper, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return keeper;
}

/* The length of the message, or -1 if it is too long. */
static int join(char *message, char **words)
{
    size_t used = 0;

    for (int i = 0; i < ARGUMENTS; i++) {
        size_t length = strlen(words[i]) + 1;

        if (used + length > MESSAGE)
            return -1;
        memcpy(message + used, words[i], length);
        used += length;
    }
    return (int)used - 1; /* NULs only in between */
}

static int send_call(int keeper, char *message, int length)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(3 * sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(3 * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec text = {.iov_base = message, .iov_len = (size_t)length};
    struct msghdr call = {
        .msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.space};
    const int streams[] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO};

    memcpy(CMSG_DATA(&control.header), streams, sizeof streams);
    return sendmsg(keeper, &call, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

int main(int argc, char **argv)
{
    char message[MESSAGE];
    unsigned char status;
    int keeper, length;

    if (argc < 3 + ARGUMENTS) {
        fprintf(stderr, "usage: hook_client DIRECTORY COMMAND... NAME OPERATION SUB-OPERATION EXTRA\n");
        return 2;
    }
    length = join(message, argv + argc - ARGUMENTS);
    keeper = length < 0 ? -1 : keeper_of(argv[1]);
    if (keeper < 0) {
        execvp(argv[2], argv + 2);
        perror("sevhop: the hook cannot be run");
        return 1;
    }
    if (send_call(keeper, message, length) < 0 || recv(keeper, &status, 1, 0) != 1) {
        fprintf(stderr, "sevhop: the keeper of domain %s did not reply: try again\n", argv[argc - ARGUMENTS]);
        return 1;
    }
    return status;
}
