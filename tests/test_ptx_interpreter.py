"""The PTX interpreter, instruction by instruction, against definitions in Python's own numbers."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from ptx import Arena, PtxError, launch

LOAD = {"b16": "rs", "b32": "r", "b64": "rd"}
DTYPES = {
    **{f"{sign}{bits}": f"{kind}{bits // 8}"
       for sign, kind in (("u", "u"), ("s", "i"), ("b", "u")) for bits in (16, 32, 64)},
    "f16": "f2", "f32": "f4", "f64": "f8",
}  # fmt: skip


def module(body, parameters=".param .u64 p0", declared=""):
    """A module with the kernel `k` and registers of every width; %rd1 is its first parameter."""
    return f"""
.version 8.0
.target sm_80
{declared}
.visible .entry k({parameters})
{{
.reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<60>; .reg .b64 %rd<20>;
ld.param.u64 %rd1, [p0];
mov.u32 %r1, %tid.x;
{body}
ret;
}}"""


def run(body, *arrays, threads=32, blocks=1, declared="", count=False):
    """Run a body with the addresses of arrays as parameters; the machine and what the arrays hold then."""
    arena = Arena(1 << 16)
    places = [arena.place(np.asarray(x)) for x in arrays]
    names = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %rd{n + 1}, [p{n}];" for n in range(1, len(arrays)))
    text = module(loads + "\n" + body, names, declared)
    machine = launch(
        text, "k", (blocks,), (threads,), [struct.pack("Q", x) for x in places], arena, count=count
    )
    return machine, [
        arena.read(at, x.shape, x.dtype) for at, x in zip(places, map(np.asarray, arrays), strict=True)
    ]


def evaluate(instruction, kinds, to, *columns):
    """`instruction` with {d}, {0}, {1}, ... on columns of 32 inputs, one a thread."""
    body = []
    for n, kind in enumerate(kinds):
        size = int(kind[1:]) // 8
        name = f"%{LOAD[f'b{8 * size}']}{n + 10}"
        body += [
            f"mad.wide.u32 %rd18, %r1, {size}, %rd{n + 2};",
            f"ld.global.b{8 * size} {name}, [%rd18];",
        ]
    names = [f"%{LOAD[f'b{kind[1:]}']}{n + 10}" for n, kind in enumerate(kinds)]
    size = int(to[1:]) // 8
    target = f"%{LOAD[f'b{8 * size}']}9"
    body += [
        instruction.format(*names, d=target) + ";",
        f"mad.wide.u32 %rd18, %r1, {size}, %rd1;",
        f"st.global.b{8 * size} [%rd18], {target};",
    ]
    inputs = [np.asarray(column, DTYPES[kind]) for column, kind in zip(columns, kinds, strict=True)]
    return run("\n".join(body), np.zeros(32, DTYPES[to]), *inputs)[1][0]


def integers(kind, seed):
    """32 integers of a type, its ends among them."""
    info = np.iinfo(DTYPES[kind])
    drawn = np.random.default_rng(seed).integers(info.min, info.max, 26, info.dtype, endpoint=True)
    return [info.min, info.max, 0, 1, 2, info.max - 1, *drawn.tolist()]


def signed(x, bits):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def field(a, at, length, bits):
    """bfe of a signed field, as the ISA's pseudocode has it."""
    sign = 0 if length == 0 else a >> min(at + length - 1, bits - 1) & 1
    return sum(((a >> (at + n) & 1) if n < length and at + n < bits else sign) << n for n in range(bits))


def byte_permute(a, b, select):
    both = (b << 32 | a).to_bytes(8, "little")
    chosen = []
    for n in range(4):
        code = select >> 4 * n & 15
        byte = both[code & 7]
        chosen.append((255 if byte >> 7 else 0) if code & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def towards_zero(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


M32, M64 = (1 << 32) - 1, (1 << 64) - 1
INTEGERS = [
    ("add.s32 {d}, {0}, {1}", ("s32", "s32"), "s32", lambda x, y: signed(x + y, 32)),
    ("sub.s64 {d}, {0}, {1}", ("s64", "s64"), "s64", lambda x, y: signed(x - y, 64)),
    ("mul.lo.s32 {d}, {0}, {1}", ("s32", "s32"), "s32", lambda x, y: signed(x * y, 32)),
    ("mul.wide.s32 {d}, {0}, {1}", ("s32", "s32"), "s64", lambda x, y: x * y),
    ("mul.wide.u16 {d}, {0}, {1}", ("u16", "u16"), "u32", lambda x, y: x * y),
    ("mul.hi.u32 {d}, {0}, {1}", ("u32", "u32"), "u32", lambda x, y: x * y >> 32),
    ("mul.hi.s64 {d}, {0}, {1}", ("s64", "s64"), "s64", lambda x, y: x * y >> 64),
    ("mad.lo.s32 {d}, {0}, {1}, {2}", ("s32",) * 3, "s32", lambda x, y, z: signed(x * y + z, 32)),
    ("mad.wide.u32 {d}, {0}, {1}, {2}", ("u32", "u32", "u64"), "u64", lambda x, y, z: x * y + z & M64),
    ("div.s32 {d}, {0}, {1}", ("s32", "s32"), "s32",
     lambda x, y: signed(towards_zero(x, y), 32) if y else None),
    ("rem.s64 {d}, {0}, {1}", ("s64", "s64"), "s64", lambda x, y: x - towards_zero(x, y) * y if y else None),
    ("div.u64 {d}, {0}, {1}", ("u64", "u64"), "u64", lambda x, y: x // y if y else None),
    ("min.u32 {d}, {0}, {1}", ("u32", "u32"), "u32", min),
    ("max.s64 {d}, {0}, {1}", ("s64", "s64"), "s64", max),
    ("abs.s32 {d}, {0}", ("s32",), "s32", lambda x: signed(abs(x), 32)),
    ("neg.s64 {d}, {0}", ("s64",), "s64", lambda x: signed(-x, 64)),
    ("not.b32 {d}, {0}", ("b32",), "b32", lambda x: ~x & M32),
    ("xor.b64 {d}, {0}, {1}", ("b64", "b64"), "b64", lambda x, y: x ^ y),
    ("lop3.b32 {d}, {0}, {1}, {2}, 0xB8", ("b32",) * 3, "b32", lambda x, y, z: (x & ~y | y & z) & M32),
    ("popc.b64 {d}, {0}", ("b64",), "u32", lambda x: bin(x).count("1")),
    ("clz.b32 {d}, {0}", ("b32",), "u32", lambda x: 32 - x.bit_length()),
    ("brev.b32 {d}, {0}", ("b32",), "b32", lambda x: int(f"{x:032b}"[::-1], 2)),
    ("prmt.b32 {d}, {0}, {1}, {2}", ("b32",) * 3, "b32", byte_permute),
    ("cvt.s64.s32 {d}, {0}", ("s32",), "s64", lambda x: x),
    ("cvt.u64.u32 {d}, {0}", ("u32",), "u64", lambda x: x),
    ("cvt.u16.u32 {d}, {0}", ("u32",), "u16", lambda x: x & 0xFFFF),
    ("cvt.s32.s16 {d}, {0}", ("s16",), "s32", lambda x: x),
    ("mov.b64 {d}, {{{0}, {1}}}", ("b32", "b32"), "b64", lambda x, y: y << 32 | x),
    ("mov.b32 {{_, %rs3}}, {0}; cvt.u32.u16 {d}, %rs3", ("b32",), "b32", lambda x: x >> 16),
]  # fmt: skip
SHIFTS = [
    ("shl.b32 {d}, {0}, {1}", ("b32", "u32"), "b32", lambda x, n: x << n & M32),
    ("shr.s32 {d}, {0}, {1}", ("s32", "u32"), "s32", lambda x, n: x >> n),
    ("shr.u64 {d}, {0}, {1}", ("u64", "u32"), "u64", lambda x, n: x >> n),
    ("shf.l.wrap.b32 {d}, {0}, {0}, {1}", ("b32", "u32"), "b32",
     lambda x, n: (x << 32 | x) << n % 32 >> 32 & M32),
    ("shf.r.clamp.b32 {d}, {0}, {0}, {1}", ("b32", "u32"), "b32",
     lambda x, n: (x << 32 | x) >> min(n, 32) & M32),
    ("bfe.u32 {d}, {0}, {1}, 7", ("u32", "u32"), "u32", lambda x, n: x >> n & 127),
    ("bfe.s32 {d}, {0}, {1}, 7", ("b32", "u32"), "b32", lambda x, n: field(x, n, 7, 32)),
    ("bfi.b32 {d}, 0x55, {0}, {1}, 7", ("b32", "u32"), "b32",
     lambda x, n: (x & ~(127 << n) | 0x55 << n) & M32),
]  # fmt: skip


def check_exact(instruction, kinds, to, meaning, columns):
    found = evaluate(instruction, kinds, to, *columns).tolist()
    for got, *given in zip(found, *columns, strict=True):
        wanted = meaning(*given)
        assert wanted is None or got == wanted, (instruction, given, got, wanted)


@pytest.mark.parametrize(("instruction", "kinds", "to", "meaning"), INTEGERS, ids=[x[0] for x in INTEGERS])
def test_integers(instruction, kinds, to, meaning):
    check_exact(instruction, kinds, to, meaning, [integers(kind, n) for n, kind in enumerate(kinds)])


@pytest.mark.parametrize(("instruction", "kinds", "to", "meaning"), SHIFTS, ids=[x[0] for x in SHIFTS])
def test_shifts_by_more_than_the_width(instruction, kinds, to, meaning):
    by = [*range(24), 31, 32, 33, 40, 63, 64, 100, 200]
    check_exact(instruction, kinds, to, meaning, [integers(kinds[0], 3), by])


def rounded(x):
    """The float32 nearest to an exact fraction or float."""
    return np.float32(float(x))


REAL = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 0.1, 1e30, -1e-30, 1e-40, 65504.0, 65520.0, 1e5, -3e9, 5e9, 0.5,
        -0.5, -2.5, 7.25, 1e-8, 6e-8, 123456.789, math.inf, -math.inf, math.nan, 1 + 2**-8, 1 + 3 * 2**-9,
        1 + 2**-11, 3.0, 4.0, 255.7, -1e10]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_conversions_of_floats():
    x = np.array(REAL, "f4")
    to_half = evaluate("cvt.rn.f16.f32 {d}, {0}", ("f32",), "b16", x).view("f2")
    np.testing.assert_array_equal(to_half, x.astype("f2"))
    packed = evaluate("cvt.rn.bf16x2.f32 {d}, {0}, {1}", ("f32", "f32"), "b32", x, x[::-1])
    # bfloat16 by comparing the distances to its two neighbours, ties to the even one.
    for given, word in zip(x.tolist(), packed.tolist(), strict=True):
        high = struct.unpack("f", struct.pack("I", word & 0xFFFF0000))[0]
        if math.isnan(given):
            assert math.isnan(high)
        elif math.isinf(given):
            assert high == given
        else:
            below = struct.unpack("I", struct.pack("f", given))[0] >> 16
            near = [struct.unpack("f", struct.pack("I", code << 16))[0] for code in (below, below + 1)]
            assert high == min(near, key=lambda v: (abs(v - given), v != near[below & 1])), given
    assert (packed & 0xFFFF).tolist() == (packed[::-1] >> 16).tolist()
    limits = {"s32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1)}
    for kind, (low, high) in limits.items():
        for rounding, whole in (("rzi", math.trunc), ("rni", round), ("rmi", math.floor), ("rpi", math.ceil)):
            found = evaluate(f"cvt.{rounding}.{kind}.f32 {{d}}, {{0}}", ("f32",), kind, x).tolist()
            wanted = [
                0
                if math.isnan(v)
                else (high if v > 0 else low)
                if math.isinf(v)
                else min(max(whole(v), low), high)
                for v in x.tolist()
            ]
            assert found == wanted
    np.testing.assert_array_equal(
        evaluate("cvt.rn.f32.s64 {d}, {0}", ("s64",), "f32", integers("s64", 1)),
        [rounded(v) for v in integers("s64", 1)],
    )


def test_arithmetic_of_floats():
    x, y = np.array(REAL, "f4"), np.array(REAL[::-1], "f4")
    with np.errstate(all="ignore"):
        wide = x.astype("f8"), y.astype("f8")
        for text, wanted in (
            ("add.f32 {d}, {0}, {1}", wide[0] + wide[1]),
            ("mul.rn.f32 {d}, {0}, {1}", wide[0] * wide[1]),
            ("fma.rn.f32 {d}, {0}, {1}, {0}", wide[0] * wide[1] + wide[0]),
            ("div.rn.f32 {d}, {0}, {1}", wide[0] / wide[1]),
            (
                "max.f32 {d}, {0}, {1}",
                [b if a != a else a if b != b else max(a, b) for a, b in zip(*wide, strict=True)],
            ),
            (
                "min.NaN.f32 {d}, {0}, {1}",
                [math.nan if a != a or b != b else min(a, b) for a, b in zip(*wide, strict=True)],
            ),
            ("ex2.approx.f32 {d}, {0}", np.exp2(wide[0])),
            ("ex2.approx.ftz.f32 {d}, {0}", np.exp2(wide[0])),
        ):
            found = evaluate(text, ("f32", "f32"), "f32", x, y)
            wanted = np.asarray(wanted).astype("f4")
            if "ftz" in text:
                wanted = np.where(np.abs(wanted) < np.finfo("f4").tiny, 0, wanted)
            np.testing.assert_allclose(found, wanted, rtol=2e-7, err_msg=text)
    # Not rounded between product and sum: (1 + e)(1 - e) - 1 = -e * e.
    e = np.full(32, 2.0**-15, "f4")
    fused = evaluate("fma.rn.f32 {d}, {0}, {1}, 0fBF800000", ("f32", "f32"), "f32", 1 + e, 1 - e)
    assert (fused == -(e.astype("f8") ** 2)).all()


@pytest.mark.parametrize(
    ("how", "meaning"),
    [("lt", lambda a, b: a < b), ("neu", lambda a, b: a != b), ("geu", lambda a, b: not a < b),
     ("ne", lambda a, b: a < b or a > b), ("num", lambda a, b: a == a and b == b),
     ("nan", lambda a, b: a != a or b != b)],
)  # fmt: skip
def test_comparisons_with_nan(how, meaning):
    x, y = np.array(REAL, "f4"), np.array([*REAL[:16], *REAL[15::-1]], "f4")
    text = f"setp.{how}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 7, 3, %p1"
    found = evaluate(text, ("f32", "f32"), "b32", x, y).tolist()
    assert found == [7 if meaning(a, b) else 3 for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def test_unsigned_and_signed_comparisons_differ():
    x = integers("u32", 5)
    found = evaluate("setp.lo.u32 %p1, {0}, 9; setp.lt.and.s32 %p2, {0}, 9, !%p1; selp.b32 {d}, 1, 0, %p2",
                     ("u32",), "b32", x).tolist()  # fmt: skip
    assert found == [int(v >= 9 and signed(v, 32) < 9) for v in x]


class TestWarp:
    """Instructions of a warp; each thread stores one word at %rd1."""

    END = "mad.wide.u32 %rd10, %r1, 4, %rd1; st.global.b32 [%rd10], %r9;"

    def words(self, body, threads=32):
        return run(body + self.END, np.zeros(threads, "u4"), threads=threads)[1][0].tolist()

    @pytest.mark.parametrize("width", [32, 8])
    @pytest.mark.parametrize(
        ("how", "by", "source"),
        [("up", 3, lambda n, w: n - 3 if n % w >= 3 else n),
         ("down", 5, lambda n, w: n + 5 if n % w + 5 < w else n),
         ("bfly", 6, lambda n, w: n ^ 6),
         ("idx", 2, lambda n, w: n // w * w + 2)],
    )  # fmt: skip
    def test_shuffle(self, how, by, source, width):
        clamp = (32 - width) << 8 | (0 if how == "up" else 31)
        body = f"mul.lo.u32 %r2, %r1, 10; shfl.sync.{how}.b32 %r9|%p1, %r2, {by}, {clamp}, -1;"
        assert self.words(body) == [10 * source(n, width) for n in range(32)]

    def test_shuffle_among_some(self):
        body = """
            mov.u32 %r9, 77; and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 0;
            @!%p1 bra DONE;
            shfl.sync.bfly.b32 %r9, %r1, 2, 31, 0x55555555;
            DONE: """
        assert self.words(body) == [77 if n % 2 else n ^ 2 for n in range(32)]

    @pytest.mark.parametrize(
        ("members", "by", "message"),
        [("0xffffffff", 2, "is waited for and elsewhere"), ("0x55555554", 2, "not among its members"),
         ("0x55555555", 1, "reads a lane that takes no part")],
    )  # fmt: skip
    def test_shuffle_with_wrong_members(self, members, by, message):
        body = f"""
            and.b32 %r3, %r1, 1; setp.ne.u32 %p1, %r3, 0;
            @%p1 bra DONE;
            shfl.sync.bfly.b32 %r9, %r1, {by}, 31, {members};
            DONE: """
        with pytest.raises(PtxError, match=message):
            self.words(body)

    def test_votes(self):
        body = "setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r9, %p1, -1;"
        assert self.words(body) == [31] * 32
        body = "setp.lt.u32 %p1, %r1, 5; vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p1, -1;"
        assert self.words(body + "selp.b32 %r8, 1, 0, %p2; selp.b32 %r9, 2, %r8, %p3;") == [2] * 32
        assert self.words("redux.sync.max.s32 %r9, %r1, -1;") == [31] * 32

    def test_branches_meet_again(self):
        body = """
            mov.u32 %r9, 0; mov.u32 %r4, 0;
            LOOP: setp.ge.u32 %p1, %r4, %r1; @%p1 bra DONE;
            add.u32 %r9, %r9, %r4; add.u32 %r4, %r4, 1; bra LOOP;
            DONE: shfl.sync.idx.b32 %r9, %r9, 31, 31, -1;"""
        assert self.words(body) == [sum(range(31))] * 32

    def test_threads_wait_for_those_that_take_another_way(self):
        body = """
            and.b32 %r3, %r1, 1; mov.u32 %r9, %r1; setp.eq.u32 %p1, %r3, 0; @%p1 bra FAR;
            MEET: shfl.sync.idx.b32 %r9, %r9, 2, 31, -1; bra DONE;
            FAR: add.u32 %r9, %r9, 100; bra MEET;
            DONE: """
        assert self.words(body) == [102] * 32

    def test_a_function_is_called_from_two_places(self):
        declared = """
            .func (.param .b32 result) twice(.param .b32 given) {
            .reg .b32 %r<5>; .reg .pred %p<2>;
            ld.param.b32 %r1, [given]; setp.gt.u32 %p1, %r1, 9; @%p1 bra LARGE;
            add.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret;
            LARGE: st.param.b32 [result], 1000; ret; }"""
        call = """{{ .param .b32 a; st.param.b32 [a+0], {0}; .param .b32 b; call.uni (b), twice, (a);
            ld.param.b32 {1}, [b+0]; }}"""
        body = call.format("%r1", "%r5") + call.format("%r5", "%r9") + self.END
        found = run(body, np.zeros(32, "u4"), declared=declared)[1][0].tolist()
        twice = [2 * n if n <= 9 else 1000 for n in range(32)]
        assert found == [2 * n if n <= 9 else 1000 for n in twice]

    def test_whole_warps(self):
        body = "setp.lt.u32 %p1, %r1, 31; @!%p1 bra DONE; bar.warp.sync -1; DONE: mov.u32 %r9, 0;"
        with pytest.raises(PtxError, match="elsewhere"):
            self.words(body)

    def test_block_votes(self):
        body = "setp.eq.u32 %p1, %r1, 40; barrier.sync.aligned 0; barrier.red.or.pred %p2, 0, %p1;"
        body += "selp.b32 %r9, 1, 0, %p2;"
        assert self.words(body, threads=64) == [1] * 64

    def test_barrier_in_a_branch(self):
        body = "setp.lt.u32 %p1, %r1, 32; @!%p1 bra DONE; bar.sync 0; DONE: mov.u32 %r9, 0;"
        with pytest.raises(PtxError, match="while its block waits"):
            self.words(body, threads=64)


SHARED = ".extern .shared .align 16 .b8 room[];"
STATIC = ".shared .align 16 .b8 room[512];"
MINE = "mov.u32 %r2, room; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3;"
OTHER = "xor.b32 %r5, %r1, 1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r2, %r5;"
FIRST = "mov.u32 %r8, %ctaid.x; mad.wide.u32 %rd10, %r8, 4, %rd1; setp.eq.u32 %p1, %r1, 0;"
FAR = "xor.b32 %r5, %r1, 32; shl.b32 %r5, %r5, 2; add.u32 %r5, %r2, %r5;"


class TestMemory:
    @pytest.mark.parametrize(
        ("between", "neighbour", "races"),
        [("", OTHER, True), ("bar.warp.sync -1;", OTHER, False), ("bar.sync 0;", OTHER, False),
         ("bar.warp.sync -1;", FAR, True), ("bar.sync 0;", FAR, False)],
    )  # fmt: skip
    @pytest.mark.parametrize("first", ["write", "read"])
    def test_races(self, between, neighbour, races, first):
        begin = "st.shared.u32 [%r4], %r1; bar.sync 0;"
        write, read = "st.shared.u32 [%r4], 5;", "ld.shared.u32 %r9, [%r5];"
        pair = (write, read) if first == "write" else (read, write)
        body = MINE + neighbour + begin + pair[0] + between + pair[1]
        if not races:
            run(body, np.zeros(1, "u4"), threads=64, declared=STATIC)
            return
        with pytest.raises(PtxError, match="races"):
            run(body, np.zeros(1, "u4"), threads=64, declared=STATIC)

    def test_two_threads_write_one_word(self):
        with pytest.raises(PtxError, match="races: writes shared memory"):
            run("mov.u32 %r2, room; st.shared.u32 [%r2], %r1;", np.zeros(1, "u4"), declared=STATIC)

    def test_read_by_many_then_written_in_the_next_round(self):
        body = MINE + """
            st.shared.u32 [%r4], %r1; bar.warp.sync -1;
            ld.shared.u32 %r9, [room+8]; ld.shared.u32 %r9, [room+8]; bar.warp.sync -1;
            st.shared.u32 [%r4], 3;"""  # fmt: skip
        run(body, np.zeros(1, "u4"), declared=STATIC)

    def test_read_by_others_of_the_warp_then_by_the_thread_that_writes(self):
        begin = MINE + OTHER + "st.shared.u32 [%r4], %r1; bar.warp.sync -1; ld.shared.u32 %r9, [%r5];"
        end = "ld.shared.u32 %r9, [%r4]; st.shared.u32 [%r4], 3;"
        run(begin + "bar.warp.sync -1;" + end, np.zeros(1, "u4"), declared=STATIC)
        with pytest.raises(PtxError, match="races: writes shared memory"):
            run(begin + end, np.zeros(1, "u4"), declared=STATIC)

    @pytest.mark.parametrize(
        ("body", "message"),
        [("ld.shared.u32 %r9, [room+512];", "beyond shared memory, 4 bytes at 512 of 512"),
         ("ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [room+8];", "misaligned, 16 bytes"),
         ("ld.shared.u32 %r9, [room];", "nobody has written"),
         ("ld.global.u32 %r9, [%rd1+128];", "beyond global memory"),
         ("ld.global.u32 %r9, [%rd1+-4];", "beyond global memory"),
         ("ld.global.u32 %r9, [%rd1+2];", "misaligned"),
         ("ld.global.u32 %r9, [%rd1]; vadd4.u32.u32.u32 %r9, %r9, %r9, %r9;", "no meaning is known of vadd4"),
         ("st.global.u32 [%rd1], %r1;", "races: writes global memory")],
    )  # fmt: skip
    def test_refused(self, body, message):
        with pytest.raises(PtxError, match=message):
            run(body, np.zeros(32, "u4"), declared=STATIC)

    def test_generic_addresses(self):
        body = MINE + """
            st.shared.u32 [%r4], %r1; bar.sync 0;
            mov.u64 %rd2, room; cvta.shared.u64 %rd3, %rd2; mul.wide.u32 %rd4, %r1, 4;
            add.u64 %rd5, %rd3, %rd4;
            setp.lt.u32 %p1, %r1, 16; add.u64 %rd6, %rd1, %rd4; selp.b64 %rd7, %rd5, %rd6, %p1;
            ld.u32 %r9, [%rd7]; st.global.u32 [%rd6], %r9;"""  # fmt: skip
        _, [found] = run(body, np.arange(100, 132).astype("u4"), declared=STATIC)
        assert found.tolist() == [*range(16), *range(116, 132)]

    @pytest.mark.parametrize(
        ("body", "races"),
        [("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd1], %r7;", True),
         (FIRST + "@%p1 st.global.u32 [%rd10], %r7;", False),
         (FIRST + "@%p1 ld.global.u32 %r9, [%rd1+4]; @%p1 st.global.u32 [%rd10+4], %r7;", True),
         ("red.global.add.u32 [%rd1], 1;", False),
         ("red.global.add.u32 [%rd1], 1; ld.global.u32 %r9, [%rd1];", True)],
    )  # fmt: skip
    def test_blocks_are_not_ordered(self, body, races):
        if races:
            with pytest.raises(PtxError, match="races"):
                run("mov.u32 %r7, 1; bar.sync 0;" + body, np.zeros(32, "u4"), blocks=2)
        else:
            run("mov.u32 %r7, 1;" + body, np.zeros(32, "u4"), blocks=2)

    def test_atomics(self):
        body = MINE + """
            setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [room], 100; bar.sync 0;
            atom.shared.add.u32 %r9, [room], 2; atom.global.max.s32 %r8, [%rd1], %r1; bar.sync 0;
            mad.wide.u32 %rd10, %r1, 4, %rd1; st.global.u32 [%rd10+4], %r9;
            ld.shared.u32 %r9, [room]; @%p1 atom.global.cas.b32 %r8, [%rd1], 31, %r9;"""  # fmt: skip
        _, [found] = run(body, np.zeros(33, "u4"), declared=STATIC)
        assert found[0] == 164
        assert sorted(found[1:].tolist()) == list(range(100, 164, 2))

    def test_arguments_have_the_size_of_parameters(self):
        with pytest.raises(PtxError, match="p0: 4 bytes for 8"):
            launch(module(""), "k", (1,), (32,), [b"1234"], Arena(1024))

    def test_an_array_that_nobody_filled(self):
        arena = Arena(4096)
        at = struct.pack("Q", Arena.BASE + arena.allocate(128))
        with pytest.raises(PtxError, match="global memory that nobody has written"):
            launch(module("ld.global.u32 %r9, [%rd1];"), "k", (1,), (32,), [at], arena)


class TestAsynchronousCopies:
    COPY = MINE + "mad.wide.u32 %rd10, %r1, 4, %rd1; cp.async.ca.shared.global [%r4], [%rd10], 4;"
    READ_NEXT = "cp.async.wait_all; " + OTHER + " bar.warp.sync -1; ld.shared.u32 %r9, [%r5]; "
    KEEP = "mad.wide.u32 %rd10, %r1, 4, %rd2; st.global.u32 [%rd10], %r9;"

    def result(self, body):
        numbers = np.arange(5, 37).astype("u4")
        return run(self.COPY + body, numbers, np.zeros(32, "u4"), declared=STATIC)[1][1].tolist()

    def test_arrives_with_the_wait(self):
        body = "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r9, [%r4];"
        assert self.result(body + self.KEEP) == list(range(5, 37))
        assert self.result("cp.async.wait_all; ld.shared.u32 %r9, [%r4];" + self.KEEP) == list(range(5, 37))

    @pytest.mark.parametrize(
        ("body", "message"),
        [("cp.async.commit_group; ld.shared.u32 %r9, [%r4];", "has not been waited for"),
         ("cp.async.wait_group 0; ld.shared.u32 %r9, [%r4];", "has not been waited for"),
         ("cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r9, [%r4];",
          "has not been waited for"),
         ("cp.async.commit_group;", "ends while cp.async is under way"),
         ("cp.async.wait_all; " + OTHER + " ld.shared.u32 %r9, [%r5];", "races: reads shared"),
         (READ_NEXT + "cp.async.ca.shared.global [%r4], [%rd10], 4; cp.async.wait_all;", "races: copies to")],
    )  # fmt: skip
    def test_too_early(self, body, message):
        with pytest.raises(PtxError, match=message):
            self.result(body)

    def test_older_groups_arrive_first(self):
        body = """cp.async.commit_group; cp.async.ca.shared.global [%r4+128], [%rd10], 4, 0;
        cp.async.commit_group;
            cp.async.wait_group 1; ld.shared.u32 %r9, [%r4]; cp.async.wait_group 0;
            ld.shared.u32 %r8, [%r4+128];
            shl.b32 %r8, %r8, 8; add.u32 %r9, %r9, %r8;"""
        assert self.result(body + self.KEEP) == list(range(5, 37))


class TestMatrices:
    """ldmatrix and mma against the tables of the PTX ISA, written out here on their own."""

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_ldmatrix(self, transposed, count):
        fill = "mul.lo.u32 %r5, %r1, 8; add.u32 %r7, %r2, 0;"
        # Row r of matrix m lies at 16 * (8 * m + r) and holds 64 * m + 8 * r + column.
        for n in range(4):
            fill += (
                f"mad.lo.u32 %r6, %r1, 16, {4 * n}; add.u32 %r6, %r2, %r6; add.u32 %r8, %r5, {2 * n + 1}; "
            )
            fill += f"shl.b32 %r8, %r8, 16; add.u32 %r8, %r8, %r5; add.u32 %r8, %r8, {2 * n}; "
            fill += "st.shared.u32 [%r6], %r8;"
        names = ", ".join(f"%r{20 + n}" for n in range(count))
        trans = ".trans" if transposed else ""
        body = MINE + fill + "bar.sync 0; mad.lo.u32 %r6, %r1, 16, %r2;"
        body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r6];"
        for n in range(count):
            body += f"mad.wide.u32 %rd10, %r1, 4, %rd1; st.global.u32 [%rd10+{128 * n}], %r{20 + n};"
        _, [found] = run(body, np.zeros(32 * count, "u4"), declared=STATIC)
        halves = found.view("u2").reshape(count, 32, 2)
        for m, lane, half in np.ndindex(count, 32, 2):
            # "T0: r0c0 r0c1, T1: r0c2 r0c3, ... T31: r7c6 r7c7" (figure of ldmatrix fragments).
            row, column = lane // 4, lane % 4 * 2 + half
            if transposed:
                row, column = column, row
            assert halves[m, lane, half] == 64 * m + 8 * row + column

    @pytest.mark.parametrize(
        ("name", "kind", "k"),
        [("m16n8k16", "f16", 16), ("m16n8k16", "bf16", 16), ("m16n8k8", "f16", 8), ("m16n8k8", "tf32", 8)],
    )  # fmt: skip
    def test_mma(self, name, kind, k):
        rng = np.random.default_rng(3)
        a, b = (rng.integers(-8, 9, size).astype("f4") for size in ((16, k), (k, 8)))
        c = rng.integers(-8, 9, (16, 8)).astype("f4")
        per = 1 if kind == "tf32" else 2

        def held(element, lane, register):
            """Bits of a register of one thread: `element(n)` is element n of its fragment."""
            values = [float(element(register * per + n)) for n in range(per)]
            if kind == "tf32":
                return struct.unpack("I", struct.pack("f", values[0]))[0]
            if kind == "f16":
                return struct.unpack("I", struct.pack("ee", *values))[0]
            low, high = (struct.unpack("I", struct.pack("f", v))[0] >> 16 for v in values)
            return high << 16 | low

        words = []
        for lane in range(32):
            group, thread = lane >> 2, lane % 4
            # "Matrix Fragments for mma.m16n8k16", "... m16n8k8" of the ISA, per element i.
            if kind == "tf32":
                row_a = [group, group + 8, group, group + 8]
                column_a = [thread, thread, thread + 4, thread + 4]
                row_b = [thread, thread + 4]
            else:
                row_a = [group if i % 4 < 2 else group + 8 for i in range(8)]
                column_a = [2 * thread + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
                row_b = [2 * thread + (i & 1) + (8 if i >= 2 else 0) for i in range(4)]
            registers_a, registers_b = (4, 2) if (k == 16 or kind == "tf32") else (2, 1)
            row = [held(lambda i: a[row_a[i], column_a[i]], lane, n) for n in range(registers_a)]  # noqa: B023
            row += [held(lambda i: b[row_b[i], group], lane, n) for n in range(registers_b)]  # noqa: B023
            for i in range(4):
                value = c[group if i < 2 else group + 8, 2 * thread + (i & 1)]
                row.append(struct.unpack("I", struct.pack("f", value))[0])
            words.append(row)
        given = np.array(words, "u4")
        count = given.shape[1]
        body = f"mad.wide.u32 %rd10, %r1, {4 * count}, %rd2;"
        body += "".join(f"ld.global.u32 %r{20 + n}, [%rd10+{4 * n}];" for n in range(count))
        lists, at = [], 20
        for size in (registers_a, registers_b, 4):
            lists.append("{" + ", ".join(f"%r{at + n}" for n in range(size)) + "}")
            at += size
        body += f"mma.sync.aligned.{name}.row.col.f32.{kind}.{kind}.f32 {lists[2]}, {', '.join(lists)};"
        body += "mad.wide.u32 %rd10, %r1, 16, %rd1;"
        body += "".join(f"st.global.u32 [%rd10+{4 * n}], %r{at - 4 + n};" for n in range(4))
        _, [found, _] = run(body, np.zeros(128, "f4"), given)
        wanted = a @ b + c
        for lane, i in np.ndindex(32, 4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            assert found[4 * lane + i] == wanted[row, column]


@pytest.mark.parametrize(
    ("step", "size", "taken", "least"),
    [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (0, 4, 1, 1), (16, 16, 4, 4), (32, 16, 8, 4), (144, 16,
     4, 4),
     (128, 16, 32, 4)],
)  # fmt: skip
def test_bank_conflicts(step, size, taken, least):
    registers = "{%r20, %r21, %r22, %r23}" if size == 16 else "%r20"
    what = "v4.u32" if size == 16 else "u32"
    body = f"""mov.u32 %r2, room;
        mad.lo.u32 %r5, %r1, 128, %r2; mov.u32 %r6, 0;
        FILL: shl.b32 %r7, %r6, 2; mad.lo.u32 %r8, %r1, 160, %r7; add.u32 %r8, %r8, %r2;
        st.shared.u32 [%r8], 0;
        add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, 40; @%p1 bra FILL;
        bar.sync 0; mad.lo.u32 %r5, %r1, {step}, %r2; ld.shared.{what} {registers}, [%r5];"""
    declared = ".shared .align 16 .b8 room[5120];"
    machine, _ = run(body, np.zeros(1, "u4"), declared=declared, count=True)
    [found] = [t for (_, space, how), t in machine.traffic.items() if (space, how) == ("shared", "load")]
    assert (found.requests, found.taken, found.least) == (1, taken, least)


@pytest.mark.parametrize(("step", "taken", "least"), [(4, 4, 4), (8, 8, 4), (64, 32, 4), (0, 1, 1)])
def test_sectors(step, taken, least):
    body = f"mad.wide.u32 %rd10, %r1, {step}, %rd1; ld.global.u32 %r9, [%rd10];"
    machine, _ = run(body, np.zeros(512, "u4"), count=True)
    [found] = machine.traffic.values()
    assert (found.requests, found.taken, found.least) == (1, taken, least)
