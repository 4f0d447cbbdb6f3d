"""Sphinx configuration."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "anyattn"
author = "The anyattn developers"
copyright = "The anyattn developers"
release = importlib.metadata.version("anyattn")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "backend_table"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"anyattn {release}"
html_static_path = ["_static"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False
# An attribute that is described in its class and documented where it is defined would be there twice.
napoleon_use_ivar = True
