"""Sphinx reads this; `make docs` runs it. Everything is built from the tree, without a network."""

import re
from importlib.metadata import version as installed_version

project = "efficientsam-hf"
author = "The efficientsam-hf contributors"
copyright = "2026, the efficientsam-hf contributors"
version = release = installed_version("efficientsam-hf")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "efficientsam-hf"

# Docstrings are Markdown as in transformers: a word between single backticks is code.
default_role = "code"
myst_heading_anchors = 3

# What a class inherits from torch or transformers is written for their documentation, in other markup.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "validate"}
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Tutorials run at build, and one that fails fails the build.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600


def markdown_code(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn the code of docstrings, between fences or indented under `Example:`, into Sphinx's code blocks."""
    found: list[str] = []
    block = None
    for line in lines:
        fence = re.match(r"( *)```(\w*)$", line)
        if fence and block != "fence":
            block = "fence"
            found += ["", f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""]
        elif fence:
            block = None
            found.append("")
        elif block == "example" and line[:1].strip():
            block = None
            found.append(line)
        elif re.match(r"Examples?:$", line):
            block = "example"
            found += [line, "    .. code-block:: python", ""]
        else:
            found.append(f"    {line}" if block else line)
    lines[:] = found


def setup(app) -> None:
    # Before napoleon, whose own listener has the usual priority of 500.
    app.connect("autodoc-process-docstring", markdown_code, priority=400)
