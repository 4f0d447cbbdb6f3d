"""Hold a backend to the contract: cases as data, a float64 oracle, derived error bounds and a pytest plugin.

After `pip install 'anyattn[testing]'` and the installation of your backend::

    pytest --pyargs anyattn.testing --anyattn-backend NAME
    pytest --pyargs anyattn.testing --anyattn-backend NAME --anyattn-library torch --anyattn-library jax-jit

Modules
-------
case
    `Case`, one call as data: shapes, dtype, options, planted special values, and why it exists.
cases
    `all_cases()` and the families it is made of.
oracle
    What every call means, dense and in float64, sharing no code with the library.
bounds
    How far a correct implementation may be from the oracle, element by element, and from what that follows.
expected
    Oracle and bounds applied to a case.
libraries
    Adapters for array libraries and variants of them (read-only, strided, jitted, chunked).
strategies
    `calls()`, a hypothesis strategy that draws whole calls as cases.
plugin
    The pytest options, the account of what ran and what was skipped, and the rule that a declared capability
    is run.

The package imports nothing until one of its modules is imported; NumPy, pytest and hypothesis are all it
needs.
"""
