"""x86_64: registers, and the few machine instructions that Godwit injects."""

from __future__ import annotations

import ctypes
import re
import struct
from typing import Final

MACHINE: Final = "x86_64"
EXEC_STUB_ELF_MACHINE: Final = 62  # EM_X86_64
USER_SPACE_END: Final = 0x7FFFFFFFF000  # TASK_SIZE_MAX with four-level page tables

SYSCALL_INSTRUCTION: Final = b"\x0f\x05"
# Kernels clear the used registers on the way out of a vdso function: xor reg, reg, as often as need be.
SYSCALL_THEN_RETURN: Final = re.compile(rb"\x0f\x05(?:\x45?\x31[\xc0\xc9\xd2\xdb\xf6\xff])*\xc3")
SIGRETURN_CODES: Final = (
    b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",  # mov rax, 15; syscall: the C libraries
    b"\xb8\x0f\x00\x00\x00\x0f\x05",  # mov eax, 15; syscall: the Go runtime
)

INTERPRETER: Final = bytes.fromhex(
    "488b03"  # next: mov rax, [rbx]      an entry of 64 bytes: number, six arguments, result
    "4883f8ff"  # cmp rax, -1
    "7424"  # je done
    "488b7b08"  # mov rdi, [rbx+8]
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "0f05"  # syscall
    "48894338"  # mov [rbx+56], rax
    "4883c340"  # add rbx, 64
    "ebd3"  # jmp next
    "b827000000"  # done: mov eax, 39 (getpid)
    "0f05"  # syscall
    "89c7"  # mov edi, eax
    "b8ba000000"  # mov eax, 186 (gettid)
    "0f05"  # syscall
    "89c6"  # mov esi, eax
    "8b5308"  # mov edx, [rbx+8]
    "b8ea000000"  # mov eax, 234 (tgkill)
    "0f05"  # syscall
    "488b6310"  # trap: mov rsp, [rbx+16]
    "b80f000000"  # mov eax, 15 (rt_sigreturn)
    "0f05"  # syscall
    "0f0b"  # ud2
)
"""Makes every call of a table at rbx that ends in number -1, then signals itself and comes to `trap`.

The signal, at +8 of the last entry, is one that the program ignores, so only a tracer notices it. With
no tracer left the thread goes on to what it was about, from the signal frame whose address is at +16.
"""

TRAP_AT: Final = INTERPRETER.index(bytes.fromhex("488b6310"))
"""Where the thread is when the tracer hears of the signal."""

CALL_AND_WAY_BACK: Final = b"\x0f\x05\xc3" + SIGRETURN_CODES[0]
"""A system call with a return behind it, and at WAY_BACK_AT what that may return into: rt_sigreturn(2)."""

WAY_BACK_AT: Final = 3

_UC_FP_XSTATE: Final = 1
_UC_SIGCONTEXT_SS: Final = 2
_UC_STRICT_RESTORE_SS: Final = 4
_NO_SUCH_STACK_MODE: Final = 0x40
_FP_XSTATE_MAGIC1: Final = 0x46505853
_FP_XSTATE_MAGIC2: Final = 0x46505845
_SW_BYTES_AT: Final = 464
_SW_BYTES: Final = struct.Struct("<IIQI28x")
_UCONTEXT: Final = struct.Struct("<QQQixxxxQ18Q4H5Q64xQ")
_FPSTATE_AT: Final = 512
SIGNAL_FRAME_LIMIT_BYTES: Final = 16384


def signal_frame(address: int, registers: UserRegs, mask: int, xstate: bytes) -> bytes:
    """Return what rt_sigreturn(2) restores a thread from, when rsp is `address` (64-byte aligned).

    <asm/sigcontext.h>, <asm/ucontext.h>. The signal stack stays as it is: its mode here is none.
    """
    r = registers
    general = (
        *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx),
        *(r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags),
    )
    flags = _UC_FP_XSTATE | _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS
    context = _UCONTEXT.pack(
        *(flags, 0, 0, _NO_SUCH_STACK_MODE, 0),
        *general,
        *(r.cs & 0xFFFF, 0, 0, r.ss & 0xFFFF),
        *(0, 0, 0, 0, address + _FPSTATE_AT),
        mask,
    )
    state = bytearray(xstate)
    features = struct.unpack_from("<Q", state, _SW_BYTES_AT)[0]
    size = len(state)
    _SW_BYTES.pack_into(state, _SW_BYTES_AT, _FP_XSTATE_MAGIC1, size + 4, features, size)
    return context.ljust(_FPSTATE_AT, b"\0") + bytes(state) + struct.pack("<I", _FP_XSTATE_MAGIC2)


_USER_CS: Final = 0x33
# ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
_RESTARTS: Final = (-512, -513, -514, -516)


class UserRegs(ctypes.Structure):
    """`struct user_regs_struct` of <sys/user.h>, as PTRACE_GETREGS fills it."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax"
            " rip cs eflags rsp ss fs_base gs_base ds es fs gs"
        ).split()
    ]

    def copy(self) -> UserRegs:
        """Return an independent copy."""
        return UserRegs.from_buffer_copy(bytes(self))

    @property
    def instruction_pointer(self) -> int:
        """The address of the next instruction."""
        return int(self.rip)

    @property
    def is_64_bit(self) -> bool:
        """The task runs in 64-bit mode: __USER_CS, not __USER32_CS."""
        return bool(self.cs == _USER_CS)

    @property
    def stack_pointer(self) -> int:
        """The stack pointer."""
        return int(self.rsp)

    @property
    def call_number(self) -> int:
        """The system call the task is inside, or -1."""
        return ctypes.c_longlong(self.orig_rax).value

    @property
    def result(self) -> int:
        """The signed result register of a system call."""
        return ctypes.c_longlong(self.rax).value

    @property
    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """The six argument registers of a system call."""
        return (self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9)

    def aim_at_interpreter(self, code: int, table: int) -> None:
        """Set the registers so that the task runs INTERPRETER at `code` over `table`."""
        self.rip = code
        self.rbx = table
        # Any other value makes the kernel edit rip and rax to restart the call it believes in.
        self.orig_rax = 0xFFFFFFFFFFFFFFFF

    def aim_at_call(self, instruction: int, number: int, arguments: tuple[int, ...]) -> None:
        """Set the registers so that one step at `instruction` makes the system call `number`."""
        self.rip = instruction
        self.rax = number
        self.orig_rax = 0xFFFFFFFFFFFFFFFF
        padded = (*arguments, *(0,) * (6 - len(arguments)))
        self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9 = (
            value & 0xFFFFFFFFFFFFFFFF for value in padded
        )

    def return_into(self, address: int) -> None:
        """Set the stack pointer: the next return instruction takes its address from there."""
        self.rsp = address

    def restart_call(self, number: int) -> None:
        """Set the registers so that the task makes the interrupted system call again."""
        self.rax = number
        self.rip -= len(SYSCALL_INSTRUCTION)
        self.orig_rax = 0xFFFFFFFFFFFFFFFF

    def restart_if_interrupted(self) -> None:
        """Make an interrupted call anew where the kernel would have: for a way back without it."""
        if self.call_number >= 0 and self.result in _RESTARTS:
            self.restart_call(self.call_number)

    def finish_call(self, result: int) -> None:
        """Set the registers as they are after the interrupted call returned `result`."""
        self.rax = result & 0xFFFFFFFFFFFFFFFF
        self.orig_rax = 0xFFFFFFFFFFFFFFFF


def pod_init() -> bytes:
    """Return the code of a pod's first process.

    It reaps every child, writes (pid, wait status) of each as two 32-bit words to descriptor 3 if
    somebody gave it one, and exits when no child is left. Behind that stands what calls made in it return
    through should their tracer die: rt_sigreturn(2).
    """
    return bytes.fromhex(
        "4883ec40"  # sub rsp, 64
        "c7042400000000"  # again: mov dword [rsp], 0
        "b83d000000"  # mov eax, 61 (wait4)
        "48c7c7ffffffff"  # mov rdi, -1
        "488d742404"  # lea rsi, [rsp+4]
        "ba00000040"  # mov edx, __WALL
        "4531d2"  # xor r10d, r10d
        "0f05"  # syscall
        "4885c0"  # test rax, rax
        "7819"  # js fail
        "890424"  # mov [rsp], eax
        "b801000000"  # mov eax, 1 (write)
        "bf03000000"  # mov edi, 3
        "4889e6"  # mov rsi, rsp
        "ba08000000"  # mov edx, 8
        "0f05"  # syscall
        "ebc0"  # jmp again
        "4883f8fc"  # fail: cmp rax, -EINTR
        "74ba"  # je again
        "b8e7000000"  # mov eax, 231 (exit_group)
        "31ff"  # xor edi, edi
        "0f05"  # syscall
        "48c7c00f000000"  # mov rax, 15 (rt_sigreturn)
        "0f05"  # syscall
    )


_COMM_BYTES: Final = 16
DEPUTY_CALLS_AT: Final = 121
"""Where CALL_AND_WAY_BACK stands in the deputy's code."""


def deputy(report_fd: int, comm: bytes) -> bytes:
    """Return the code of a deputy.

    It calls itself `comm` (at most 15 bytes), blocks all signals, and waits for them for ever. Of each it
    writes to `report_fd` how many they were by then, as a 64-bit word, and its siginfo_t.
    """
    code = bytes.fromhex(
        "b89d000000"  # mov eax, 157 (prctl)
        "bf0f000000"  # mov edi, PR_SET_NAME
        "488d357c000000"  # lea rsi, [rip+comm]
        "0f05"  # syscall
        "b80e000000"  # mov eax, 14 (rt_sigprocmask)
        "bf02000000"  # mov edi, SIG_SETMASK
        "488d3561000000"  # lea rsi, [rip+every]
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8
        "0f05"  # syscall
        "4881ec90000000"  # sub rsp, 144
        "31db"  # xor ebx, ebx
        "b880000000"  # again: mov eax, 128 (rt_sigtimedwait)
        "488d3d42000000"  # lea rdi, [rip+every]
        "488d742408"  # lea rsi, [rsp+8]
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8
        "0f05"  # syscall
        "4885c0"  # test rax, rax
        "78e0"  # js again
        "48ffc3"  # inc rbx
        "48891c24"  # mov [rsp], rbx
        "b801000000"  # send: mov eax, 1 (write)
        f"bf{report_fd.to_bytes(4, 'little').hex()}"  # mov edi, report_fd
        "4889e6"  # mov rsi, rsp
        "ba88000000"  # mov edx, 136
        "0f05"  # syscall
        "4885c0"  # test rax, rax
        "78e7"  # js send
        "ebbe"  # jmp again
    )
    assert len(code) == DEPUTY_CALLS_AT, "the displacements above are counted by hand"
    every = b"\xff" * 8
    return code + CALL_AND_WAY_BACK + every + comm.ljust(_COMM_BYTES, b"\0")[:_COMM_BYTES]
