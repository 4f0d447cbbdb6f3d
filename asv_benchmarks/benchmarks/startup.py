"""What the first call of a process costs; each sample is a process of its own.

The interpreter's start is not in it. Kernels come from a cache folder of the benchmark's own, which is filled
before (`warm`) or empty (`empty`, one folder for each sample).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from . import common

FIRST_CALL = """
import numpy as np
import anyattn as aa
x = np.ones((1, 2, 64, 32), np.float32)
aa.attention(x, x, x, causal=True, backend='{backend}')
"""
FIRST_CALL_OF_PEER = """
import torch
x = torch.ones((1, 2, 64, 32))
torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
"""
EMPTY_CACHE = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ['ANYATTN_CACHE_DIR'] = folder.name
"""


class Import:
    """`import anyattn`, which imports no array library; NumPy for comparison."""

    params: Any = ("anyattn", "numpy")
    param_names = ("module",)
    rounds = 1
    repeat = (3, 10, 2.0)

    def timeraw_import(self, module: str) -> str:
        return f"import {module}"


class FirstCall:
    """Imports and one small causal call."""

    params: Any = (common.WHO, ("warm", "empty"))
    param_names = ("backend", "cache")
    rounds = 1
    number = 1
    repeat = (1, 5, 3.0)
    timeout = 180

    def setup(self, backend: str, cache: str) -> None:
        if cache == "empty" and backend != "numba":
            raise NotImplementedError(f"{backend} compiles nothing")
        common.require(backend)
        self.statement = FIRST_CALL_OF_PEER if backend == common.PEER else FIRST_CALL.format(backend=backend)
        self.folder = tempfile.mkdtemp(prefix="anyattn-benchmark-")
        os.environ["ANYATTN_CACHE_DIR"] = self.folder
        if cache == "warm":
            subprocess.run([sys.executable, "-c", self.statement], check=True)

    def teardown(self, backend: str, cache: str) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def timeraw_first_call(self, backend: str, cache: str) -> tuple[str, str]:
        return self.statement, EMPTY_CACHE if cache == "empty" else ""
