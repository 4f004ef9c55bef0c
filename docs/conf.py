"""Sphinx configuration; build with `sphinx-build -W -b html docs docs/_build/html`."""

import nsm_graph

project = "nsm_graph"
author = "The nsm_graph authors"
copyright = "2026, The nsm_graph authors"
version = release = nsm_graph.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "images"]
html_theme = "furo"
html_title = "nsm_graph"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_custom_sections = [("Shapes", "params_style")]
