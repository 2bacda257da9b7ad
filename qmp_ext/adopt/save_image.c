/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The save image: the file that libvirt passes to a destination, to read the stream from. If the guest still runs in
 * another QEMU, the file may end after libvirt's own header and XML; then the stream comes from a pipe of the keeper.
 *
 * The pipe takes the file's place, at the same number, before QEMU looks at it: newer versions refuse a stream that is
 * a file (migration/fd.c). The file is found by device and inode, since the keeper does not know the number.
 */
#include "adopt.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct search {
    unsigned long long device, inode;
    int pipe;
    int replaced; /* descriptors */
};

static void replace(int fd, void *opaque)
{
    struct search *search = opaque;
    struct stat file;

    if (fstat(fd, &file) < 0 || file.st_dev != search->device || file.st_ino != search->inode)
        return;
    if (dup3(search->pipe, fd, O_CLOEXEC) < 0)
        fatal("cannot replace the save image by the keeper's pipe: %s", strerror(errno));
    search->replaced++;
}

/* "fd DEVICE INODE" */
static bool parse_reply(char *reply, struct search *search)
{
    char *rest = NULL, *word = strtok_r(reply, " ", &rest), *device = strtok_r(NULL, " ", &rest),
         *inode = strtok_r(NULL, " ", &rest);

    return word && device && inode && !*rest && !strcmp(word, "fd") && parse_number(device, &search->device) &&
           parse_number(inode, &search->inode);
}

void save_image_replace(void)
{
    char reply[KEEPER_MESSAGE], copy[KEEPER_MESSAGE];
    struct search search = {.pipe = -1};
    struct stat file;

    /* The file has the whole stream, and the guest waits for it. */
    if (hop.source_ended)
        return;
    keeper_ask(reply, &search.pipe, "stream");
    /* An error: a keeper that does not know the request has no stream. */
    if (!strcmp(reply, "none") || !strncmp(reply, "error ", 6))
        return;
    strcpy(copy, reply);
    if (!parse_reply(copy, &search))
        fatal("invalid reply of the keeper about the stream: %s", reply);
    if (search.pipe < 0 || fstat(search.pipe, &file) < 0 || !S_ISFIFO(file.st_mode))
        fatal("invalid reply of the keeper: the descriptor of the stream is not a pipe");
    descriptors_each(replace, &search);
    if (!search.replaced)
        fatal("the save image is not open in this QEMU: device %llu, inode %llu", search.device, search.inode);
    close(search.pipe);
}
