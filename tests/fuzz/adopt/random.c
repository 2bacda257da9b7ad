/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Inputs for compilers without libFuzzer: random.c SEED COUNT [FILE...]
 * First the files, then COUNT inputs that are made from a seed, the same each time.
 */
#include "world.h"

#include <stdlib.h>
#include <string.h>

static uint64_t state;

/* xorshift64* */
static uint32_t number(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1dULL) >> 32);
}

static void run_file(const char *path)
{
    uint8_t bytes[8192];
    FILE *file = fopen(path, "rb");
    size_t size;

    demand(file);
    size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, size);
}

int main(int count, char **arguments)
{
    uint8_t bytes[512];
    unsigned long inputs;

    demand(count >= 3);
    state = strtoull(arguments[1], NULL, 10) * 2 + 1;
    inputs = strtoul(arguments[2], NULL, 10);
    for (int i = 3; i < count; i++)
        run_file(arguments[i]);
    for (unsigned long i = 0; i < inputs; i++) {
        size_t size = number() % sizeof bytes;

        for (size_t j = 0; j < size; j++)
            bytes[j] = (uint8_t)(number() % 4 ? number() : number() % 8);
        /* What a keeper sends first is as it should be, mostly: otherwise nothing comes after it. */
        if (number() % 8)
            for (size_t j = 0; j < size && j < 8; j++)
                bytes[j] = (uint8_t)(3 + number() % 5);
        LLVMFuzzerTestOneInput(bytes, size);
    }
    printf("%lu inputs\n", inputs + (unsigned long)(count - 3));
    return 0;
}
