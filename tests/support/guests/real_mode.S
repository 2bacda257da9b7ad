/*
 * The bare-metal counter for SEV guests in the lab: the same as counter.S, but it never leaves real mode.
 *
 * Entering protected mode is an exit that KVM must emulate if the processor does not report which register was written
 * (the lab's does not), and of an encrypted guest KVM emulates nothing. For the same reason there is no `cpuid`, no
 * `rdmsr`, no `hlt`: `in` and `out` of a register are all that leaves the guest. It runs on any other machine as well.
 *
 * Serial port COM1: as counter.S: START, numbers from 00000001, BAD and an address.
 *
 * Guest-physical memory (the guest needs 1 MiB):
 *   0x08000        this program, copied here at the start, so that it runs without its ROM
 *   0x09000        u64, the counter; it always grows (two 32-bit additions: not atomic for somebody who looks on)
 *   0x09008        u32, the number of the last line
 *   0x0900c        u32, how many BAD lines there were
 *   0x09010        u32, MAGIC once it counts
 *   0x20000        384 KiB of a pattern, different in every page. With each line one page is checked and written again
 *                  in the next generation.
 *
 * The low half of the counter, the generation and the next page are in registers only (esi, ebp, fs).
 */

#define ROM_SEGMENT     0xf000          /* where the image is mapped below 1 MiB */
#define STACK           0x7000
#define PROGRAM         0x8000
#define PROGRAM_SIZE    0x1000
#define COUNTER         0x9000
#define LINE            0x9008
#define BAD_LINES       0x900c
#define MAGIC_AT        0x9010
#define LAST_TIME       0x9014          /* u16, reading of the timer at the last line */
#define PATTERN_SEGMENT 0x2000
#define PATTERN_END_SEGMENT 0x8000

#include "counting.inc"

        .text
        .code16
        .org 0
start:
        cli
        cld
        movw    $ROM_SEGMENT, %ax
        movw    %ax, %ds
        xorw    %ax, %ax
        movw    %ax, %es
        movw    %ax, %ss
        movw    $STACK, %sp
        xorw    %si, %si
        movw    $PROGRAM, %di
        movw    $(PROGRAM_SIZE / 4), %cx
        rep movsl
        ljmp    $0, $(PROGRAM + in_ram - start)

in_ram:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    $(PROGRAM + start_line - start), %bx
        call    put_string

        /* Generation 0 of the pattern: each word of a page holds the page's address. */
        movw    $PATTERN_SEGMENT, %bx
1:      movw    %bx, %es
        movzwl  %bx, %eax
        shll    $4, %eax
        xorw    %di, %di
        movw    $(PAGE / 4), %cx
        rep stosl
        addw    $(PAGE >> 4), %bx
        cmpw    $PATTERN_END_SEGMENT, %bx
        jb      1b

        start_counting
        movw    $PATTERN_SEGMENT, %ax
        movw    %ax, %fs
        clear_results si

        count_for_a_line
        movw    %fs, %bx
        movw    %bx, %es
        movzwl  %bx, %ebx
        shll    $4, %ebx                /* the page's address */
        movl    %ebp, %eax
        xorl    %ebx, %eax
        xorw    %di, %di
        movw    $(PAGE / 4), %cx
        repe scasl
        je      3f
        movzwl  %di, %edx
        leal    -4(%ebx, %edx), %edx
        call    put_bad
3:
        leal    GENERATION_STEP(%ebp), %eax
        xorl    %ebx, %eax
        xorw    %di, %di
        movw    $(PAGE / 4), %cx
        rep stosl
        movw    %fs, %bx
        addw    $(PAGE >> 4), %bx
        cmpw    $PATTERN_END_SEGMENT, %bx
        jb      4f
        movw    $PATTERN_SEGMENT, %bx
        addl    $GENERATION_STEP, %ebp
4:      movw    %bx, %fs

        print_line

/* "BAD" and the address in edx. Changes eax. */
put_bad:
        incl    BAD_LINES
        pushl   %ebx
        movw    $(PROGRAM + bad_mark - start), %bx
        call    put_string
        call    put_hex
        popl    %ebx
        movb    $NEWLINE, %al
        jmp     put_char

        define_printing bx, dx
        .org    PROGRAM_SIZE            /* an error if the program is longer */

/*
 * What QEMU looks for in the firmware of a SEV-ES guest, whose further processors must know where to start: a table of
 * entries (content, length, GUID) that ends 32 bytes before the image does, and begins with its own at the end.
 */
        .org    0x10000 - 32 - 22 - 18
reset_vector_of_other_processors:
        .long   0xfffffff0
        .word   22
        .long   0x00f771de              /* GUID 00f771de-1a7e-4fcb-890e-68c77e2fb44e */
        .word   0x1a7e, 0x4fcb
        .byte   0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e
table:
        .word   22 + 18
        .long   0x96b582de              /* GUID 96b582de-1fb2-45f7-baea-a366c55a082d */
        .word   0x1fb2, 0x45f7
        .byte   0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d

        .org    0xfff0                  /* where the processor starts */
        ljmp    $ROM_SEGMENT, $0
        .org    0x10000
