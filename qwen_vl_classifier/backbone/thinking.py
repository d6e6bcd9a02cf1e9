"""Render chat templates, and close the thinking block that the prompt of a Thinking checkpoint leaves open.

Such a prompt ends in `<think>`, so that the next token begins a chain of thought. Features are read at the end of the
prompt, and "Yes" or "No" follows there only if the thinking block is closed. Qwen3's own templates use an empty
thinking block to turn thinking off.
"""

from __future__ import annotations

import json
import re
from typing import Any

_OPEN_BLOCK = re.compile(r"<think>(\s*)\Z")
_LINES_BETWEEN = 2  # newlines of an empty block: "<think>\n\n</think>\n\n"


def render_prompt(tokenizer: Any, template: str, text: str, *, images: int = 0) -> str:
    """Render one user message of pictures and a text, with the generation prompt; a template may raise any error.

    Args:
        tokenizer: A transformers tokenizer, which renders the template.
        template: A Jinja chat template.
        text: The user's text.
        images: Number of pictures before it.
    """
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return rendered


def with_thinking_closed(tokenizer: Any, template: str) -> str:
    """Return the chat template, extended if its generation prompt ends in an open `<think>` block.

    The result is the template that is used, recorded and part of the fingerprint. Extending it twice changes nothing.

    Args:
        tokenizer: A transformers tokenizer, which renders the template.
        template: A Jinja chat template.
    """
    if "<think>" not in template:
        return template
    try:
        block = _OPEN_BLOCK.search(render_prompt(tokenizer, template, "?"))
    except Exception:  # reported when the processor renders the template
        return template
    if block is None:
        return template
    closing = "\n" * max(0, _LINES_BETWEEN - block[1].count("\n")) + "</think>\n\n"
    # An expression, since a block would strip blanks before it; and Jinja drops one newline at the end of a template.
    before = template.removesuffix("\n")
    return before + "{{ " + json.dumps(closing) + " if add_generation_prompt else '' }}"
