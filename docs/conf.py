"""Sphinx reads this; `make docs` runs it. Everything is built from the tree, without a network."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "efficientsam-hf"
author = "The efficientsam-hf contributors"
copyright = "2026, the efficientsam-hf contributors"
version = release = installed_version("efficientsam-hf")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "building.reference",
    "building.rooms",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "efficientsam-hf"
html_static_path = ["static"]
html_css_files = ["pages.css"]
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

# Docstrings are Markdown as in transformers: a word between single backticks is code.
default_role = "code"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

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
# Progress bars and log lines; an error is an exception all the same.
nb_output_stderr = "remove"
nb_merge_streams = True

linkcheck_timeout = 20
linkcheck_anchors_ignore_for_url = ["https://github.com/.*"]
