"""The expression language of masks and score modifications.

`nodes` is what an expression is made of, `functions` are the functions that may be called on one, `trace`
turns a Python function into one, `bind` fixes what depends on the call (captured arrays, lengths), `evaluate`
computes one with array-API calls.
"""
