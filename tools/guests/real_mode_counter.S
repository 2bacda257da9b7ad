/*
 * A counter for the SEV lab: like counter.S in what it prints, but it never leaves real mode and uses no instruction that
 * KVM would have to skip over. The lab's emulated processor does not report the next instruction, and KVM may not look
 * into a confidential guest to find it: a write to a control register is enough to derail it.
 *
 * Serial port COM1:
 *   START          once, when it begins
 *   0000002a       the number of the line (hexadecimal, from 1), one more in every line
 *   BAD 00009000   the number in memory and the number in the register are not the same
 *
 * Guest-physical memory: 0x9000 u32, the number of the last line. It is also kept in %ebp: memory and vCPU state reach the
 * next VMM by different ways and must fit together afterwards.
 */
#define LINE  0x9000
#define PACE  20000             /* turns of an empty loop between two lines */

        .code16
        .text
        .globl _start
_start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7000, %sp
        movw    $0x3f8, %dx
        xorl    %ebp, %ebp
        movl    %ebp, LINE
        movw    $started, %si
        call    print
count:
        incl    %ebp
        incl    LINE
        cmpl    %ebp, LINE
        je      1f
        movw    $wrong, %si
        call    print
        movl    %ebp, LINE
1:      movl    %ebp, %ebx
        movw    $8, %cx
2:      roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     3f
        addb    $('a' - '9' - 1), %al
3:      outb    %al, %dx
        decw    %cx
        jnz     2b
        movb    $'\n', %al
        outb    %al, %dx
        movl    $PACE, %ecx
4:      decl    %ecx
        jnz     4b
        jmp     count

/* Print the text at %cs:%si. Changes %al and %si. */
print:
        movb    %cs:(%si), %al
        testb   %al, %al
        jz      5f
        outb    %al, %dx
        incw    %si
        jmp     print
5:      ret

started:
        .asciz  "START\n"
wrong:
        .asciz  "BAD 00009000\n"

        .org    0xfff0
        ljmp    $0xf000, $_start
        .org    0x10000
