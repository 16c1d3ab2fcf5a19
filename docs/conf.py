"""Sphinx's settings."""

from sb3_trpo import __version__

project = "sb3_trpo"
release = version = __version__
copyright = author = "The sb3_trpo developers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "description.md"]  # the latter is for package indexes
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"sb3_trpo {__version__}"
autodoc_typehints = "none"  # the docstrings describe the types
myst_heading_anchors = 3
