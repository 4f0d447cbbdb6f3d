"""Random programs on the PTX interpreter, against Python's integers: instructions that follow each other.

`test_ptx_interpreter` holds each instruction alone. Here results are what the next instructions read, through
registers that are read as other types than they were written as, under guards, and over branches in which
threads part and meet again.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_ptx_interpreter import INTEGERS, LOAD, SHIFTS, run, signed

LENGTH = 40
REGISTERS = 6
WIDTHS = (16, 32, 64)


def steps():
    """The instructions of the tables whose results are bits of one of the widths, and what they mean."""
    return [one for one in (*INTEGERS, *SHIFTS) if "%rs3" not in one[0]]


def register(bits, n):
    """The name of a register of a program."""
    return f"%{LOAD[f'b{bits}']}{n + 10}"


def value_of(bits, kind):
    """Bits of a register as a number of a type."""
    width = int(kind[1:])
    return signed(bits, width) if kind[0] == "s" else bits & ((1 << width) - 1)


class Program:
    """A random program: its text, and what it leaves in the registers of each thread."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.lines = []
        self.held = {(bits, n): [0] * 32 for bits in WIDTHS for n in range(REGISTERS)}
        for bits, n in self.held:
            self.begin(bits, n)
        for count in range(LENGTH):
            self.step(count)

    def begin(self, bits, n):
        """Fill a register with bits that differ by thread."""
        factor, term = self.rng.getrandbits(31) | 1, self.rng.getrandbits(31)
        target = register(bits, n)
        word = f"mad.lo.u32 %r9, %r1, {factor}, {term};"
        values = [(lane * factor + term) & 0xFFFFFFFF for lane in range(32)]
        if bits == 64:
            word += f"mov.b64 {target}, {{%r9, %r9}};"
            values = [v << 32 | v for v in values]
        elif bits == 32:
            word += f"mov.b32 {target}, %r9;"
        else:
            word += f"cvt.u16.u32 {target}, %r9;"
            values = [v & 0xFFFF for v in values]
        self.lines.append(word)
        self.held[bits, n] = values

    def step(self, count):
        """Add an instruction, for all threads, for those that a guard lets, or in a branch."""
        text, kinds, to, meaning = self.rng.choice(steps())
        sources = [(int(kind[1:]), self.rng.randrange(REGISTERS)) for kind in kinds]
        target = int(to[1:]), self.rng.randrange(REGISTERS)
        names = [register(*s) for s in sources]
        values = [[value_of(x, kind) for x in self.held[s]] for s, kind in zip(sources, kinds, strict=True)]
        if (text, kinds, to, meaning) in SHIFTS:
            # Fields are found by the low 8 bits of a count, and Python has no bounds for it.
            self.lines.append(f"and.b32 %r8, {names[1]}, 255;")
            names[1], values[1] = "%r8", [x & 255 for x in values[1]]
        line = text.format(*names, d=register(*target)) + ";"
        way = self.rng.choice(["all", "guard", "branch"])
        bit = self.rng.randrange(5)
        chosen = [way == "all" or bool(lane >> bit & 1) for lane in range(32)]
        found = list(self.held[target])
        for lane in range(32):
            result = meaning(*(column[lane] for column in values))
            if result is None and chosen[lane]:
                return
            if chosen[lane]:
                found[lane] = result & ((1 << target[0]) - 1)
        self.held[target] = found
        test = f"and.b32 %r9, %r1, {1 << bit}; setp.ne.u32 %p1, %r9, 0;"
        if way == "guard":
            line = f"{test} @%p1 {line}"
        elif way == "branch":
            line = f"{test} @!%p1 bra PAST{count}; {line} PAST{count}:"
        self.lines.append(line)


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed):
    program = Program(seed)
    body = "\n".join(program.lines)
    for n, (bits, number) in enumerate(program.held):
        size = bits // 8
        body += f"mad.wide.u32 %rd18, %r1, {size}, %rd1; st.global.b{bits} [%rd18+{256 * n}], "
        body += f"{register(bits, number)};\n"
    _, [room] = run(body, np.zeros(256 * len(program.held), "u1"))
    for n, ((bits, number), wanted) in enumerate(program.held.items()):
        found = room[256 * n : 256 * n + 4 * bits].view(f"u{bits // 8}").tolist()
        assert found == wanted, f"register {register(bits, number)}\n{body}"
