"""Adapters: how an array library makes arrays, runs a call, differentiates it and hands values back.

One class a library, one instance a variant; `LIBRARIES` lists the variants by the name that
`--anyattn-library` takes. Each says what the library lacks, and skips are computed from that and from the
backend's declarations alone. Nothing is imported before a variant is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import numpy as np

from anyattn.testing.bad_input import BadCall
from anyattn.testing.case import CACHES, Case, Combined, Entry, Function, Value, arrays_in
from anyattn.testing.memory import MEMORIES, lay_out

Array = Any
Results = dict[str, Any]
Program = Callable[[Mapping[str, Any]], Results]
ALL_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGERS = frozenset({"int32", "int64"})
EXAMPLES_AGAIN = 100
"""Drawn calls of a variant whose calls are the first of those of another one."""


class Library:
    """An array library as the kit uses it; the base class is NumPy's.

    Attributes
    ----------
    name
        As `--anyattn-library` takes it.
    requires
        Import names.
    array_type, device
        As backends declare them.
    dtypes, integers
        The dtypes of the contract that the library has.
    memories
        The ways of lying in memory (`anyattn.testing.memory`) that its arrays can have.
    differentiates
        Whether it has automatic differentiation.
    traced
        Whether calls see arrays without values.
    examples
        Drawn calls of a run; fewer where every new shape compiles or builds a graph.
    """

    requires: ClassVar[tuple[str, ...]] = ("numpy",)
    array_type: str = "numpy.ndarray"
    device: str = "cpu"
    dtypes: frozenset[str] = ALL_DTYPES
    integers: frozenset[str] = INTEGERS
    memories: frozenset[str] = frozenset(MEMORIES)
    differentiates: bool = False
    traced: bool = False
    examples: int = 300

    def __init__(self, name: str, memory: str = "plain") -> None:
        self.name = name
        self.memory = memory
        if memory != "plain":
            self.examples = EXAMPLES_AGAIN

    def __repr__(self) -> str:
        return f"<anyattn.testing library {self.name}>"

    def missing(self) -> str | None:
        """Why the variant cannot be used here, or None."""
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    def lacks(self, case: Case) -> str | None:
        """What the library has not got that the case is about, or None."""
        dtypes = sorted(case.dtypes - self.dtypes - self.integers)
        if dtypes:
            return f"{self.name} has no {', '.join(dtypes)}"
        if case.memory not in self.memories:
            return f"{self.name} has no {case.memory} arrays"
        if case.operation in CACHES and self.traced:
            return f"{self.name} has arrays without values, and caches keep lengths on the host"
        if "gradients" in case.also and not self.differentiates:
            return f"{self.name} has no automatic differentiation"
        return None

    def cannot_refuse(self, bad: BadCall) -> str | None:
        """Why a bad call cannot be made, or is no bad call, in this library, or None."""
        names = {spec.dtype for spec in (*bad.specifications().values(), *arrays_in(bad.options))}
        absent = sorted(names - self.dtypes - self.integers - {"int", "bool"})
        if absent:
            return f"{self.name} has no {', '.join(absent)}"
        if bad.reads_values and (self.traced or self.device != "cpu"):
            return f"the host does not read values of {self.name}"
        if bad.foreign is not None and self.foreign(Value(np.zeros(1, np.float32), "float32")) is None:
            return f"no library beside {self.name} is installed"
        if bad.elsewhere is not None and self.elsewhere(Value(np.zeros(1, np.float32), "float32")) is None:
            return f"{self.name} has one device here"
        return None

    def instead(self, case: Case) -> str | None:
        """The variant in which the case makes the same operations on the same values, or None.

        A session that runs it there need not run it here.
        """
        return None

    def needs(self, case: Case | BadCall) -> frozenset[str]:
        """The capabilities that a backend needs for a case in this library; none for a bad call."""
        traced = self.traced and not isinstance(case, BadCall)
        return case.needs | ({"traced"} if traced else set())

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """What must be switched on while arrays are made and the call runs."""
        yield

    def array(self, value: Value, memory: str = "plain") -> Array:
        """An array of the library."""
        return lay_out(self.host(value), memory if memory != "plain" else self.memory)

    def arrays(self, case: Case, values: Mapping[str, Value]) -> dict[str, Array]:
        """All arrays of a case."""
        return {name: self.array(value, case.memory) for name, value in values.items()}

    def host(self, value: Value) -> Array:
        """The values as a NumPy array of the dtype itself."""
        if value.dtype == "bfloat16":
            import ml_dtypes

            return value.values.astype(ml_dtypes.bfloat16)
        return value.values

    def prepare(self, program: Program) -> Program:
        """A program of arrays as the variant runs it."""
        return program

    def gradients(
        self, program: Program, arrays: Mapping[str, Array], names: list[str], cotangents: Mapping[str, Value]
    ) -> Results:
        """Gradients by the arrays called `names` of the sum of results times cotangents."""
        raise NotImplementedError(f"{self.name} has no automatic differentiation")

    def numpy(self, array: Array) -> Array:
        """Values as NumPy; 16-bit floats may come as float32."""
        return np.asarray(array).astype(np.float32) if self.dtype(array) == "bfloat16" else np.asarray(array)

    def dtype(self, array: Array) -> str:
        """Name of the dtype."""
        return str(array.dtype).rpartition(".")[2]

    def foreign(self, value: Value) -> Array | None:
        """An array of another library: of NumPy, or under NumPy of the first other one that is installed."""
        if self.array_type != "numpy.ndarray":
            return lay_out(value.values, "plain")
        others = (other for other in LIBRARIES.values() if other.array_type != self.array_type)
        return next((other.array(value) for other in others if other.missing() is None), None)

    def elsewhere(self, value: Value) -> Array | None:
        """An array on a device other than the variant's, or None where there is no other."""
        return None

    def owns(self, array: Array) -> bool:
        """Whether a result is an array of the library, on the device of the variant."""
        return type(array) is np.ndarray


class NumPy(Library):
    """NumPy; bfloat16 is the type of ml_dtypes."""

    def __init__(self, name: str, memory: str = "plain") -> None:
        super().__init__(name, memory)
        if importlib.util.find_spec("ml_dtypes") is None:
            self.dtypes = ALL_DTYPES - {"bfloat16"}


class Strict(Library):
    """array-api-strict with its strictest flags; creations without dtype or device raise."""

    requires = ("array_api_strict",)
    array_type = "array_api_strict.Array"
    dtypes = frozenset({"float32", "float64"})
    memories = frozenset({"plain", "readonly"})

    CREATIONS: ClassVar[tuple[str, ...]] = (
        "arange", "asarray", "empty", "eye", "full", "linspace", "ones", "zeros",
    )  # fmt: skip

    def __init__(self, name: str, device: str = "CPU_DEVICE") -> None:
        super().__init__(name)
        self.device = "cpu" if device == "CPU_DEVICE" else device
        self._device = device
        if self.device != "cpu":
            self.examples = EXAMPLES_AGAIN

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        import array_api_strict as xp

        flags = xp.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        )
        # The warnings are those of the NumPy arrays inside, which the strict namespace cannot silence.
        with flags, np.errstate(all="ignore"), _explicit_creations(xp, self.CREATIONS):
            yield

    def array(self, value: Value, memory: str = "plain") -> Array:
        import array_api_strict as xp

        dtype = {"int": xp.int64, "bool": xp.bool}.get(value.dtype) or getattr(xp, value.dtype)
        made = xp.asarray(_contiguous(value.values), dtype=dtype, device=xp.Device(self._device), copy=True)
        if (memory if memory != "plain" else self.memory) == "readonly":
            made._array.flags.writeable = False
        return made

    def elsewhere(self, value: Value) -> Array:
        other = "device1" if self._device == "CPU_DEVICE" else "CPU_DEVICE"
        return Strict(self.name, other).array(value)

    def numpy(self, array: Array) -> Array:
        return np.asarray(array._array)

    def owns(self, array: Array) -> bool:
        import array_api_strict as xp

        return type(array).__module__.startswith("array_api_strict") and array.device == xp.Device(
            self._device
        )


class Torch(Library):
    """torch on one device, eagerly; negative strides and read-only tensors do not exist there."""

    requires = ("torch",)
    array_type = "torch.Tensor"
    memories = frozenset({"plain", "transposed", "gapped", "repeated"})
    differentiates = True

    def __init__(self, name: str, memory: str = "plain", device: str = "cpu") -> None:
        super().__init__(name, memory)
        self.device = device

    def missing(self) -> str | None:
        absent = super().missing()
        if absent is None and self.device == "cuda":
            import torch

            return None if torch.cuda.is_available() else "torch sees no CUDA device"
        return absent

    def array(self, value: Value, memory: str = "plain") -> Array:
        import torch

        memory = memory if memory != "plain" else self.memory
        dtype = {"int": torch.int64, "bool": torch.bool}.get(value.dtype) or getattr(torch, value.dtype)
        made = torch.tensor(_contiguous(value.values), dtype=dtype, device=self.device)
        if memory == "transposed" and made.ndim:
            backwards = tuple(reversed(range(made.ndim)))
            return made.permute(backwards).contiguous().permute(backwards)
        if memory == "gapped" and made.ndim:
            wide = torch.zeros([2 * n for n in made.shape], dtype=dtype, device=self.device)
            wide[(slice(None, None, 2),) * made.ndim] = made
            return wide[(slice(None, None, 2),) * made.ndim]
        if memory == "repeated" and made.ndim > 2 and made.shape[0] > 1:
            return made[:1].expand(made.shape)
        return made

    def gradients(
        self, program: Program, arrays: Mapping[str, Array], names: list[str], cotangents: Mapping[str, Value]
    ) -> Results:
        import torch

        leaves = {name: arrays[name].detach().clone().requires_grad_() for name in names}
        results = program({**arrays, **leaves})
        wanted = [results[name] for name in cotangents]
        grads = [
            torch.tensor(_contiguous(value.values), dtype=results[name].dtype, device=self.device)
            for name, value in cotangents.items()
        ]
        found = torch.autograd.grad(wanted, list(leaves.values()), grads, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def numpy(self, array: Array) -> Array:
        import torch

        array = array.detach().cpu()
        return array.to(torch.float32).numpy() if array.dtype == torch.bfloat16 else array.numpy()

    def owns(self, array: Array) -> bool:
        import torch

        return isinstance(array, torch.Tensor) and array.device.type == self.device


class Jax(Library):
    """JAX as it is by default, without 64-bit types; eager or under `jax.jit`."""

    requires = ("jax",)
    array_type = "jax.Array"
    memories = frozenset({"plain"})
    differentiates = True
    examples = 25

    # Families in which all options, or positions, meet integers of 64 bits.
    WIDE: ClassVar[tuple[str, ...]] = ("pairs", "drawn", "positions", "long")
    # Families in which each mask, score and dtype meets values that the host reads.
    EAGERLY: ClassVar[tuple[str, ...]] = ("pairs", "drawn", "each option", "long")

    def __init__(self, name: str, *, jit: bool = False, x64: bool = False) -> None:
        super().__init__(name)
        self.traced = jit
        self._x64 = x64
        self.dtypes = ALL_DTYPES if x64 else ALL_DTYPES - {"float64"}
        self.integers = INTEGERS if x64 else frozenset({"int32"})
        self._sessions = 0

    def lacks(self, case: Case) -> str | None:
        # Every shape compiles anew: x64 runs what it adds to the variant without.
        named = {spec.dtype or case.dtype for spec in case.specifications()}
        if self._x64 and case.family not in self.WIDE and not named & {"int", "int64", "float64"}:
            return f"64-bit numbers are in no array, and the family is none of {', '.join(self.WIDE)}"
        return super().lacks(case)

    def instead(self, case: Case) -> str | None:
        # Eagerly JAX compiles each operation for each shape, four times the time of a jitted call. A mask or
        # score function, 16 bits and integers of 64 change what is done in a block and not which there are.
        if self.traced or case.operation in CACHES or case.family in self.EAGERLY:
            return None
        if self._x64:
            return "jax-x64-jit"
        functions = (case.options.get(name) for name in ("mask", "score_mod"))
        written = any(isinstance(function, Entry | Function | Combined) for function in functions)
        return "jax-jit" if written or case.dtype != "float32" else None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        import jax

        # Every shape compiles anew, some 10 MB a case: measured 3.7 GB after 350 cases.
        self._sessions += 1
        if self._sessions % 100 == 0:
            cast(Any, jax).clear_caches()
        with jax.enable_x64(self._x64):
            yield

    def needs(self, case: Case | BadCall) -> frozenset[str]:
        # JAX differentiates by tracing.
        return super().needs(case) | ({"traced"} if "gradients" in case.needs else set())

    def array(self, value: Value, memory: str = "plain") -> Array:
        import jax.numpy as jnp

        dtype = {"int": jnp.int64 if self._x64 else jnp.int32, "bool": jnp.bool_}.get(value.dtype)
        return jnp.asarray(_contiguous(value.values), dtype=dtype or getattr(jnp, value.dtype))

    def prepare(self, program: Program) -> Program:
        import jax

        return cast(Program, jax.jit(program)) if self.traced else program

    def gradients(
        self, program: Program, arrays: Mapping[str, Array], names: list[str], cotangents: Mapping[str, Value]
    ) -> Results:
        import jax

        def pull(chosen: Mapping[str, Array], rest: Mapping[str, Array]) -> Results:
            results, back = jax.vjp(
                lambda x: {n: program({**rest, **x})[n] for n in cotangents}, dict(chosen)
            )
            weights = {n: self.array(value).astype(results[n].dtype) for n, value in cotangents.items()}
            return dict(back(weights)[0])

        chosen = {name: arrays[name] for name in names}
        rest = {name: array for name, array in arrays.items() if name not in chosen}
        return (jax.jit(pull) if self.traced else pull)(chosen, rest)

    def owns(self, array: Array) -> bool:
        import jax

        return isinstance(array, jax.Array)


class Dask(NumPy):
    """dask arrays of NumPy blocks, whole or in pieces; computing anything inside a call raises."""

    requires = ("dask",)
    array_type = "dask.array.Array"
    memories = frozenset({"plain"})
    traced = True
    examples = 50

    def __init__(self, name: str, pieces: int = 1) -> None:
        super().__init__(name)
        self._pieces = pieces

    def lacks(self, case: Case) -> str | None:
        if self._pieces > 1 and case.dtype != "float32" and case.family not in ("pairs", "drawn"):
            return f"{case.dtype} in chunks is float32 in chunks and {case.dtype} whole"
        return super().lacks(case)

    def array(self, value: Value, memory: str = "plain") -> Array:
        import dask.array

        values = self.host(value)
        chunks = tuple(max(1, -(-n // self._pieces)) for n in values.shape)
        return cast(Any, dask.array).from_array(values, chunks=chunks)

    def prepare(self, program: Program) -> Program:
        import dask

        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise AssertionError("a dask array was computed inside the call")

        def run(arrays: Mapping[str, Array]) -> Results:
            with dask.config.set(scheduler=refuse):
                results = program(arrays)
            # Results share most of their tasks.
            with self._computing() as how:
                return dict(zip(results, cast(Any, dask).persist(*results.values(), **how), strict=True))

        return run

    def numpy(self, array: Array) -> Array:
        with self._computing() as how:
            return super().numpy(array.compute(**how))

    @contextlib.contextmanager
    def _computing(self) -> Iterator[dict[str, Any]]:
        """Arguments with which dask computes."""
        # What is lazy warns when it is computed, long after the call.
        with np.errstate(all="ignore"):
            # To fuse the tasks of many little chunks takes longer than it saves: 0.27 s a case for 0.21 s.
            yield {"scheduler": _one_by_one, "optimize_graph": self._pieces == 1}

    def owns(self, array: Array) -> bool:
        import dask.array

        return isinstance(array, dask.array.Array)


class CuPy(Library):
    """CuPy arrays on the current device; bfloat16 is the type of ml_dtypes."""

    requires = ("cupy",)
    array_type = "cupy.ndarray"
    device = "cuda"
    memories = frozenset({"plain", "reversed", "transposed", "gapped", "repeated"})

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if importlib.util.find_spec("ml_dtypes") is None:
            self.dtypes = ALL_DTYPES - {"bfloat16"}

    def missing(self) -> str | None:
        absent = super().missing()
        if absent is not None:
            return absent
        import cupy

        return None if cupy.cuda.is_available() else "cupy finds no CUDA device"

    def array(self, value: Value, memory: str = "plain") -> Array:
        import cupy

        memory = memory if memory != "plain" else self.memory
        made = cupy.asarray(_contiguous(self.host(value)))
        return lay_out(made, memory, cupy)

    def numpy(self, array: Array) -> Array:
        return super().numpy(array.get())

    def owns(self, array: Array) -> bool:
        import cupy

        return isinstance(array, cupy.ndarray)


def _one_by_one(graph: Any, keys: list[Any], **_kwargs: Any) -> Any:
    """A scheduler of dask without its bookkeeping, which takes several times as long as little tasks."""
    from dask.core import get

    return get(dict(graph.__dask_graph__()), keys)


def _contiguous(values: Array) -> Array:
    """In C order with the axes it has: `ascontiguousarray` gives one to an array that has none."""
    return np.array(values, order="C")


@contextlib.contextmanager
def _explicit_creations(namespace: Any, names: tuple[str, ...]) -> Iterator[None]:
    """Make creations raise that leave dtype or device to a default, which may be another than the inputs'."""

    def guard(name: str, create: Callable[..., Array]) -> Callable[..., Array]:
        def explicit(*args: Any, **kwargs: Any) -> Array:
            if not (args and hasattr(args[0], "__array_namespace__")):
                absent = [word for word in ("dtype", "device") if word not in kwargs]
                if absent:
                    raise AssertionError(f"{name} was called without {' and '.join(absent)}")
            return create(*args, **kwargs)

        return explicit

    plain = {name: getattr(namespace, name) for name in names}
    for name, create in plain.items():
        setattr(namespace, name, guard(name, create))
    try:
        yield
    finally:
        for name, create in plain.items():
            setattr(namespace, name, create)


LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        NumPy("numpy"),
        NumPy("numpy-readonly", memory="readonly"),
        NumPy("numpy-strided", memory="reversed"),
        Strict("array_api_strict"),
        Strict("array_api_strict-device1", device="device1"),
        Torch("torch"),
        Torch("torch-strided", memory="transposed"),
        Torch("torch-cuda", device="cuda"),
        Jax("jax"),
        Jax("jax-x64", x64=True),
        Jax("jax-jit", jit=True),
        Jax("jax-x64-jit", jit=True, x64=True),
        Dask("dask"),
        Dask("dask-chunks", pieces=2),
        CuPy("cupy"),
    )
}
