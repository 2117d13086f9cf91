"""How Sphinx builds the site (`make docs`): MyST pages, and the API from the docstrings."""

import lsg_flax

project = "lsg_flax"
author = "the lsg_flax developers"
version = release = lsg_flax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["*.json", "site"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]
highlight_language = "none"  # of blocks that name none: what commands show
default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
html_theme = "sphinx_book_theme"
html_title = "lsg_flax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search stands in the sidebar
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "default",
    "pygments_dark_style": "github-dark",
}
html_show_sourcelink = False


def _short_arrays(_app, _what, _name, _object, _options, signature, returns):
    """`Array` is called by the module that defines it, which nobody imports it from."""
    return tuple(
        part and part.replace("jaxlib._jax.Array", "Array") for part in (signature, returns)
    )


def setup(app):
    """Sphinx calls it."""
    app.connect("autodoc-process-signature", _short_arrays)
