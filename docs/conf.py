"""How Sphinx builds the site (`make docs`): MyST pages, and the API from the docstrings."""

import dataclasses
import re
import typing

from numpy.typing import ArrayLike
from sphinx.util.typing import stringify_annotation

import lsg_flax
from lsg_flax.training import Help

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
# Names of axes in annotations, such as "length", may also be fields of several classes.
suppress_warnings = ["myst.strikethrough", "ref.python"]
highlight_language = "none"  # of blocks that name none: what commands show
default_role = "code"  # docstrings write names in single backticks
smartquotes_action = "q"  # flags keep their two dashes
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


def _helps(item):
    """The fields of a class that say by a `Help` what they are, with it."""
    if not dataclasses.is_dataclass(item):
        return []
    hints = typing.get_type_hints(item, include_extras=True)
    said = [
        (f, getattr(hints[f.name], "__metadata__", [None])[0]) for f in dataclasses.fields(item)
    ]
    return [(field, help) for field, help in said if isinstance(help, Help)]


LONG = {stringify_annotation(ArrayLike, "smart"): "ArrayLike"}
LONG |= {stringify_annotation(ArrayLike, "fully-qualified-except-typing"): "ArrayLike"}
LONG |= {"jaxlib._jax.Array": "Array", "<factory>": "..."}
QUALIFIERS = r"\b(?:jaxtyping|collections\.abc|pathlib|lsg_flax[\w.]*)\.(?=[A-Z])"


def _shorten(text):
    """Replaces types whose full names nobody writes."""
    for long, short in LONG.items():
        text = text.replace(long, short)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def _signature(_app, _what, _name, item, _options, signature, returns):
    """A signature of dozens of settings is a list below the docstring."""
    if _helps(item):
        return "(**settings)", returns
    return tuple(part and _shorten(part) for part in (signature, returns))


def _settings(_app, _what, _name, item, _options, lines):
    """The list of settings, by their groups."""
    groups = {}
    for field, help in _helps(item):
        default = (
            help.unset if field.default in (None, dataclasses.MISSING) else repr(field.default)
        )
        required = {field.default, field.default_factory} == {dataclasses.MISSING}
        about = f"{help.about} ({'required' if required else f'default: {default}'})"
        groups.setdefault(help.group, []).append(f"* ``{field.name}`` -- {about}")
    for group, rows in groups.items():
        rows.sort(key=lambda row: "(required)" not in row)
        lines += ["", f"**{group.capitalize()}**", "", *rows, ""]


def _whole(_app, what, _name, _object, _options, lines):
    """Types stand in the signatures: a colon in what is returned does not end a type."""
    text = "\n".join(lines)
    text = re.sub(r":returns: (.*?)\n:rtype: ([^\n]*)", r":returns: \2: \1", text, flags=re.DOTALL)
    if what == "property":
        text = re.sub(r"\A(.*?)\n*:type: ([^\n]*)", r"\2: \1", text, flags=re.DOTALL)
    lines[:] = text.split("\n")


def _literal(_app, _what, _name, _object, _options, lines):
    """Axes such as *B, and values in quotes such as "eval_", mean no reStructuredText."""
    for number, line in enumerate(lines):
        if ":type" in line:
            line = re.sub(QUALIFIERS, "", _shorten(line))
            lines[number] = line.replace("*", r"\*")
        elif "`" not in line:
            lines[number] = re.sub(r'"[^"\s]*(?:\*|_")[^"\s]*"?', r"``\g<0>``", line)


def setup(app):
    """Sphinx calls it."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _settings)
    app.connect("autodoc-process-docstring", _whole, priority=800)  # behind napoleon
    app.connect("autodoc-process-docstring", _literal, priority=900)
