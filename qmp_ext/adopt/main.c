/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What this process is, its environment, and how failures are reported.
 *
 * The library is configured by the environment of the destination:
 *   SEVHOP_KEEPER  the keeper's socket, a path or fd:N; without it nothing is adopted, and the commands report that
 *   SEVHOP_MONITOR  where a destination that libvirt has started opens a monitor for the keeper
 *   SEVHOP_IMAGE   in the XML of a save image without the guest's RAM, which only libvirt's hook may have restored
 *   SEVHOP_STDERR  a descriptor that becomes stderr when the hop is over; until then stderr is read by the command
 */
#include "adopt.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct hop hop;
pthread_mutex_t adopt_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static int later_stderr = -1;

/* Quoted text may have control characters in it, which must not reach a terminal; it stays one line. */
static void print_line(const char *format, va_list arguments)
{
    char line[1024] = "sevhop adopt: ";
    size_t length = strlen(line);

    vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    for (length = 0; line[length]; length++)
        if ((unsigned char)line[length] < ' ' || line[length] == 0x7f)
            line[length] = '?';
    line[length++] = '\n';
    if (write(STDERR_FILENO, line, length) < 0) {
        /* There is nowhere else to report it. */
    }
}

void warn(const char *format, ...)
{
    int saved = errno;
    va_list arguments;

    va_start(arguments, format);
    print_line(format, arguments);
    va_end(arguments);
    errno = saved;
}

/* _exit, not exit: QEMU's exit handlers would remove sockets and files that are still the source's. */
void fatal(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    print_line(format, arguments);
    va_end(arguments);
    _exit(1);
}

const char *context_name(enum guest_context context)
{
    switch (context) {
    case CONTEXT_SEV:
        return "sev";
    case CONTEXT_SEV_ES:
        return "sev-es";
    default:
        return "none";
    }
}

/*
 * Own parsers: newer headers redirect strtoul() and sscanf() to symbols that the C library of an older Debian, under
 * which the destination may run, does not have.
 */
bool parse_number(const char *text, unsigned long long *number)
{
    unsigned long long value = 0;

    if (!*text)
        return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > (ULLONG_MAX - 9) / 10)
            return false;
        value = value * 10 + (unsigned long long)(*text - '0');
    }
    *number = value;
    return true;
}

static int hex_digit(char digit)
{
    if (digit >= '0' && digit <= '9')
        return digit - '0';
    if (digit >= 'a' && digit <= 'f')
        return digit - 'a' + 10;
    if (digit >= 'A' && digit <= 'F')
        return digit - 'A' + 10;
    return -1;
}

bool parse_hex(const char *text, unsigned char *bytes, size_t size)
{
    if (strlen(text) != 2 * size)
        return false;
    for (size_t i = 0; i < size; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);

        if (high < 0 || low < 0)
            return false;
        bytes[i] = (unsigned char)(high << 4 | low);
    }
    return true;
}

/* QEMU's children are no destinations: removes this library, and only it, from LD_PRELOAD. */
static void clean_environment(void)
{
    const char *preload = getenv("LD_PRELOAD");
    Dl_info self;

    unsetenv("SEVHOP_KEEPER");
    unsetenv("SEVHOP_MONITOR");
    unsetenv("SEVHOP_STDERR");
    if (!preload || !dladdr((void *)clean_environment, &self))
        return;

    char *entries = strdup(preload), *kept = calloc(1, strlen(preload) + 1), *rest = NULL;

    if (!entries || !kept)
        fatal("out of memory");
    for (char *entry = strtok_r(entries, ": ", &rest); entry; entry = strtok_r(NULL, ": ", &rest)) {
        if (!strcmp(entry, self.dli_fname))
            continue;
        if (*kept)
            strcat(kept, ":");
        strcat(kept, entry);
    }
    if (*kept)
        setenv("LD_PRELOAD", kept, 1);
    else
        unsetenv("LD_PRELOAD");
    free(entries);
    free(kept);
}

static void use_stderr(const char *text)
{
    unsigned long long number;

    if (!parse_number(text, &number) || number > INT_MAX || fcntl((int)number, F_SETFD, FD_CLOEXEC) < 0)
        fatal("SEVHOP_STDERR is not an open descriptor: %s", text);
    later_stderr = (int)number;
}

void hand_over_stderr(void)
{
    if (later_stderr < 0)
        return;
    if (dup3(later_stderr, STDERR_FILENO, 0) < 0)
        warn("cannot redirect stderr to where the old QEMU's went: %s", strerror(errno));
    close(later_stderr);
    later_stderr = -1;
}

__attribute__((constructor)) static void start(void)
{
    const char *keeper = getenv("SEVHOP_KEEPER"), *standard_error = getenv("SEVHOP_STDERR");
    const char *own_monitor = getenv("SEVHOP_MONITOR");

    if (!is_qemu())
        return; /* for example a wrapper script's shell: the QEMU that it starts needs the environment unchanged */
    if (keeper && getenv("SEVHOP_IMAGE"))
        fatal("the save image of a hop has no RAM, and was restored without the hook of sevhop: run sevhop install");
    if (keeper && keeper_is_gone(keeper)) {
        clean_environment();
        return;
    }
    if (keeper && own_monitor)
        monitor_use(own_monitor);
    if (standard_error)
        use_stderr(standard_error);
    if (keeper) {
        keeper_connect(keeper);
        save_image_replace();
        taps_find_shared();
    }
    clean_environment();
    commands_install();
}
