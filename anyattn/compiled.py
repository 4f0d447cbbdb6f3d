"""`compile`: attention with its structure fixed once, for calls that differ in arrays and sizes only.

What may be wrong with the options is found here, on a description of a call of sample sizes, and not at the
first call. A call then checks q, k and v against what was compiled, puts other arrays in the places of
captured ones where it was given any, and goes to the backend that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from anyattn import arrays, dispatch, registry, settings
from anyattn.arrays import FLOAT_DTYPES, Array
from anyattn.attention import MaskLike, ScoreLike, Window, attention
from anyattn.call import AttentionCall
from anyattn.describe import describe
from anyattn.explain import Explanation, explain
from anyattn.expr.captures import Capture, arrays_of, find_captures, rebind
from anyattn.expr.listing import listing
from anyattn.expr.nodes import Aligned, Deferred, Expr, Load, Table, walk
from anyattn.expr.program import Program, lower
from anyattn.kernels.key import KernelKey, common_versions
from anyattn.masks import Mask, as_mask
from anyattn.numbers import integer
from anyattn.options import OPTIONS, Options
from anyattn.scores import Score, as_score

__all__ = ["CompiledAttention", "compile"]

# Arguments of `attention` that hold values of a call; `compile` is told whether calls will give them.
_PER_CALL = ("bias", "sinks", "kv_lengths", "q_offset")
# Features of a call that are not in its expressions and change a kernel.
_FLAGS = frozenset({"sinks", "return_lse"})
# Sizes of the call that is described when compiling, where no captured array says others. What is settled by
# sizes (`random_blocks` has at most as many blocks as there are) is settled for a call of usual length.
_SAMPLE_LENGTH = 128
_USUAL_LENGTH = 1024
_SAMPLE_BATCH = 2
_MODULES = {"jax": "jax.numpy", "dask": "dask.array"}


def compile(  # noqa: A001
    *,
    mask: MaskLike | None = None,
    score_mod: ScoreLike | None = None,
    dtype: Any,
    head_dim: int,
    v_head_dim: int | None = None,
    backend: str | None = None,
    causal: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    bias: bool = False,
    sinks: bool = False,
    kv_lengths: bool = False,
    q_offset: bool = False,
    layout: str = "bhld",
    return_lse: bool = False,
) -> CompiledAttention:
    """Attention with everything fixed that its code depends on.

    Parameters
    ----------
    mask, score_mod, causal, window, softcap, scale, layout, return_lse
        As for `attention`. Arrays that they capture are those of every call, unless a call gives others.
    dtype : str or dtype
        Of q, k and v: float16, bfloat16, float32 or float64.
    head_dim, v_head_dim : int
        Last axis of q and k, and of v (default: the same).
    backend : str, optional
        The backend of every call. Default: the one that `attention` would choose here for arrays of the
        library of the captured arrays, NumPy if there are none.
    bias, sinks, kv_lengths, q_offset : bool, default False
        Whether every call gives the argument of this name.

    Returns
    -------
    CompiledAttention
        Called as `f(q, k, v, **arrays)`.

    Raises
    ------
    TypeError, ValueError
        For what `attention` refuses.
    anyattn.errors.UnsupportedCallError
        If the backend refuses such calls, with its reasons.

    Examples
    --------
    >>> slopes = np.array([0.5, 0.25], "f4")
    >>> f = aa.compile(
    ...     score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j), dtype="float32", head_dim=64
    ... )
    >>> out = f(q, k, v)
    >>> out = f(q, k, v, slopes=other_slopes)

    Notes
    -----
    An array that a function indexes by index expressions is read in every call, and one changed in place is
    noticed. Any other of the same dtype and rank may take its place, of another length too unless the
    function used its sizes (`len(slopes)`, `slopes.shape`). What is read while the function is traced,
    `slopes[0]`, `slopes.max()`, `float(slope)` or a loop, is part of the code from then on, so a call that
    gives another such array is refused. Lists and tuples of numbers are copied when they are traced: changing
    one later changes nothing, but a call may give others by name.

    `scores.relative_keys` holds queries, which every call gives anew: `f(q, k, v, q=q)`.
    """
    declared = {"bias": bias, "sinks": sinks, "kv_lengths": kv_lengths, "q_offset": q_offset}
    for name, given in declared.items():
        if not isinstance(given, bool):
            raise TypeError(
                f"{name}: wanted True or False, whether calls will give it, got {type(given).__name__}; "
                f"give its values to the compiled function"
            )
    head_dim = integer(head_dim, "head_dim", least=1)
    v_head_dim = head_dim if v_head_dim is None else integer(v_head_dim, "v_head_dim", least=0)
    options = Options(
        causal=causal,
        window=window,
        mask=None if mask is None else as_mask(mask, "mask"),
        score_mod=None if score_mod is None else as_score(score_mod),
        softcap=softcap,
        scale=scale,
        layout=layout,
        return_lse=return_lse,
    )
    names = frozenset(name for name in _PER_CALL if declared[name])
    return CompiledAttention(options, names, _dtype(dtype), head_dim, v_head_dim, backend)


class CompiledAttention:
    """What `compile` gives: call it as `f(q, k, v, **arrays)`.

    Attributes
    ----------
    dtype : str
    head_dim, v_head_dim : int
    backend : str
        Name of the backend that runs every call.
    arrays : dict of str to str
        Names that a call may give, with what is wanted; those that `compile` was told of, a call must give.
    program : Program
        The structure that the code was made from.
    """

    def __init__(
        self,
        options: Options,
        per_call: frozenset[str],
        dtype: str,
        head_dim: int,
        v_head_dim: int,
        backend: str | None,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self._accumulate = "float64" if dtype == "float64" else "float32"
        self._options = options
        self._per_call = per_call
        given = [x for x in (options.mask, options.score_mod) if x is not None]
        roots = [x.expr for x in given]
        self._captures = find_captures(roots, [read for x in given for read in x.reads])
        for name in sorted(per_call & self._captures.keys()):
            raise ValueError(
                f"{name}: calls will give attention's {name}, and a function captures an array of that name; "
                f"call the captured array something else"
            )
        self._sample = self._sample_arguments(roots, backend)
        self._call = describe("attention", *self._sample[0], self._sample[1])
        self._chosen = dispatch.choose(self._call, backend)
        self.backend: str = self._chosen.name
        self.program: Program = lower(self._call.visible, self._call.score)

    @property
    def arrays(self) -> dict[str, str]:
        found = {name: f"{name} of attention" for name in sorted(self._per_call)}
        for name, capture in self._captures.items():
            if not capture.fixed:
                found[name] = f"{capture.dtype(self._accumulate)} {tuple(capture.value.shape)}"
        return found

    @cached_property
    def source(self) -> str:
        """The code that was generated: a kernel's source, or for `reference` what is evaluated."""
        generated: str | None = self._chosen.source(self._call)
        if generated is not None:
            return generated
        how = "shows no code of its own; it computes this"
        if self.backend == "reference":
            how = "evaluates this with array-API calls, a block of keys at a time"
        head = (
            f"# {self.backend} {how}.\n"
            f"# q, k: {self.dtype} (..., {self.head_dim}); v: (..., {self.v_head_dim}); "
            f"scores and sums: {self._accumulate}\n"
        )
        return head + listing(self.program, _labels(self._call, self.program))

    @cached_property
    def cache_key(self) -> KernelKey:
        """The complete key of the code, which prints in full; see `anyattn.kernels.key`."""
        own: KernelKey | None = self._chosen.kernel_key(self._call)
        if own is not None:
            return own
        return KernelKey(
            backend=self.backend,
            kernel="attention",
            structure=self.program.text,
            dtype=self.dtype,
            accumulate=self._accumulate,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            target="array API",
            features=self._call.features & _FLAGS,
            versions=common_versions(),
        )

    def explain(
        self, q: Array | None = None, k: Array | None = None, v: Array | None = None, /, **arrays: Any
    ) -> Explanation:
        """What `anyattn.explain` says of a call; without arrays, of one of sample sizes."""
        if q is None:
            if k is not None or v is not None or arrays:
                raise TypeError("explain: wanted q, k and v, or nothing")
            (q, k, v), options = self._sample
        else:
            self._check(q, v)
            options = self._bound(arrays)
        return explain(q, k, v, backend=self.backend, **_given(options))

    def __call__(self, q: Array, k: Array, v: Array, /, **arrays: Any) -> Any:
        """Attention of `q`, `k` and `v`.

        Parameters
        ----------
        q, k, v : arrays
            As for `attention`, of the dtype and the last axes that were compiled for.
        **arrays
            Other values for captured arrays, by name; and each of bias, sinks, kv_lengths and q_offset that
            `compile` was told of. `arrays` lists them.

        Returns
        -------
        out, or (out, lse) if compiled with `return_lse=True`
        """
        self._check(q, v)
        return attention(q, k, v, backend=self.backend, **_given(self._bound(arrays)))

    def __repr__(self) -> str:
        parts = [f"mask={self._options.mask!r}"] if self._options.mask is not None else []
        parts += [f"score_mod={self._options.score_mod!r}"] if self._options.score_mod is not None else []
        parts += [f"{name}=True" for name in ("causal", "return_lse") if getattr(self._options, name)]
        for name in ("window", "softcap"):
            value = getattr(self._options, name)
            parts += [f"{name}={value}"] if value is not None else []
        parts += [f"arrays: {', '.join(self.arrays)}"] if self.arrays else []
        what = "; ".join(parts) or "plain"
        return (
            f"<compiled attention {self.dtype} D={self.head_dim} Dv={self.v_head_dim} on {self.backend}, "
            f"{what}; key {self.cache_key.digest}>"
        )

    def _check(self, q: Any, v: Any) -> None:
        """q and v against what was compiled; `attention` holds k to q, and v to both."""
        for name, x, size in (("q", q, self.head_dim), ("v", v, self.v_head_dim)):
            if not arrays.is_array(x):
                raise TypeError(f"{name}: wanted an array, got {type(x).__name__}")
            if arrays.dtype_name(x) != self.dtype:
                raise TypeError(
                    f"{name}: wanted dtype {self.dtype} as it was compiled for, got {arrays.dtype_name(x)}"
                )
            if x.ndim and x.shape[-1] != size:
                raise ValueError(
                    f"{name}: wanted {size} features on the last axis as it was compiled for, "
                    f"got shape {tuple(x.shape)}"
                )

    def _bound(self, given: Mapping[str, Any]) -> Options:
        """The options of a call that gives these arrays."""
        known = self.arrays
        for name in given:
            if name not in known and name not in self._captures:
                raise TypeError(
                    f"{name}: no captured array or declared argument has this name; "
                    f"there are {', '.join(known) or 'none'}"
                )
        for name in sorted(self._per_call - given.keys()):
            raise TypeError(f"{name}: wanted in every call, as compile(..., {name}=True) said")
        for name, capture in self._captures.items():
            if capture.per_call and name not in given:
                raise TypeError(f"{name}: wanted in every call: it holds the queries of one call")
        options = replace(self._options, **{name: given[name] for name in self._per_call})
        others: dict[Capture, Any] = {
            self._captures[name]: x for name, x in given.items() if name in self._captures
        }
        if not others:
            return options
        mask, score = options.mask, options.score_mod
        visible, modified = rebind(
            [None if mask is None else mask.expr, None if score is None else score.expr],
            others,
            self._accumulate,
        )
        return replace(
            options,
            mask=None if visible is None else Mask(visible, repr(mask)),
            score_mod=None if modified is None else Score(modified, repr(score)),
        )

    def _sample_arguments(
        self, roots: list[Expr], backend: str | None
    ) -> tuple[tuple[Array, Array, Array], Options]:
        """q, k, v and options of a call that the captured arrays fit."""
        # Lengths without offsets are for one query a call, where anything depends on positions.
        one_query = "kv_lengths" in self._per_call and "q_offset" not in self._per_call
        batch, heads, q_len, k_len = _sample_sizes(roots, one_query)
        xp, device = _library(roots, backend)
        dtype = _dtype_in(xp, self.dtype)

        def zeros(*shape: int, of: Any = dtype) -> Array:
            return xp.zeros(shape, dtype=of, device=device)

        q = zeros(*batch, heads, q_len, self.head_dim)
        if arrays.dtype_name(q) != self.dtype:
            raise ValueError(
                f"dtype: wanted {self.dtype}, but arrays of {arrays.library(q)} are {q.dtype} here"
            )
        k, v = (zeros(*batch, heads, k_len, size) for size in (self.head_dim, self.v_head_dim))
        index = arrays.index_dtype(xp, arrays.device(q))
        values = {
            "bias": lambda: zeros(*(1 for _ in batch), 1, 1, 1),
            "sinks": lambda: zeros(heads),
            "kv_lengths": lambda: zeros(*batch, of=index) + k_len,
            "q_offset": lambda: zeros(*batch, of=index),
        }
        given = {name: values[name]() for name in self._per_call}
        if self._options.layout == "blhd":
            q, k, v = (arrays.moveaxis(xp, x, -3, -2) for x in (q, k, v))
        return (q, k, v), replace(self._options, **given)


def _given(options: Options) -> dict[str, Any]:
    """Options as arguments of `attention`."""
    return {name: getattr(options, name) for name in OPTIONS["attention"]}


def _dtype(dtype: Any) -> str:
    """The name of a dtype, given as a name or as any library's dtype."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    if name not in FLOAT_DTYPES:
        raise TypeError(f"dtype: wanted {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    return name


def _parts(roots: list[Expr]) -> list[Table | Aligned]:
    """Every array that unbound expressions hold."""
    return [part for root in roots for node in walk(root) for part in arrays_of(node)]


def _sample_sizes(roots: list[Expr], one_query: bool) -> tuple[tuple[int, ...], int, int, int]:
    """(batch shape, heads, Lq, Lk) that the captured arrays fit."""
    heads = 1
    deferred = any(isinstance(node, Deferred) for root in roots for node in walk(root))
    k_len = _USUAL_LENGTH if deferred else _SAMPLE_LENGTH
    q_len = 1 if one_query else k_len
    entries: int | None = None
    lead: tuple[int, ...] | None = None
    for part in _parts(roots):
        shape = tuple(part.value.shape)
        if isinstance(part, Table):
            sizes = dict(zip(part.axes, shape, strict=True))
            heads, entries = sizes.get("h", heads), sizes.get("b", entries)
            if "row" in sizes:
                q_len, lead = sizes["row"], max(lead or (), shape[:-3], key=len)
            continue
        q_len = shape[-2] * part.block if shape[-2] > 1 else q_len
        k_len = shape[-1] * part.block if shape[-1] > 1 else k_len
        if len(shape) > 2:
            heads = shape[-3] if shape[-3] > 1 else heads
            lead = max(lead or (), shape[:-3], key=len)
    if entries is not None and (lead is None or len(lead) < 2):
        lead = (entries,)
    return (_SAMPLE_BATCH,) if lead is None else lead, heads, q_len, k_len


def _library(roots: list[Expr], backend: str | None) -> tuple[Any, Any]:
    """The namespace and the device of the captured arrays, or what the backend takes if there are none."""
    for part in _parts(roots):
        if isinstance(part, Aligned) or not part.host:
            return arrays.namespace(part.value), arrays.device(part.value)
    from importlib import import_module

    root = "numpy"
    forced = settings.forced_backend(backend)
    if forced is not None:
        status = registry.find(forced[0])
        taken = status.backend.arrays if status.available else ("*",)
        if "*" not in taken and "numpy.ndarray" not in taken:
            root = taken[0].partition(".")[0]
    module = import_module(_MODULES.get(root, root))
    return arrays.namespace(module.zeros(1)), None


def _dtype_in(xp: Any, name: str) -> Any:
    if name == "bfloat16" and not hasattr(xp, name):
        try:
            import ml_dtypes
        except ImportError as error:
            raise ImportError(
                "dtype: bfloat16 of this array library comes from ml_dtypes: pip install ml_dtypes"
            ) from error
        return ml_dtypes.bfloat16
    return getattr(xp, name)


def _labels(call: AttentionCall, program: Program) -> list[str]:
    """What the arrays of a program are called, tables first."""
    labels: dict[int, str] = {}
    for root in (call.visible, call.score):
        for node in () if root is None else walk(root):
            if isinstance(node, Load):
                labels[id(node.table.value)] = node.table.label
            elif isinstance(node, Aligned):
                labels[id(node.value)] = node.label
    return [labels[id(x)] for x in (*program.tables, *program.aligned)]
