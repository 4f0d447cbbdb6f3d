"""The functions of other libraries, with their signatures and their meaning, on anyattn's backends.

A module is named after what it stands in for, and its name is what changes in an import:
`from anyattn.compat.torch import scaled_dot_product_attention`. Each translates onto `anyattn.attention` and
computes nothing else but what only its model has. None imports the library that it stands in for; except
where a model's arguments demand it, arrays of every library are taken.
"""
