"""Templates of HTML pages that lie in the package."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources

from jinja2 import Environment, FunctionLoader, StrictUndefined


@functools.cache
def page_file(folder: str, name: str) -> str:
    """Return the text of a file in a folder of this package, such as `serving/page`."""
    return importlib.resources.files("qwen_vl_classifier").joinpath(folder, name).read_text(encoding="utf-8")


@functools.cache  # a template is compiled once
def page_templates(folder: str) -> Environment:
    """Return the templates in a folder of this package. What they are given is escaped.

    The filter `csp_hash` names a style sheet or script that stands in a page, so that the page's policy can allow it
    alone (Content Security Policy level 3, section 2.3.1).
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(functools.partial(page_file, folder)),
    )
    environment.filters["csp_hash"] = _csp_hash
    return environment


def _csp_hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
