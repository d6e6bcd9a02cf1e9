"""Close the thinking block that the generation prompt of a Thinking checkpoint leaves open.

Such a prompt ends in `<think>`, so that the next token begins a train of thought. Features are read at the end of the
prompt, and "Yes" or "No" stands there only where the answer begins. An empty thinking block is how Qwen3's own
templates ask for an answer without thinking.
"""

from __future__ import annotations

import json
import re
from typing import Any

_OPEN_BLOCK = re.compile(r"<think>(\s*)\Z")
_LINES_BETWEEN = 2  # newlines of an empty block: "<think>\n\n</think>\n\n"


def with_thinking_closed(tokenizer: Any, template: str) -> str:
    """Return the chat template, extended where its generation prompt ends in an open `<think>` block.

    The result is the template that is rendered, recorded and part of the fingerprint; extending it twice changes
    nothing.

    Args:
        tokenizer: A transformers tokenizer, which renders the template.
        template: A Jinja chat template.
    """
    if "<think>" not in template:
        return template
    try:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception:  # a template may go wrong in any way a program may; the one who renders it for use says so
        return template
    block = _OPEN_BLOCK.search(rendered)
    if block is None:
        return template
    closing = "\n" * max(0, _LINES_BETWEEN - block[1].count("\n")) + "</think>\n\n"
    # An expression, since a block would strip blanks before it; and Jinja drops one newline at the end of a template.
    before = template.removesuffix("\n")
    return before + "{{ " + json.dumps(closing) + " if add_generation_prompt else '' }}"
