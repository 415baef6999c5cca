"""Sphinx settings. Build with ``sphinx-build -W -b html docs docs/_build``; warnings are errors."""

from importlib.metadata import version as installed_version

project = "lightning-mics"
author = "the lightning-mics authors"
project_copyright = f"2026, {author}"
release = installed_version("lightning-mics")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lightning-mics {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
