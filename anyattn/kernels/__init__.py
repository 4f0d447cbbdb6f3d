"""Compiled kernels: what identifies one (`key`), and where it is kept between processes (`cache`).

`source` makes modules of generated Python whose lines debuggers and tracebacks can show; `numba_store` keeps
Numba's machine code in the cache.
"""
