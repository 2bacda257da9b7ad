/*
 * The only program in the Linux guest: its init. It uses what a guest has, tick by tick, and prints on the serial port
 * whether it was all right:
 *
 *   START                            it begins; again: it was restarted
 *   ENCRYPTION features              what the kernel encrypts its memory with, if it does
 *   CPUS n                           so many processors are online
 *   WARNING text                     the kernel has warned of something (level "warning" or worse, see syslog(2))
 *   TICK n w=0 r=n ping=0 mem=0      n from 1, one more each time
 *        w     errno of writing n to the disk and flushing it (0: done), all over block n modulo the disk's size
 *        r     what was read back from there, past all caches
 *        ping  1 if the gateway did not answer within 5 seconds
 *        mem   how many words of its memory did not hold what it had written there
 *   UEFI-FOUND n                     at the start: the UEFI variable has the value n
 *   UEFI n                           the variable has been set to n (every 20 ticks, if it was started by UEFI)
 *   UEFI-FAILED e                    errno of an attempt to
 *   POWER-BUTTON                     it was pressed: the guest switches itself off
 *   EARLY n                          a pause was over n microseconds too soon
 *   RTC-BACK n                       the real-time clock went back, by n seconds
 *   TPM                              there is a TPM, and it works
 *   TPM-LOST n                       from tick n on it does not, or not with the registers that it had
 *
 * The ticks are made by its processors in turn, so that one that is lost stops the count.
 *
 * Whoever sends a line to it, on a serial line or a virtio port, hears "GOT" and the line; JSON is answered as a guest
 * agent answers `guest-sync` and `guest-ping`, and `guest-set-time`, at which it prints "CLOCK SET"; after a line "MUTE"
 * it does not answer that. If there is a watchdog it is armed, and fed at each tick until somebody prints "STARVE".
 *
 * Static, without a shell beside it: a tick is then some milliseconds also under emulation.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/rtc.h>
#include <linux/watchdog.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <syslog.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define TICK_MS 40                      /* pause between two ticks, on top of the work */
#define BLOCK 4096
#define MEMORY (8 << 20)                /* bytes that are checked, in turn */
#define CHUNK (128 << 10)               /* bytes of it in each tick */
#define WATCHDOG_SECONDS 8              /* without being fed */
#define PEERS 8                         /* serial lines and virtio ports, at most */
#define LONGEST_LINE 256
#define LONGEST_MESSAGE 8192            /* of the kernel */
#define UEFI_TICKS 20                   /* ticks between two writes of the variable */
#define POWER_BUTTON "/sys/firmware/acpi/interrupts/ff_pwr_btn" /* begins with how often it was pressed */
#define UEFI_VARIABLE "/uefi/SevhopTick-5e7c0de5-0b1e-4d7a-9a54-0f0e5ed1d0ad"

static int serial = -1;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One write for each line, so that nothing comes in between. */
static void say(const char *format, ...)
{
    char line[128];
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (write(serial, line, length) != length)
        _exit(1); /* without its serial port the guest can only end: the kernel panics */
}

static int64_t microseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static void pause_ms(long ms)
{
    struct timespec time = { ms / 1000, ms % 1000 * 1000000 };
    int64_t early = microseconds() + ms * 1000;

    nanosleep(&time, NULL);
    early -= microseconds();
    if (early > 0)
        say("EARLY %lld\n", (long long)early);
}

/* What the kernel has logged since the last call (Documentation/ABI/testing/dev-kmsg). */
static void look_at_messages(int messages)
{
    static const char features[] = "Memory Encryption Features active: ";
    char record[LONGEST_MESSAGE];
    ssize_t length;

    while ((length = read(messages, record, sizeof record - 1)) > 0 || (length < 0 && errno == EPIPE)) {
        const char *text, *encryption;

        if (length < 0)
            continue; /* some were overwritten before they were read */
        record[length] = 0;
        record[strcspn(record, "\n")] = 0;
        text = strchr(record, ';');
        if (!text++)
            continue;
        encryption = strstr(text, features);
        if (encryption)
            say("ENCRYPTION %.60s\n", encryption + strlen(features));
        else if (LOG_PRI(atoi(record)) <= LOG_WARNING)
            say("WARNING %.100s\n", text);
    }
}

/* The next processor from now on. One that has been unplugged is left out. */
static void change_processor(uint64_t tick, long processors)
{
    cpu_set_t next;

    CPU_ZERO(&next);
    CPU_SET(tick % processors, &next);
    sched_setaffinity(0, sizeof next, &next);
}

/* /modules/00.ko, 01.ko, ...: each after those that it needs. */
static void load_modules(void)
{
    for (int number = 0;; number++) {
        char path[32];
        int file;

        snprintf(path, sizeof path, "/modules/%02d.ko", number);
        file = open(path, O_RDONLY);
        if (file < 0)
            return;
        if (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST && errno != ENODEV)
            say("module %d: %s\n", number, strerror(errno));
        close(file);
    }
}

/* The disk; -1 if there is none. Its size in blocks goes to *blocks. */
static int open_disk(uint64_t *blocks)
{
    int disk = open("/dev/vda", O_RDWR | O_DIRECT);
    uint64_t bytes;

    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &bytes))
        return -1;
    *blocks = bytes / BLOCK;
    return disk;
}

/* Returns errno; *seen is what the disk holds afterwards. */
static int use_disk(int disk, uint64_t blocks, uint64_t tick, uint64_t *seen)
{
    static uint64_t buffer[BLOCK / sizeof(uint64_t)] __attribute__((aligned(BLOCK)));
    const size_t words = sizeof buffer / sizeof *buffer;
    off_t place = (off_t)(tick % blocks * BLOCK);

    *seen = 0;
    for (size_t i = 0; i < words; i++)
        buffer[i] = tick;
    if (pwrite(disk, buffer, BLOCK, place) != BLOCK || fsync(disk))
        return errno ? errno : EIO;
    memset(buffer, 0xff, sizeof buffer);
    if (pread(disk, buffer, BLOCK, place) != BLOCK)
        return errno ? errno : EIO;
    *seen = buffer[0];
    for (size_t i = 0; i < words; i++)
        if (buffer[i] != tick)
            *seen = buffer[i];
    return 0;
}

/* A raw socket on the configured network card; -1 if there is none. The addresses are those of QEMU's user network. */
static int open_network(void)
{
    struct timeval patience = { 5, 0 };
    struct ifreq request = { .ifr_name = "eth0" };
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    int plain = socket(AF_INET, SOCK_DGRAM, 0);
    int raw;

    address->sin_family = AF_INET;
    address->sin_addr.s_addr = inet_addr("10.0.2.15");
    if (ioctl(plain, SIOCSIFADDR, &request))
        return -1;
    address->sin_addr.s_addr = inet_addr("255.255.255.0");
    if (ioctl(plain, SIOCSIFNETMASK, &request))
        return -1;
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(plain, SIOCSIFFLAGS, &request))
        return -1;
    close(plain);
    raw = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
    setsockopt(raw, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return raw;
}

static uint16_t internet_checksum(const void *data, size_t words)
{
    const uint16_t *word = data;
    uint32_t sum = 0;

    while (words--)
        sum += *word++;
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~(sum + (sum >> 16));
}

/* 0 if the gateway answered this very request, otherwise 1. */
static int ping(int network, uint16_t sequence)
{
    struct sockaddr_in gateway = { .sin_family = AF_INET, .sin_addr.s_addr = inet_addr("10.0.2.2") };
    struct icmphdr request = { .type = ICMP_ECHO, .un.echo = { .id = htons(1), .sequence = htons(sequence) } };
    char packet[512];

    request.checksum = internet_checksum(&request, sizeof request / 2);
    if (sendto(network, &request, sizeof request, 0, (struct sockaddr *)&gateway, sizeof gateway) < 0)
        return 1;
    for (;;) {
        ssize_t length = recv(network, packet, sizeof packet, 0);
        const struct iphdr *ip = (const struct iphdr *)packet;
        const struct icmphdr *reply = (const struct icmphdr *)(packet + ip->ihl * 4);

        if (length < 0)
            return 1;
        if (reply->type == ICMP_ECHOREPLY && reply->un.echo.sequence == request.un.echo.sequence)
            return 0;
    }
}

static uint64_t *open_memory(void)
{
    int file = open("/tmp/memory", O_RDWR | O_CREAT, 0600);
    uint64_t *memory;

    if (file < 0 || ftruncate(file, MEMORY))
        return NULL;
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        return NULL;
    close(file);
    return memory;
}

static uint64_t pattern(size_t place, uint64_t generation)
{
    return (place + 1) * 0x9e3779b97f4a7c15 ^ generation;
}

/* Check the next chunk, write it again in the next generation: a stale page is seen as well as a foreign one. */
static unsigned use_memory(uint64_t *memory, uint64_t tick)
{
    const size_t words = CHUNK / sizeof *memory;
    const uint64_t chunks = MEMORY / CHUNK;
    uint64_t generation = (tick - 1) / chunks;
    size_t start = (tick - 1) % chunks * words;
    unsigned bad = 0;

    for (size_t place = start; place < start + words; place++) {
        bad += memory[place] != pattern(place, generation);
        memory[place] = pattern(place, generation + 1);
    }
    return bad;
}

struct uefi_variable {
    uint32_t attributes;
    uint64_t value;
} __attribute__((packed));

static void find_uefi_variable(void)
{
    struct uefi_variable variable;
    int file = open(UEFI_VARIABLE, O_RDONLY);

    if (file >= 0 && read(file, &variable, sizeof variable) == sizeof variable)
        say("UEFI-FOUND %llu\n", (unsigned long long)variable.value);
    close(file);
}

static void set_uefi_variable(uint64_t value)
{
    struct uefi_variable variable = { .attributes = 7, .value = value }; /* kept, and visible at all times */
    int file = open(UEFI_VARIABLE, O_RDONLY);
    int flags = 0; /* Linux protects variables that it does not know: take that away */

    if (file >= 0) {
        ioctl(file, FS_IOC_SETFLAGS, &flags);
        close(file);
    }
    file = open(UEFI_VARIABLE, O_WRONLY | O_CREAT, 0600);
    if (file < 0 || write(file, &variable, sizeof variable) != sizeof variable)
        say("UEFI-FAILED %d\n", errno);
    else
        say("UEFI %llu\n", (unsigned long long)value);
    close(file);
}

static void look_at_clock(int clock)
{
    static time_t before;
    struct rtc_time now;
    struct tm broken_down = { 0 };
    time_t seconds;

    if (clock < 0 || ioctl(clock, RTC_RD_TIME, &now))
        return;
    memcpy(&broken_down, &now, sizeof now); /* struct tm begins with the same fields (rtc(4)) */
    seconds = timegm(&broken_down);
    if (seconds < before)
        say("RTC-BACK %lld\n", (long long)(before - seconds));
    before = seconds;
}

static int watchdog = -1;

static void arm_watchdog(int seconds)
{
    if (watchdog < 0)
        watchdog = open("/dev/watchdog", O_WRONLY);
    if (watchdog >= 0 && ioctl(watchdog, WDIOC_SETTIMEOUT, &seconds))
        say("WATCHDOG-FAILED %d\n", errno);
}

struct peer {
    int file;
    size_t length;
    char line[LONGEST_LINE];
};

static struct peer peers[PEERS];
static unsigned peer_count;

static void open_peer(const char *name)
{
    struct termios settings;
    char path[300];
    int file;

    snprintf(path, sizeof path, "/dev/%s", name);
    file = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK);
    if (file < 0 || peer_count == PEERS)
        return;
    if (!tcgetattr(file, &settings)) {
        cfmakeraw(&settings); /* no echo */
        settings.c_cflag |= CLOCAL | CREAD;
        tcsetattr(file, TCSANOW, &settings);
    }
    peers[peer_count++].file = file;
}

static void open_peers(void)
{
    DIR *devices = opendir("/dev");
    struct dirent *entry;

    open_peer("ttyS0");
    open_peer("ttyS1");
    while (devices && (entry = readdir(devices)))
        if (!strncmp(entry->d_name, "vport", 5))
            open_peer(entry->d_name);
}

static void obey(int file, const char *line)
{
    char answer[LONGEST_LINE + 8];
    const char *id = strstr(line, "\"id\":");
    static int mute;
    int length;

    mute |= !strcmp(line, "MUTE");
    if (strstr(line, "\"guest-set-time\"")) {
        if (mute)
            return;
        say("CLOCK SET\n");
    }
    if (id)
        length = snprintf(answer, sizeof answer, "{\"return\":%lld}\n", atoll(id + 5));
    else
        length = snprintf(answer, sizeof answer, *line == '{' ? "{\"return\":{}}\n" : "GOT %s\n", line);
    if (write(file, answer, length) != length)
        say("an answer was not taken: %d\n", errno);
    if (!strcmp(line, "STARVE")) {
        arm_watchdog(1);
        watchdog = -1; /* it stays open, and nobody feeds it */
    }
}

static void answer_peers(void)
{
    for (struct peer *peer = peers; peer < peers + peer_count; peer++) {
        char byte;

        while (read(peer->file, &byte, 1) == 1) {
            if (byte != '\n' && byte != '\r') {
                if (peer->length < sizeof peer->line - 1)
                    peer->line[peer->length++] = byte;
            } else if (peer->length) {
                peer->line[peer->length] = 0;
                peer->length = 0;
                obey(peer->file, peer->line);
            }
        }
    }
}

/* What TPM2_PCR_Read and TPM2_PCR_Extend (TCG, "TPM 2.0 Library", part 3) say for register 16, bank SHA-256. */
static const uint8_t pcr_read[] = { 0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0xb, 3, 0, 0, 1 };
static const uint8_t pcr_extend[] = { 0x80, 2,    0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 16,  0, 0, 0,  9,
                                      0x40, 0, 0, 9, 0, 0,  0, 0, 0, 0,    0, 0, 1, 0, 0xb };

#define TPM_ATTEMPTS 3
#define PCR_SIZE 32
#define PCR_READ_ANSWER 62 /* bytes, the last ones are the register */

/* The length of the answer. The kernel gives up a command that takes too long, as it may on a busy host: once more then. */
static ssize_t transmit(int tpm, const void *command, size_t size, void *answer, size_t space)
{
    for (int attempt = 0;; attempt++) {
        ssize_t length = write(tpm, command, size);

        if (length == (ssize_t)size)
            length = read(tpm, answer, space);
        if (length > 0 || attempt == TPM_ATTEMPTS)
            return length;
    }
}

static int ask_tpm(int tpm, const void *command, size_t size, uint8_t answer[PCR_READ_ANSWER], ssize_t expected)
{
    uint8_t all[4096];
    ssize_t length = transmit(tpm, command, size, all, sizeof all);

    if (length < 10 || memcmp(all + 6, "\0\0\0", 4) || (expected && length != expected))
        return -1;
    if (expected)
        memcpy(answer, all, expected);
    return 0;
}

/* A register can only be extended: one that is not what it was is that of another TPM, or of another time. */
static void use_tpm(int tpm, uint64_t tick)
{
    static uint8_t before[PCR_SIZE];
    static int lost;
    uint8_t answer[PCR_READ_ANSWER], command[sizeof pcr_extend + PCR_SIZE] = { 0 };
    const uint8_t *pcr = answer + PCR_READ_ANSWER - PCR_SIZE;

    if (tpm < 0 || lost)
        return;
    lost = ask_tpm(tpm, pcr_read, sizeof pcr_read, answer, PCR_READ_ANSWER) ||
           (tick > 1 && memcmp(pcr, before, PCR_SIZE));
    memcpy(command, pcr_extend, sizeof pcr_extend);
    memcpy(command + sizeof pcr_extend, &tick, sizeof tick);
    lost = lost || ask_tpm(tpm, command, sizeof command, answer, 0) ||
           ask_tpm(tpm, pcr_read, sizeof pcr_read, answer, PCR_READ_ANSWER) || !memcmp(pcr, before, PCR_SIZE);
    memcpy(before, pcr, PCR_SIZE);
    if (lost)
        say("TPM-LOST %llu\n", (unsigned long long)tick);
    else if (tick == 1)
        say("TPM\n");
}

static int power_button_was_pressed(void)
{
    char line[64] = "";
    int file = open(POWER_BUTTON, O_RDONLY);

    if (file < 0)
        return 0;
    if (read(file, line, sizeof line - 1) < 0)
        line[0] = 0;
    close(file);
    return atoi(line) > 0;
}

int main(void)
{
    uint64_t blocks = 0, seen = 0;
    uint64_t *memory;
    long processors;
    int messages, disk, network, uefi, clock, tpm;

    mkdir("/dev", 0755);
    mkdir("/tmp", 0700);
    mkdir("/uefi", 0700);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    serial = open("/dev/ttyS0", O_WRONLY | O_NOCTTY);
    say("START\n");
    messages = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
    load_modules();
    uefi = !mount("efivarfs", "/uefi", "efivarfs", 0, NULL);
    if (uefi)
        find_uefi_variable();
    disk = open_disk(&blocks);
    network = open_network();
    memory = open_memory();
    clock = open("/dev/rtc0", O_RDONLY);
    tpm = open("/dev/tpm0", O_RDWR);
    open_peers();
    arm_watchdog(WATCHDOG_SECONDS);
    look_at_messages(messages);
    processors = sysconf(_SC_NPROCESSORS_ONLN);
    say("CPUS %ld\n", processors);
    for (size_t place = 0; memory && place < MEMORY / sizeof *memory; place++)
        memory[place] = pattern(place, 0);

    for (uint64_t tick = 1;; tick++) {
        int write_error = disk < 0 ? ENODEV : use_disk(disk, blocks, tick, &seen);
        int unanswered = network < 0 || ping(network, (uint16_t)tick);
        unsigned bad = memory ? use_memory(memory, tick) : 1;

        say("TICK %llu w=%d r=%llu ping=%d mem=%u\n", (unsigned long long)tick, write_error, (unsigned long long)seen,
            unanswered, bad);
        if (uefi && tick % UEFI_TICKS == 0)
            set_uefi_variable(tick);
        look_at_messages(messages);
        look_at_clock(clock);
        use_tpm(tpm, tick);
        answer_peers();
        if (watchdog >= 0 && ioctl(watchdog, WDIOC_KEEPALIVE, 0))
            say("WATCHDOG-FAILED %d\n", errno);
        if (power_button_was_pressed()) {
            say("POWER-BUTTON\n");
            reboot(RB_POWER_OFF);
        }
        change_processor(tick, processors);
        pause_ms(TICK_MS);
    }
}
