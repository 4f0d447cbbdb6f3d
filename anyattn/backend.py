"""What a backend is: a small object that says what it takes, refuses with reasons, and runs a call.

The declarations are read by dispatch, by the conformance suite (what it must run and may skip) and by the
table in the documentation, so each is made once, here or in the backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn.arrays import FLOAT_DTYPES, Array

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from anyattn.call import AttentionCall
    from anyattn.kernels.key import KernelKey

__all__ = ["CAPABILITIES", "Backend"]

CAPABILITIES: dict[str, str] = {
    "causal": "causal=True",
    "window": "window=(left, right)",
    "mask": "mask= as an expression, a function or a boolean array",
    "bias": "bias=",
    "score_mod": "score_mod= as an expression or a function",
    "softcap": "softcap=",
    "sinks": "sinks=",
    "kv_lengths": "kv_lengths=",
    "q_offset": "q_offset= other than its default",
    "dropout": "dropout= above 0",
    "grouped_heads": "fewer key/value heads than query heads",
    "return_lse": "return_lse=True",
    "weights": "attention_weights",
    "stats": "attention_stats",
    "gradients": "the array library can differentiate through the call",
    "int8": "int8 keys and values with a scale for each token and head, of a quantised cache",
    "traced": "arrays without values: jit tracers, lazy arrays",
    "strict_masking": "under use(strict=True) a hidden key contributes nothing even if it is NaN",
    "deterministic_backward": "the same backward twice gives the same bits",
    "linear_attention": "linear_attention, rule 'linear'",
    "gated_rule": "linear_attention with decay=",
    "delta_rule": "linear_attention with beta=",
    "cu_seqlens": "linear_attention with cu_seqlens=",
}


class Backend:
    """Base class of backends; a duck type with the same attributes will do.

    Calls are of `anyattn.call.AttentionCall`; who declares "linear_attention" gets those of
    `anyattn.linear.call.LinearCall` too, told apart by `operation`. Each backend types its methods by what it
    takes.

    Attributes
    ----------
    name : str
        Lower-case identifier, the name of its entry point in the group `anyattn.backends`.
    arrays : tuple of str
        Dotted names of the array types it takes ("numpy.ndarray"); "*" is every array-API library.
    dtypes : frozenset of str
    devices : tuple of str
        "cpu", "cuda", ...; "*" is every device.
    capabilities : frozenset of str
        Names from `CAPABILITIES`.
    requires : tuple of str
        Import names that must be installed; found without importing them.
    extra : str or None
        The pip extra of anyattn that installs them.
    """

    name: str = ""
    arrays: tuple[str, ...] = ()
    dtypes: frozenset[str] = frozenset(FLOAT_DTYPES)
    devices: tuple[str, ...] = ()
    capabilities: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    extra: str | None = None

    def unsupported(self, call: Any) -> tuple[str, ...]:
        """Why this backend does not take the call, a sentence each; empty if it does.

        The base class answers from the declarations; a backend with further limits adds to its answer.
        """
        reasons = []
        if "*" not in self.arrays and call.array_type not in self.arrays:
            reasons.append(f"takes arrays of {', '.join(self.arrays) or 'no library'}, not {call.array_type}")
        if call.dtype not in self.dtypes:
            reasons.append(f"takes {', '.join(sorted(self.dtypes)) or 'no dtype'}, not {call.dtype}")
        if "*" not in self.devices and call.device_kind not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices) or 'no device'}, not {call.device_kind}")
        missing = call.features - self.capabilities
        reasons += [f"has no {name} ({CAPABILITIES[name]})" for name in CAPABILITIES if name in missing]
        return tuple(reasons)

    def notes(self, call: Any) -> tuple[str, ...]:
        """What the caller should know of how the call would run: copies, quadratic memory, approximations."""
        return ()

    def unordered(self, call: AttentionCall) -> str | None:
        """Why the same backward of a call twice may give other bits; None where it gives the same.

        The base class answers from the declarations; a backend whose answer depends on the call refines it.
        """
        declared = "deterministic_backward" in self.capabilities
        return None if declared else "does not declare deterministic_backward"

    def run(self, call: Any) -> Any:
        """Run a call that `unsupported` has no reason against.

        Returns
        -------
        (out, lse) for "attention": out (..., Hq, Lq, Dv) in the dtype of the call, lse (..., Hq, Lq) in the
        accumulation dtype, or None where `call.return_lse` is False; an array (..., Hq, R, Lk) in the dtype
        of the call for "weights"; a dict of arrays in the accumulation dtype for "stats".
        (out, state, normalizer) for "linear", whose call is an `anyattn.linear.call.LinearCall`: out
        (..., Hq, Lq, Dv) in the dtype of the call, state (..., Hkv, F, Dv) and normalizer (..., Hkv, F) in
        the accumulation dtype, with all batch axes or one of sequences; normalizer None without `normalize`.
        """
        raise NotImplementedError

    def prepare(self, call: AttentionCall) -> Callable[..., tuple[Array, Array | None]] | None:
        """A function that runs calls of "attention" like this one, or None where `run` is all there is.

        It is called as ``f(q, k, v, *others)``, with arrays as in `call.q`, `call.k`, `call.v` and
        `call.others`, and gives what `run` gives. It serves `call` and, without `unsupported` being asked
        again, all later calls of the same signature: their arrays have the types, shapes, strides, alignment,
        dtypes and devices of this call's and coincide where these do, their options and settings (`use`,
        ANYATTN_BACKEND) are the same. Numbers in expressions, and arrays in them that `call.others` does not
        list, are the same too: they were made for `call` and may be kept.

        The values in arrays are not, so none may be read here; what a backend derives from the values of
        `others` (which tiles to visit) it derives in every call. Nor is what a library lets its users switch
        (autocast, its number of threads) part of a signature.

        It may have a method ``resized(k, v)``, which gives a function for calls that differ in the number of
        keys alone, as many as in these arrays like `call.k` and `call.v`, or None where it cannot. Strides of
        k and v may differ too, those of scales do not. Row 0 stands at Lk - Lq there, unless `call.others`
        has the offset. It is asked where no other array lies along the keys, and answers without
        `unsupported` being asked again.

        A backend may have a method ``converted(name, value)``, which hears of each array that the front door
        makes anew in such a call from an argument, and may raise.

        The function is kept while there is room: it holds on to none of the caller's arrays, nor to `call`.
        No call that is traced or takes part in automatic differentiation is prepared, nor one without query
        heads.
        """
        return None

    def warm_up(self, dtypes: Collection[str]) -> Iterator[tuple[str, float]]:
        """Make kernels ready that calls of these dtypes are likely to need, for later processes too.

        Optional: `anyattn warmup` asks it of each backend. Here for one without kernels to compile.

        Yields
        ------
        (str, float)
            What was made ready, as a user would call it, and the seconds it took, as soon as it is.
        """
        yield from ()

    def source(self, call: AttentionCall) -> str | None:
        """The code that is generated for a call; None where the expressions are evaluated as they are."""
        return None

    def kernel_key(self, call: AttentionCall) -> KernelKey | None:
        """The complete key of the code that is generated for a call; None likewise."""
        return None

    def __repr__(self) -> str:
        return f"<anyattn backend {self.name}>"
