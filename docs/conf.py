"""How Sphinx builds the site: `make docs`."""

import re

import ctsft

project = "ctsft"
author = "the ctsft authors"
release = version = ctsft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
default_role = "code"
smartquotes = False

html_theme = "furo"
html_title = "ctsft"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain English with `code`: outside of code, |W| and d_out are text and no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([|*_\\])", r"\\\1", p) for p in parts)


def setup(app):
    app.connect("autodoc-process-docstring", plain)
