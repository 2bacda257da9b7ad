/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A counter for SEV-ES guests: in long mode, with the C-bit in its page tables and in CR3, woken from `hlt` by the timer
 * of its local APIC.
 *
 * It prints its counter in hexadecimal, a line for each tick. What it needs of the hypervisor (serial port, MSRs of the
 * local APIC) it requests by VMGEXIT and its GHCB, so that it needs no handler for #VC. All of its state that is not in
 * its registers is in the local APIC: a hop that loses that, or the timer interrupt, or that leaves it halted, ends it.
 *
 * Memory: 0x1000-0x4fff page tables, 0x8000 GHCB (shared), 0x9000 IDT; the stack is below the GHCB. The program is copied
 * to 0x10000 at the start, so that it runs without its ROM: that was encrypted in pages which stay with the source. A
 * secret that its owner injects at 0x20000, MAGIC and 8 characters, is printed with each tick: "SECRET characters".
 * C_BIT is the position of the C-bit, TIMER the initial count of the timer, MAGIC how a secret begins, 64 bits.
 */
        .set    PML4, 0x1000
        .set    PDPT, 0x2000
        .set    PD, 0x3000
        .set    PT, 0x4000
        .set    GHCB, 0x8000
        .set    IDT, 0x9000
        .set    STACK, 0x8000
        .set    SEGMENT, 0x10000        /* where the program runs */
        .set    SIZE, 0x10000
        .set    SECRET, 0x20000
        .set    C_HIGH, 1 << (C_BIT - 32)
        .set    VECTOR, 0x40
        .set    SERIAL, 0x3f8
        /* GHCB: fields, and the bits by which they are declared valid */
        .set    RAX, 0x1f8
        .set    RCX, 0x308
        .set    RDX, 0x310
        .set    EXIT_CODE, 0x390
        .set    EXIT_INFO_1, 0x398
        .set    EXIT_INFO_2, 0x3a0
        .set    VALID, 0x3f0
        .set    EXIT_IO, 0x7b
        .set    EXIT_MSR, 0x7c

        .code16
        .org    0
real:
        cli
        cld
        movw    %cs, %ax                /* the ROM */
        movw    %ax, %ds
        movw    $SEGMENT / 16, %ax
        movw    %ax, %es
        xorw    %si, %si
        xorw    %di, %di
        movw    $SIZE / 2, %cx
        rep     movsw
        ljmpw   $SEGMENT / 16, $in_ram
in_ram:
        movw    %cs, %ax
        movw    %ax, %ds
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $SEGMENT + protected

        .code32
protected:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        xorl    %eax, %eax
        movl    $PML4, %edi
        movl    $(0xa000 - PML4) / 4, %ecx
        rep     stosl
        movl    $PDPT + 3, PML4
        movl    $C_HIGH, PML4 + 4
        movl    $PD + 3, PDPT
        movl    $C_HIGH, PDPT + 4
        movl    $PT + 3, PD             /* 2 MiB in pages of 4 KiB */
        movl    $C_HIGH, PD + 4
        movl    $3, %eax
        movl    $PT, %edi
1:      movl    %eax, (%edi)
        movl    $C_HIGH, 4(%edi)
        addl    $0x1000, %eax
        addl    $8, %edi
        cmpl    $PT + 0x1000, %edi
        jb      1b
        movl    $0, PT + GHCB / 512 + 4 /* the one page that the hypervisor reads */
        movl    %cr4, %eax
        orl     $1 << 5, %eax           /* PAE */
        movl    %eax, %cr4
        movl    $PML4, %eax             /* without the C-bit, which is too high for 32 bits */
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER.LME */
        rdmsr
        orl     $1 << 8, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $1 << 31, %eax
        movl    %eax, %cr0
        ljmpl   $24, $SEGMENT + long

        .code64
long:
        movl    $STACK, %esp
        movabsq $PML4 | 1 << C_BIT, %rax
        movq    %rax, %cr3
        /* One gate: the timer. */
        leaq    tick(%rip), %rax
        movl    $IDT + VECTOR * 16, %edi
        movw    %ax, (%rdi)
        movw    $24, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shrq    $16, %rax
        movw    %ax, 6(%rdi)
        shrq    $16, %rax
        movl    %eax, 8(%rdi)
        lidt    idt_pointer(%rip)
        movl    $0xc0010130, %ecx       /* where the GHCB is */
        movl    $GHCB, %eax
        xorl    %edx, %edx
        wrmsr
        movw    $2, GHCB + 0xffa        /* protocol version */

        movl    $0x1b, %ecx             /* the local APIC, and its x2APIC mode */
        movl    $0xfee00d00, %eax       /* of the boot processor */
        call    set_msr
        movl    $0x80f, %ecx            /* spurious interrupts; enable */
        movl    $0x1ff, %eax
        call    set_msr
        movl    $0x83e, %ecx            /* divide by 1 */
        movl    $0xb, %eax
        call    set_msr
        movl    $0x832, %ecx            /* periodic */
        movl    $1 << 17 | VECTOR, %eax
        call    set_msr
        movl    $0x838, %ecx
        movl    $TIMER, %eax
        call    set_msr

        xorl    %ebp, %ebp              /* the counter */
count:
        incl    %ebp
        movl    $28, %r8d
1:      movl    %ebp, %eax
        movl    %r8d, %ecx
        shrl    %cl, %eax
        andl    $15, %eax
        leaq    digits(%rip), %rdx
        movzbl  (%rdx, %rax), %eax
        call    put
        subl    $4, %r8d
        jns     1b
        movl    $'\n', %eax
        call    put
        movabsq $MAGIC, %rax
        cmpq    %rax, SECRET
        jne     secret_put
        leaq    secret(%rip), %rsi
        movl    $7, %r8d
        call    put_all
        movl    $SECRET + 8, %esi
        movl    $8, %r8d
        call    put_all
        movl    $'\n', %eax
        call    put
secret_put:
        xorl    %r9d, %r9d
2:      sti
        hlt
        cli
        testl   %r9d, %r9d
        jz      2b
        jmp     count

tick:   /* interrupts are on in `hlt` only, so all registers but r9 and the timer's are free */
        movl    $1, %r9d
        movl    $0x80b, %ecx            /* end of interrupt */
        xorl    %eax, %eax
        call    set_msr
        iretq

/* Print r8d characters at rsi. */
put_all:
        movzbl  (%rsi), %eax
        call    put
        incq    %rsi
        decl    %r8d
        jnz     put_all
        ret

/* Print the character in eax. */
put:
        movl    $EXIT_IO, %r10d
        movl    $SERIAL << 16 | 1 << 4, %r11d   /* out, one byte */
        jmp     request

/* Write eax to MSR ecx. */
set_msr:
        movl    $EXIT_MSR, %r10d
        movl    $1, %r11d               /* write */

request:
        movl    %eax, %eax
        movl    %ecx, %ecx
        movq    %rax, GHCB + RAX
        movq    %rcx, GHCB + RCX
        movq    $0, GHCB + RDX
        movq    %r10, GHCB + EXIT_CODE
        movq    %r11, GHCB + EXIT_INFO_1
        movq    $0, GHCB + EXIT_INFO_2
        movq    $0, GHCB + VALID
        movq    $0, GHCB + VALID + 8
        btsq    $RAX / 8, GHCB + VALID
        btsq    $RCX / 8 - 64, GHCB + VALID + 8
        btsq    $RDX / 8 - 64, GHCB + VALID + 8
        btsq    $EXIT_CODE / 8 - 64, GHCB + VALID + 8
        btsq    $EXIT_INFO_1 / 8 - 64, GHCB + VALID + 8
        btsq    $EXIT_INFO_2 / 8 - 64, GHCB + VALID + 8
        .byte   0xf3, 0x0f, 0x01, 0xd9  /* VMGEXIT: rep vmmcall */
        ret

digits: .ascii  "0123456789abcdef"
secret: .ascii  "SECRET "

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* 8: code, 32 bits */
        .quad   0x00cf93000000ffff      /* 16: data */
        .quad   0x00af9b000000ffff      /* 24: code, 64 bits */
gdt_pointer:
        .word   . - gdt - 1
        .long   SEGMENT + gdt
idt_pointer:
        .word   (VECTOR + 1) * 16 - 1
        .quad   IDT

/*
 * What QEMU looks for in the firmware of a SEV-ES guest, see real_mode.S: where further processors start.
 */
        .org    0x10000 - 32 - 22 - 18
        .long   0xfffffff0
        .word   22
        .long   0x00f771de              /* GUID 00f771de-1a7e-4fcb-890e-68c77e2fb44e */
        .word   0x1a7e, 0x4fcb
        .byte   0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e
        .word   22 + 18
        .long   0x96b582de              /* GUID 96b582de-1fb2-45f7-baea-a366c55a082d */
        .word   0x1fb2, 0x45f7
        .byte   0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d

        .code16
        .org    0xfff0
        ljmpw   $0xf000, $real
        .org    0x10000
