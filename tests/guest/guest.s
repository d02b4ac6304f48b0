# A guest that a node can run although the node is emulated itself: a program that
# boots from the first disk, writes the second through the BIOS, and checks it.
#
#   block, 4 KiB:  magic | block number | sequence number | numbers | checksum
#
# Every turn writes one block drawn at random and then reads two of a sweep over all
# blocks, so that each is read again and again, whoever wrote it last. One that was
# never written must be zeros. What each must hold stands in a map in memory, which
# moves along when the guest does.
#
# It tells over the first serial port:
#   ready                   the program runs
#   at SEQUENCE             so many writes are done, told after every eighth
#   swept COUNT             so many times all blocks were read and were right
#   failed WHAT BLOCK WANTED FOUND     once; nothing is done after that
# All numbers are eight hexadecimal digits. WHAT is `write`, `read` (FOUND is the
# BIOS's status) or `content` (FOUND is the sequence number that the block shows).
#
# BLOCKS, a power of two up to 16384, is how many blocks are used, each in 32 KiB of its
# own and not always at their start: so a region of a copy holds several, and none
# fills it.

	.intel_syntax noprefix
	.code16

	.set LOADED, 0x7c00		# where the BIOS puts the first sector
	.set SECTORS, 4			# of this program
	.set BUFFERS, 0x1000		# segment: what is written, then what is read
	.set MAP, 0x2000		# segment: a sequence number for each block
	.set READ_AT, 0x1000		# offset of what is read
	.set DISK, 0x81			# the BIOS's number of the second disk
	.set MAGIC, 0x474c4d44		# "DMLG"
	.set NUMBERS, 1020		# of a block, in words of 4 bytes
	.set SERIAL, 0x3f8		# first port of the first UART

	.globl _start
_start:
	cli
	xor	ax, ax
	mov	ds, ax
	mov	es, ax
	mov	ss, ax
	mov	sp, LOADED
	sti
	cld
	# The BIOS reads one sector only; dl is the disk it was.
	mov	si, offset rest
	mov	ah, 0x42
	int	0x13
	jc	halt
	jmp	main
halt:
	hlt
	jmp	halt

	.balign 4
rest:	.byte	16, 0
	.word	SECTORS - 1
	.word	LOADED + 512, 0
	.long	1, 0

	.org	510
	.word	0xaa55			# makes a sector bootable

main:
	mov	ax, MAP
	mov	es, ax
	xor	di, di
	xor	eax, eax
	mov	ecx, 0x4000
	rep stosd
	mov	si, offset ready
	call	puts
turn:
	inc	dword ptr [sequence]
	call	draw
	mov	[block], eax
	mov	eax, [sequence]
	mov	[wanted], eax
	call	make
	mov	word ptr [packet_at], 0
	mov	ax, 0x4300
	call	bios
	mov	si, offset writing
	jc	failed
	call	of_block
	mov	eax, [wanted]
	mov	es:[di], eax
	call	check_next
	call	check_next
	test	dword ptr [sequence], 7
	jnz	turn
	mov	si, offset at
	call	puts
	mov	eax, [sequence]
	call	number
	call	line_end
	jmp	turn

# Reads the next block of the sweep and compares it with what it must hold.
check_next:
	mov	eax, [cursor]
	mov	[block], eax
	call	of_block
	mov	eax, es:[di]
	mov	[wanted], eax
	mov	word ptr [packet_at], READ_AT
	mov	ax, 0x4200
	call	bios
	mov	si, offset reading
	jc	failed
	mov	ax, BUFFERS
	mov	es, ax
	mov	di, READ_AT
	mov	ecx, 1024
	xor	eax, eax
	cmp	[wanted], eax
	je	blank
	call	make
	mov	ax, BUFFERS
	mov	es, ax
	mov	di, READ_AT
	mov	ecx, 1024
	xor	si, si
	push	ds
	mov	ds, ax
	repe cmpsd
	pop	ds
	jmp	compared
blank:
	repe scasd
compared:
	mov	eax, es:[READ_AT + 8]
	mov	si, offset content
	jne	failed
	inc	dword ptr [cursor]
	and	dword ptr [cursor], BLOCKS - 1
	jnz	1f
	mov	si, offset swept
	call	puts
	inc	dword ptr [sweeps]
	mov	eax, [sweeps]
	call	number
	call	line_end
1:	ret

# Reads or writes the block, as ah says. The BIOS keeps what it is not told to change,
# but its status in ah is all that this program relies on.
bios:
	mov	ebx, [block]
	mov	ecx, ebx
	shl	ebx, 6			# sectors of 512 bytes in 32 KiB
	and	ecx, 7
	shl	ecx, 3			# in 4 KiB
	add	ebx, ecx
	mov	[packet_lba], ebx
	mov	si, offset packet
	mov	dl, DISK
	int	0x13
	cld
	movzx	eax, ah
	ret

# es:di is the block's place in the map.
of_block:
	mov	ax, MAP
	mov	es, ax
	mov	edi, [block]
	shl	edi, 2
	ret

# What the block holds at the wanted sequence number, made at the start of the buffers.
make:
	mov	ax, BUFFERS
	mov	es, ax
	xor	di, di
	xor	ebx, ebx		# the checksum of what is there so far
	mov	eax, MAGIC
	call	put
	mov	eax, [block]
	call	put
	mov	eax, [wanted]
	call	put
	imul	edx, [block], 0x9e3779b1
	xor	edx, [wanted]
	mov	cx, NUMBERS
1:	imul	edx, edx, 1664525
	add	edx, 1013904223
	mov	eax, edx
	call	put
	loop	1b
	mov	eax, ebx
	stosd
	ret
put:
	stosd
	rol	ebx, 5
	xor	ebx, eax
	ret

# eax is a block, drawn at random.
draw:
	imul	eax, [random], 1664525
	add	eax, 1013904223
	mov	[random], eax
	shr	eax, 12			# the low bits of such a sequence repeat soon
	and	eax, BLOCKS - 1
	ret

# Tells what failed, and stops for good. si is what was done, eax what was found.
failed:
	push	eax
	push	si
	mov	si, offset failure
	call	puts
	pop	si
	call	puts
	mov	eax, [block]
	call	number
	mov	al, ' '
	call	putc
	mov	eax, [wanted]
	call	number
	mov	al, ' '
	call	putc
	pop	eax
	call	number
	call	line_end
	jmp	halt

puts:
	lodsb
	test	al, al
	jz	1f
	call	putc
	jmp	puts
1:	ret

number:
	mov	cx, 8
1:	rol	eax, 4
	push	eax
	and	al, 15
	add	al, '0'
	cmp	al, '9'
	jbe	2f
	add	al, 'a' - '9' - 1
2:	call	putc
	pop	eax
	loop	1b
	ret

line_end:
	mov	al, '\n'
putc:
	push	dx
	push	ax
	mov	dx, SERIAL + 5
1:	in	al, dx
	test	al, 0x20		# the UART takes another byte
	jz	1b
	pop	ax
	mov	dx, SERIAL
	out	dx, al
	pop	dx
	ret

ready:	.asciz	"ready\n"
at:	.asciz	"at "
swept:	.asciz	"swept "
failure: .asciz	"failed "
writing: .asciz	"write "
reading: .asciz	"read "
content: .asciz	"content "

	.balign	4
sequence: .long	0
random:	.long	1
cursor:	.long	0
sweeps:	.long	0
block:	.long	0
wanted:	.long	0

packet:	.byte	16, 0
	.word	8
packet_at: .word 0, BUFFERS
packet_lba: .long 0, 0

	.org	512 * SECTORS
