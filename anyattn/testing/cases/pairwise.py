"""All pairs of options: every value of one option meets every value of every other in some case.

`ROWS` is written out so that the kit needs no generator and a case's name means the same everywhere. It comes
from `python -m anyattn.testing.cases.regenerate_pairs`, which needs allpairspy; a test holds that it covers
all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, call
from anyattn.testing.cases import makers

FAMILY = "pairs"

FACTORS: dict[str, tuple[str, ...]] = {
    "lengths": ("5x9", "9x5", "1x7", "3x140"),
    "dtype": ("float32", "float16", "bfloat16", "float64"),
    "batch": ("none", "two", "q_only", "broadcast"),
    "heads": ("4:4", "4:2", "3:1"),
    "layout": ("bhld", "blhd"),
    "kv_lengths": ("none", "sequence", "array"),
    "q_offset": ("default", "int", "array"),
    "causal": ("no", "yes"),
    "window": ("none", "left", "both"),
    "mask": ("none", "array", "full", "documents", "function"),
    "bias": ("none", "keys", "full"),
    "score_mod": ("none", "alibi", "function", "sum"),
    "softcap": ("none", "2"),
    "sinks": ("none", "array"),
    "scale": ("default", "0.3"),
    "returns": ("out", "out+lse", "weights", "stats"),
}

ROWS = """
5x9   float32  none      4:4 bhld none     default no  none none      none none     none none  default out
9x5   float16  two       4:2 blhd sequence int     yes left array     keys alibi    2    array 0.3     out
1x7   bfloat16 q_only    3:1 blhd array    array   no  both full      full function 2    none  0.3     out+lse
3x140 float64  broadcast 3:1 bhld sequence array   yes none documents full sum      none array default weights
3x140 bfloat16 two       4:4 bhld array    int     no  left function  keys sum      none none  default stats
1x7   float16  none      4:2 bhld none     array   yes both function  none function 2    array default stats
9x5   float32  broadcast 4:4 blhd array    default yes both documents none alibi    2    none  0.3     weights
5x9   float64  q_only    4:2 blhd none     int     no  none full      keys none     none array 0.3     out+lse
5x9   float16  broadcast 3:1 blhd none     default no  left array     full sum      none none  default stats
9x5   bfloat16 none      3:1 bhld sequence int     no  both none      full alibi    none array 0.3     out+lse
1x7   float32  two       3:1 bhld sequence default yes left full      none none     none array default out+lse
3x140 float32  q_only    4:2 blhd array    default yes none none      keys function 2    array 0.3     stats
1x7   float64  broadcast 4:4 blhd sequence int     no  both function  keys function none none  0.3     out
5x9   bfloat16 two       4:2 bhld none     array   yes both documents full none     2    none  0.3     weights
9x5   float64  q_only    4:4 bhld array    array   no  left array     none sum      2    array default out
3x140 float16  none      4:4 blhd array    array   no  left full      keys alibi    none array default weights
3x140 float16  q_only    3:1 blhd none     int     no  none documents keys alibi    none array default out
9x5   float64  none      4:4 blhd none     default no  none function  full alibi    none array default stats
1x7   bfloat16 broadcast 4:2 blhd array    default no  none array     none none     none array default weights
3x140 float32  broadcast 4:4 blhd sequence int     no  both array     none sum      none array 0.3     out+lse
5x9   float32  none      4:2 blhd sequence array   no  left documents full function none array default stats
1x7   float16  q_only    4:2 blhd sequence array   no  left none      full sum      none array default weights
5x9   float16  two       3:1 blhd array    int     no  none function  full none     none array default weights
9x5   float64  two       4:2 blhd array    int     no  none none      full function none array default weights
9x5   float16  none      4:2 blhd array    int     no  none full      full sum      none array default out
1x7   float16  broadcast 4:2 blhd array    int     no  none full      full alibi    none array default stats
1x7   float16  broadcast 4:2 blhd array    int     no  none documents full none     none array default out+lse
9x5   float32  broadcast 4:2 blhd array    int     no  none function  full none     none array default stats
5x9   bfloat16 broadcast 4:2 blhd array    int     no  none none      full alibi    none array default out
3x140 float16  none      4:2 blhd array    int     no  none array     full none     none array default stats
9x5   float16  q_only    4:2 blhd array    int     no  none function  full none     none array default out+lse
9x5   float16  broadcast 4:2 blhd array    int     no  none array     full function none array default stats
"""


def rows() -> list[dict[str, str]]:
    """The table, one dict of factor to value for each case."""
    return [dict(zip(FACTORS, line.split(), strict=True)) for line in ROWS.strip().splitlines()]


def cases() -> Iterator[Case]:
    """One case for each row."""
    for number, row in enumerate(rows()):
        yield _case(number, row)


def _case(number: int, row: dict[str, str]) -> Case:
    q_len, k_len = (int(n) for n in row["lengths"].split("x"))
    heads, kv_heads = (int(n) for n in row["heads"].split(":"))
    q_batch, k_batch = {
        "none": ((), ()),
        "two": ((2,), (2,)),
        "q_only": ((2,), ()),
        "broadcast": ((2, 1), (3,)),
    }[row["batch"]]
    batch = {"none": (), "two": (2,), "q_only": (2,), "broadcast": (2, 3)}[row["batch"]]
    full = (*batch, heads, q_len, k_len)
    options: dict[str, Any] = {
        "layout": row["layout"],
        "causal": row["causal"] == "yes",
        "window": {"none": None, "left": (3, None), "both": (2, 1)}[row["window"]],
        "mask": {
            "none": None,
            "array": Drawn("mask", (q_len, k_len), "bool", "mostly true"),
            "full": Drawn("mask", full, "bool", "mostly true"),
            "documents": Entry("masks", "documents", (Drawn("ids", (k_len,), "int", "few ids"),)),
            "function": Function(makers.by_batch_and_head),
        }[row["mask"]],
        "bias": {"none": None, "keys": Drawn("bias", (1, k_len)), "full": Drawn("bias", full)}[row["bias"]],
        "score_mod": {
            "none": None,
            "alibi": Entry("scores", "alibi", (heads,)),
            "function": Function(makers.affine, (Drawn("factor", (heads,)), Drawn("shift", (k_len,)))),
            "sum": Entry("scores", "alibi", (Drawn("slopes", (heads,), how="positive"),))
            + Entry("scores", "relative_bias", (Drawn("table", (heads, 5)),)),
        }[row["score_mod"]],
        "softcap": {"none": None, "2": 2.0}[row["softcap"]],
        "sinks": {"none": None, "array": Drawn("sinks", (heads,))}[row["sinks"]],
        "scale": {"default": None, "0.3": 0.3}[row["scale"]],
    }
    lengths: Any = [k_len, max(k_len - 4, 0), 2][: batch[-1]] if batch else k_len - 2
    if row["kv_lengths"] == "array":
        lengths = Given("kv_lengths", tuple(lengths) if isinstance(lengths, list) else lengths)
    if row["kv_lengths"] != "none":
        options["kv_lengths"] = lengths
    if row["q_offset"] == "array":
        options["q_offset"] = Given("q_offset", tuple(range(3, 3 - batch[-1], -1)) if batch else 1)
    elif row["q_offset"] == "int" or row["kv_lengths"] != "none":
        # With lengths and several rows the contract wants the offset said; 0 is its usual choice for padding.
        options["q_offset"] = 2 if row["q_offset"] == "int" else None if q_len == 1 else 0
    operation = {"out": "attention", "out+lse": "attention"}.get(row["returns"], row["returns"])
    if row["returns"] == "out+lse":
        options["return_lse"] = True
    if operation == "stats":
        options["stats"] = ("key_mass", "entropy", "max")
    return call(
        f"pairs {number}", FAMILY, "all pairs: " + " ".join(f"{name}={value}" for name, value in row.items()),
        heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, v_dim=5, q_batch=q_batch, k_batch=k_batch,
        dtype=row["dtype"], operation=operation, **options,
    )  # fmt: skip
