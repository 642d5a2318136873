"""How Sphinx builds the site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import invflow

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "invflow"
author = "The invflow developers"
copyright = f"2026, {author}"
version = release = invflow.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "checked_links",
    "command_pages",
    "mathml",
    "notebooks",
    "registry_pages",
]
exclude_patterns = ["downloads", "extensions"]

html_theme = "furo"
html_title = "invflow"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# A notebook runs whenever the site is built: results that were kept would be those of an older package.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds for each cell
nb_execution_in_temp = True
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
default_role = "code"  # docstrings write names in single backticks, as Markdown does
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Mends the words before a colon in an attribute's docstring, which are no type, and what hinders readers."""

    def without_type(app: Any, what: str, name: str, one: Any, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "data", "property") and lines:
            lines.insert(0, "")

    app.connect("autodoc-process-docstring", without_type, priority=400)

    def with_levels(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
        for part in {"body", "furo_navigation_tree"} & context.keys():
            mended = context[part].replace('role="heading">', 'role="heading" aria-level="2">')
            context[part] = mended.replace("<pre>", '<pre tabindex="0">')  # long lines scroll, by keyboard too

    app.connect("html-page-context", with_levels, priority=900)  # after the theme has made its navigation
