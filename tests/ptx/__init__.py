"""An interpreter of PTX on NumPy: runs what NVRTC compiles where there is no GPU, and checks as it runs.

`parse` reads the text, `machine` runs all threads of a launch as lanes of arrays, `memory` holds global and
shared memory and checks every access (bounds, alignment, uninitialised bytes, races), `arithmetic` and
`together` are tables of instructions (those of one lane, and those of a warp), `fragments` the layouts of
ldmatrix and mma from the PTX ISA's tables, `traffic` counts bank conflicts and sectors.
"""

from __future__ import annotations

from ptx.machine import Machine, launch
from ptx.memory import Arena
from ptx.parse import Kernel, PtxError

__all__ = ["Arena", "Kernel", "Machine", "PtxError", "launch"]
