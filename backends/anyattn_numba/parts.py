"""How functions are compiled that only compiled code calls, and tasks, which are run.

Numba optimises each function together with all that it calls and makes machine code of it, and does both
again for each function that calls it: most of the time of a kernel that is made of thirty small functions. A
function here is typed and translated to LLVM's language only, unless it is a task. That is optimised and made
machine code of once, with all that it calls, directly or not.

The steps are Numba's, without those for what is not used here: closures, comprehensions, overloads that are
inlined, array expressions, context managers.

The class of libraries (what Numba calls a function's code) is not public. Here its steps are replaced.
"""

# Numba's functions have no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from numba.core import typed_passes as typed
from numba.core import untyped_passes as untyped
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager

__all__ = ["PartCompiler", "TaskCompiler"]

_PASSES = (
    untyped.TranslateByteCode,
    untyped.FixupArgs,
    untyped.IRProcessing,
    untyped.DeadBranchPrune,
    untyped.GenericRewrites,
    untyped.ReconstructSSA,
    typed.NopythonTypeInference,
    typed.PreLowerStripPhis,
    typed.IRLegalization,
    typed.NativeLowering,
    typed.NoPythonBackend,
)


class _Linked(JITCodeLibrary):
    """A function as it was translated, beside the parts that it calls, directly or not."""

    def __init__(self, codegen: Any, name: str):
        super().__init__(codegen, name)
        self.parts: dict[_Part, None] = {}

    def add_llvm_module(self, ll_module: Any) -> None:
        self._final_module.link_in(ll_module)

    def add_linking_library(self, library: Any) -> None:
        if not isinstance(library, _Part):
            super().add_linking_library(library)
            return
        self.parts |= {library: None, **library.parts}
        # Numba's own functions.
        for other in library._linking_libraries:
            super().add_linking_library(other)


class _Part(_Linked):
    """A function that others call, of which no machine code is made."""

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """No address, as of a function that Python cannot call."""
        return 0

    @property
    def codegen(self) -> Any:
        """What Numba gives the function's environment, which serves to raise and to print."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """There is no place for it without machine code."""

    def _get_module_for_linking(self) -> Any:
        """Of functions that are compiled in Numba's own way and call this one."""
        module = self._final_module.clone()
        for part in self.parts:
            module.link_in(part._final_module, preserve=True)
        for library in self._linking_libraries:
            module.link_in(library._get_module_for_linking(), preserve=True)
        for function in module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"
        return module


class _Task(_Linked):
    """A function that is run."""

    def finalize(self) -> None:
        own = {one.name for one in _defined(self._final_module)}
        for part in self.parts:
            self._final_module.link_in(part._final_module, preserve=True)
        # Not seen from outside, so that what is called once is inlined, and nothing is kept beside that.
        # LLVM's loader takes even local names for those of the whole process; private ones it does not know.
        for one in _defined(self._final_module):
            if one.name not in own or one.linkage.name == "linkonce_odr":
                one.linkage = "private"
        super().finalize()

    def _optimize_final_module(self) -> None:
        # What is inlined is simplified first: without that, loops over tiles did not become vectors, and
        # ALiBi took 1.6 times as long. Numba's round between these prunes reference counts; there are none.
        self._optimize_functions(self._final_module)
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


def _defined(module: Any) -> list[Any]:
    """The functions and variables of a module that are not only declared."""
    return [one for one in (*module.functions, *module.global_variables) if not one.is_declaration]


class PartCompiler(CompilerBase):
    """Compiles functions that are called by others."""

    library: type[JITCodeLibrary] = _Part

    def define_pipelines(self) -> list[PassManager]:
        state = self.state
        state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        passes = PassManager("anyattn")
        for one in _PASSES:
            passes.add_pass(one, one.__name__)
        passes.finalize()
        return [passes]


class TaskCompiler(PartCompiler):
    """Compiles tasks."""

    library = _Task
