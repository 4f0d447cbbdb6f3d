"""What anyattn knows of array libraries, in one place.

Everything here works on the type or the metadata of an array and never imports a library that the caller has
not imported: the namespace comes from `array_api_compat`, the rest from names. A library that is not listed
works when it follows the array API standard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import array_api_compat

if TYPE_CHECKING:
    import numpy

Array = Any
Namespace = Any

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_ROOTS = {"jaxlib": "jax"}
_ARRAY_TYPES = {
    "numpy": "numpy.ndarray",
    "torch": "torch.Tensor",
    "cupy": "cupy.ndarray",
    "jax": "jax.Array",
    "dask": "dask.array.Array",
    "array_api_strict": "array_api_strict.Array",
}
_CLASS_NAMES = {
    "numpy": {"ndarray"},
    "torch": {"Tensor"},
    "cupy": {"ndarray"},
    "jax": {"ArrayImpl", "Tracer", "Array"},
    "dask": {"Array"},
    "array_api_strict": {"Array"},
}
# Their extra meaning (masked entries, two axes always) would be lost. By name: library and reason.
_REFUSED = {
    "MaskedArray": ("numpy", "masked entries would be ignored"),
    "matrix": ("numpy", "numpy.matrix always has two axes"),
    "MaskedTensor": ("torch", "masked entries would be ignored"),
    "CausalBias": (
        "torch",
        "it has no entries: causal=True says what it says, with q_offset=0 at the upper left",
    ),
}


_libraries: dict[type, str | None] = {}


def _library_of_type(cls: type) -> str | None:
    if cls not in _libraries:
        _libraries[cls] = _find_library(cls)
        if _libraries[cls] == "torch":
            from anyattn.dynamo import keep_outside

            keep_outside()
    return _libraries[cls]


def _find_library(cls: type) -> str | None:
    if cls.__module__ == "numpy" and any(base.__name__ == "generic" for base in cls.__mro__):
        return None  # a NumPy scalar is taken where a Python number is
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        root = _ROOTS.get(root, root)
        if root in _CLASS_NAMES and base.__name__ in _CLASS_NAMES[root]:
            return root
    if hasattr(cls, "__array_namespace__"):
        return cls.__module__.partition(".")[0]
    return None


def is_array(x: object) -> bool:
    """Whether `x` is an array of a library that anyattn can compute with."""
    return _library_of_type(type(x)) is not None


def refused_type(x: Any) -> str | None:
    """Why an array type is not taken although its library is, or None."""
    if _library_of_type(type(x)) == "torch":
        torch = sys.modules["torch"]
        if x.layout is not torch.strided:
            return f"its layout is {x.layout}"
        if x.is_nested:
            return "it is nested"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit.trace would keep what it gives as a constant (torch.export does not)"
    for base in type(x).__mro__:
        if base.__name__ in _REFUSED:
            root, reason = _REFUSED[base.__name__]
            if base.__module__.partition(".")[0] == root:
                return reason
    return None


def check_plain(x: Any, label: str) -> None:
    """Raise unless `x` is an array whose type means no more than its entries."""
    if not is_array(x):
        raise TypeError(f"{label}: wanted an array, got {type(x).__name__}")
    refused = refused_type(x)
    if refused:
        raise TypeError(f"{label}: {type(x).__name__} is not taken, {refused}; give a plain array")


def check_beside(x: Any, label: str, like: Array, called: str) -> None:
    """Raise unless `x` is a plain array of the library and device of `like`, `called` so in the message."""
    check_plain(x, label)
    if library(x) != library(like):
        raise TypeError(f"{label}: wanted an array of {library(like)} like {called}, got one of {library(x)}")
    here, there = device(x), device(like)
    if here is not None and there is not None and here != there:
        raise ValueError(f"{label}: wanted an array on device {there} like {called}, got one on {here}")


def library(x: Array) -> str:
    """Name of the library that `x` belongs to: "numpy", "torch", "jax", "dask", ..."""
    name = _library_of_type(type(x))
    if name is None:
        raise TypeError(
            f"{type(x).__module__}.{type(x).__qualname__} is not an array of a library that anyattn knows"
        )
    return name


def array_type(x: Array) -> str:
    """Dotted public name of the array type, as backends declare it ("numpy.ndarray")."""
    cls = type(x)
    return _ARRAY_TYPES.get(library(x), f"{cls.__module__}.{cls.__qualname__}")


def namespace(x: Array) -> Namespace:
    """The array API namespace of `x`."""
    if library(x) == "numpy":
        return _numpy_namespace()
    return array_api_compat.array_namespace(x)


@cache
def _numpy_namespace() -> Namespace:
    """NumPy itself since 2.1: that of array-api-compat imports all of NumPy, which takes 0.1 s more."""
    import numpy

    if numpy.__array_api_version__ >= "2023.12":
        return numpy
    return array_api_compat.array_namespace(numpy.empty(0))


_dtype_names: dict[tuple[type, Any], str] = {}


def dtype_name(x: Array) -> str:
    """Name of the dtype of `x` without its library: "float32", "bfloat16", "int64", "bool"."""
    # The class goes first: array-api-strict warns when its dtypes are compared with another library's.
    key = (type(x.dtype), x.dtype)
    if key not in _dtype_names:
        _dtype_names[key] = str(x.dtype).rpartition(".")[2]
    return _dtype_names[key]


def kind(x: Array) -> str:
    """The kind of the dtype of `x`: "bool", "int", "float", or the dtype's name where it is none of them."""
    name = dtype_name(x)
    if name in FLOAT_DTYPES:
        return "float"
    if name in ("bool", "bool_"):
        return "bool"
    if name.removeprefix("u") in ("int8", "int16", "int32", "int64"):
        return "int"
    return name


def device(x: Array) -> Any:
    """The device of `x`, or None where there is not one (under a tracer, sharded over several)."""
    where = array_api_compat.device(x)
    # JAX gives the sharding of an array that lies on several devices.
    return None if library(x) == "jax" and not hasattr(where, "platform") else where


def device_kind(x: Array) -> str:
    """Where `x` lies: "cpu", "cuda", another platform's name, or "unknown" under a tracer."""
    lib = library(x)
    if lib in ("numpy", "dask"):
        return "cpu"
    if lib == "cupy":
        return "cuda"
    where = device(x)
    if where is None and lib == "jax" and not is_tracer(x):
        where = next(iter(x.devices()))
    if where is None:
        return "unknown"
    if lib == "torch":
        return str(where.type)
    if lib == "jax":
        platform = str(getattr(where, "platform", "unknown"))
        return "cuda" if platform == "gpu" else platform
    name = str(where)
    return "cpu" if "CPU" in name.upper() else name


def is_tracer(x: Array) -> bool:
    """Whether `x` stands for values that do not exist yet (jit, vmap, grad, fake tensors, graph capture)."""
    lib = library(x)
    if lib == "jax":
        return isinstance(x, sys.modules["jax"].core.Tracer)
    if lib == "torch":
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling():
            return True
        # `make_fx` records what is done to plain tensors.
        recorder = sys.modules.get("torch.fx.experimental.proxy_tensor")
        if recorder is not None and recorder.get_proxy_mode() is not None:
            return True
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
        return any(base.__name__ in ("FakeTensor", "FunctionalTensor") for base in type(x).__mro__)
    return False


def is_lazy(x: Array) -> bool:
    """Whether reading a value of `x` would start a computation."""
    return library(x) == "dask"


def is_concrete_cpu(x: Array) -> bool:
    """Whether the host can read the values of `x` without a transfer, a synchronisation or a computation."""
    return not is_tracer(x) and not is_lazy(x) and device_kind(x) == "cpu"


def strides(x: Any) -> tuple[int, ...] | None:
    """Steps in memory along each axis, in what the library counts them in; None where it does not tell."""
    found = x.stride() if hasattr(x, "stride") else getattr(x, "strides", None)
    return None if found is None else tuple(found)


def to_host(x: Array) -> numpy.ndarray[Any, Any]:
    """The values of a concrete CPU array as NumPy, shared where the library can."""
    import numpy

    lib = library(x)
    if lib == "numpy":
        return numpy.asarray(x)
    if lib == "torch":
        return numpy.asarray(x.detach().numpy())
    if lib == "jax":
        return numpy.asarray(x)
    return numpy.from_dlpack(x)


def signature(x: Any) -> tuple[Any, ...] | None:
    """All that a prepared call needs to know of a plain array besides its values; None where it cannot tell.

    It tells nothing of other types (subclasses, tracers), nor where x takes part in differentiation.
    """
    cls = type(x)
    read = _signatures.get(cls)
    if read is None:
        found = _SIGNATURES.get((cls.__module__.partition(".")[0], cls.__name__), _no_signature)
        read = _signatures[cls] = found
    return read(x)


def without_length(found: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """A `signature` without the length of an axis, nor the strides, which may hang on it."""
    cls, shape, *others = found
    rest = tuple(size for n, size in enumerate(shape, -len(shape)) if n != axis)
    return (cls, rest, *(others if _library_of_type(cls) == "jax" else others[1:]))


def _numpy_signature(x: Array) -> tuple[Any, ...]:
    return type(x), x.shape, x.strides, x.dtype, x.flags.aligned


def _torch_signature(x: Array) -> tuple[Any, ...] | None:
    torch = sys.modules["torch"]
    if is_tracer(x) or needs_gradient(x) or x.layout is not torch.strided or x.is_nested:
        return None
    if torch._C._get_tracing_state() is not None:
        return None
    # A lazily negated tensor (the imaginary part of a conjugate) does not hold its values.
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.data_ptr() % x.element_size() == 0


def _jax_signature(x: Array) -> tuple[Any, ...]:
    # Without x64, integers have 32 bits, and other masks are refused. Its axes may lie in any order.
    x64 = sys.modules["jax"].config.jax_enable_x64
    return type(x), x.shape, x.dtype, x.sharding, x.format.layout, x64


def _cupy_signature(x: Array) -> tuple[Any, ...]:
    return type(x), x.shape, x.strides, x.dtype, x.device.id


def _no_signature(x: Array) -> None:
    return None


_SIGNATURES: dict[tuple[str, str], Callable[[Array], tuple[Any, ...] | None]] = {
    ("numpy", "ndarray"): _numpy_signature,
    ("torch", "Tensor"): _torch_signature,
    ("torch", "Parameter"): _torch_signature,
    ("jaxlib", "ArrayImpl"): _jax_signature,
    ("cupy", "ndarray"): _cupy_signature,
}
_signatures: dict[type, Callable[[Array], tuple[Any, ...] | None]] = {}


def stop_gradient(x: Array) -> Array:
    """`x` as a constant for automatic differentiation."""
    lib = library(x)
    if lib == "torch":
        return x.detach()
    if lib == "jax":
        return sys.modules["jax"].lax.stop_gradient(x)
    return x


def needs_gradient(x: Array) -> bool:
    """Whether `x` is known to take part in automatic differentiation (JAX tracers do not tell)."""
    if library(x) != "torch":
        return False
    torch = sys.modules["torch"]
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    forward = torch.autograd.forward_ad
    # torch counts the levels of its forward mode from 0 and has no public name for the count.
    return getattr(forward, "_current_level", -1) >= 0 and forward.unpack_dual(x).tangent is not None


def index_dtype(xp: Namespace, where: Any) -> Any:
    """The library's default integer dtype on a device: int64, or int32 where 64 bits are switched off."""
    return xp.__array_namespace_info__().default_dtypes(device=where)["integral"]


def cast(xp: Namespace, x: Array, dtype: Any) -> Array:
    """`x` in `dtype`, itself where it has it already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def full(xp: Namespace, shape: tuple[int, ...], value: float, dtype: Any, where: Any) -> Array:
    """An array of one value on the device `where`."""
    if 0 in shape:
        # dask 2026.8 divides by zero when it chooses the chunks of some empty shapes, (0, 130, 1) among them.
        return xp.broadcast_to(xp.full((), value, dtype=dtype, device=where), shape)
    return xp.full(shape, value, dtype=dtype, device=where)


def take_range(x: Array, start: Any, size: int, axis: int) -> Array:
    """`x[start : start + size]` along a negative `axis`; under a JAX loop `start` is traced."""
    if isinstance(start, int):
        return x[(..., slice(start, start + size), *(slice(None),) * (-axis - 1))]
    return sys.modules["jax"].lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def moveaxis(xp: Namespace, x: Array, source: int, destination: int) -> Array:
    """A view with an axis elsewhere."""
    if library(x) == "torch":
        # torch.func.vmap has a rule for this one of the two (2.13).
        return x.movedim(source, destination)
    return xp.moveaxis(x, source, destination)


def clip(xp: Namespace, x: Array, low: float, high: float) -> Array:
    """`x` with numbers below `low` and above `high` replaced by these, in its dtype."""
    if _library_of_type(type(x)) == "cupy":  # also numbers of NumPy, which are no arrays
        # array_api_compat's (1.16) writes through a mask, whose count the host waits for.
        return x.clip(low, high)
    return xp.clip(x, low, high)


def take(xp: Namespace, x: Array, indices: Array, axis: int) -> Array:
    """Entries of `x` along a negative `axis`, by a one-dimensional integer array."""
    if library(x) == "dask" and indices.shape == (1,):
        # dask 2026.8 gives the result of an index of one entry the length of the axis it indexes.
        return take_range(xp.take(x, xp.concat([indices, indices]), axis=axis), 0, 1, axis)
    return xp.take(x, indices, axis=axis)


def exactly(x: Array) -> AbstractContextManager[Any]:
    """A context in which the library computes as it is told.

    NumPy does not warn of NaN and infinity, which come for entries thrown away too; torch's autocast does not
    turn float32 products into 16 bits; CuPy computes on the device of `x`, whichever is current.
    """
    lib = library(x)
    if lib == "cupy":
        there: AbstractContextManager[Any] = device(x)
        return there
    if lib in ("numpy", "array_api_strict"):
        import numpy

        return numpy.errstate(all="ignore")
    if lib == "torch":
        torch = sys.modules["torch"]
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            no_cast: AbstractContextManager[Any] = torch.autocast(kind, enabled=False)
            return no_cast
    return nullcontext()
