/*
 * The bare-metal counter: a firmware image (-bios, 64 KiB) that counts and checks its own memory for ever. With IDLE defined
 * it counts less and waits for the timer's interrupts, as most guests do most of the time.
 *
 * Serial port COM1:
 *   START          once, when it begins; a second START means that the guest was restarted
 *   0000002a       the number of the line (hexadecimal, from 1), one more in every line, a line every 10 ms
 *   BAD aaaaaaaa   the memory at this address does not hold what was written there
 *
 * Guest-physical memory (the guest needs 16 MiB):
 *   0x100000       this program, copied here at the start, so that it runs without its ROM
 *   0x200000       u64, the counter; it always grows (two 32-bit additions: not atomic for somebody who looks on)
 *   0x200008       u32, the number of the last line
 *   0x20000c       u32, how many BAD lines there were
 *   0x200010       u32, MAGIC once it counts
 *   0x400000       1 MiB of a pattern, different in every page. With each line one page is checked and written again in
 *                  the next generation, so that a stale page is seen as well as a foreign one.
 *
 * The low half of the counter and the generation are also kept in registers: memory and vCPU state reach the next
 * VMM by different ways and must fit together afterwards.
 *
 * Without IDLE nothing but `in` and `out` leaves the guest on purpose: it also runs where no other instruction can be
 * intercepted, and slowly (string instructions where possible) where KVM emulates every single instruction. There KVM does
 * not know `iret` in protected mode, so none is needed: an interrupt comes at one place only.
 */

#define ROM         0xffff0000          /* where the image is mapped, just below 4 GiB */
#define PROGRAM     0x00100000
#define COUNTER     0x00200000
#define LINE        0x00200008
#define BAD_LINES   0x0020000c
#define MAGIC_AT    0x00200010
#define LAST_TIME   0x00200014          /* u16, reading of the timer at the last line */
#define TICKS       0x00200018          /* u16, interrupts of the timer; only if IDLE is defined */
#define PATTERN     0x00400000
#define PATTERN_END 0x00500000
#define STACK       0x00007000

/* The local APIC, which has to let the interrupts of the PIC pass. */
#define APIC_SPURIOUS 0xfee000f0
#define APIC_ENABLED  0x1ff
#define APIC_LINT0    0xfee00350
#define FROM_PIC      0x700

#include "counting.inc"

/* Besides those of counting.inc, edi has a meaning all the time: the next page of the pattern. */

        .text
        .org 0
        .code16
start16:
        cli
        xorw    %ax, %ax
        lgdtl   %cs:(gdt_in_rom - start16)
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $0x08, $(ROM + start32 - start16)

        .code32
start32:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $STACK, %esp
        cld
        movl    $ROM, %esi
        movl    $PROGRAM, %edi
        movl    $(0x10000 / 4), %ecx
        rep movsl
        ljmpl   $0x08, $(PROGRAM + in_ram - start16)

in_ram:
        lgdtl   PROGRAM + gdt_in_ram - start16

        movl    $(PROGRAM + start_line - start16), %ebx
        call    put_string

        /* Generation 0 of the pattern: each word of a page holds the page's address. */
        movl    $PATTERN, %edi
1:      movl    %edi, %eax
        movl    $(PAGE / 4), %ecx
        rep stosl
        cmpl    $PATTERN_END, %edi
        jb      1b

        start_counting
        movl    $PATTERN, %edi
        clear_results esi
#ifdef IDLE
        movw    %si, TICKS
        lidtl   PROGRAM + idt_in_ram - start16
        movl    $APIC_ENABLED, APIC_SPURIOUS
        movl    $FROM_PIC, APIC_LINT0
        start_interrupts
#endif

        count_for_a_line
        movl    %edi, %ebx
        movl    %ebp, %eax
        xorl    %ebx, %eax
        movl    $(PAGE / 4), %ecx
        repe scasl
        je      3f
        leal    -4(%edi), %edx
        call    put_bad
3:
        movl    %ebx, %edi
        leal    GENERATION_STEP(%ebp), %eax
        xorl    %ebx, %eax
        movl    $(PAGE / 4), %ecx
        rep stosl
        cmpl    $PATTERN_END, %edi
        jb      4f
        movl    $PATTERN, %edi
        addl    $GENERATION_STEP, %ebp
4:
        print_line

/* "BAD" and the address in edx. Changes eax, edx. */
put_bad:
        incl    BAD_LINES
        pushl   %ebx
        movl    $(PROGRAM + bad_mark - start16), %ebx
        pushl   %edx
        call    put_string
        popl    %edx
        call    put_hex
        popl    %ebx
        movb    $NEWLINE, %al
        jmp     put_char

        define_printing ebx, edx

#ifdef IDLE
        .align  8
idt:    .fill   TIMER_VECTOR, 8, 0
        .word   tick - start16, 0x08, 0x8e00, PROGRAM >> 16
idt_in_ram:
        .word   (TIMER_VECTOR + 1) * 8 - 1
        .long   PROGRAM + idt - start16
#endif

        .align  8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* 0x08: code, flat */
        .quad   0x00cf93000000ffff      /* 0x10: data, flat */
gdt_in_ram:
        .word   3 * 8 - 1
        .long   PROGRAM + gdt - start16
gdt_in_rom:
        .word   3 * 8 - 1
        .long   ROM + gdt - start16

        .org    0xfff0                  /* where the processor starts */
        .code16
        .byte   0xe9
        .word   start16 - (. + 2)
        .org    0x10000
