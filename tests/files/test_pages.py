"""Templates of the package escape what they are given, and their policy names what stands in them."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from qwen_vl_classifier.files.pages import page_file, page_templates

FOLDER = "evaluation/report/page"


def test_a_file_is_read_as_it_is():
    assert page_file(FOLDER, "style.css").startswith(":root {")


def test_what_templates_are_given_is_escaped_and_must_be_there():
    template = page_templates(FOLDER).from_string("<b>{{ text }}</b>")
    assert template.render(text="<script>") == "<b>&lt;script&gt;</b>"
    with pytest.raises(UndefinedError):
        template.render()


def test_a_style_is_named_by_its_hash():
    """As in the example of the specification (Content Security Policy level 3, section 8.3)."""
    template = page_templates(FOLDER).from_string("{{ script | csp_hash }}")
    assert template.render(script="doSomething();") == "sha256-RFWPLDbv2BY+rCkDzsE+0fr8ylGr2R2faWMhq4lfEQc="
