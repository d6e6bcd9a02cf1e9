"""Render chat templates with thinking turned off: the prompt ends after an empty thinking block, not in an open one.

The prompt of a checkpoint that thinks ends in `<think>`, so that the next token begins a chain of thought. Features are
read at the end of the prompt, and "Yes" or "No" follows there only if the thinking block is closed.

Templates of Qwen3.5 and later turn thinking off if `enable_thinking` is false; those of Qwen3-VL-Thinking know no such
variable, and the block is closed behind them. Both give the same bytes. Qwen3.8 also drops a system message there that
asks for careful thought.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

from qwen_vl_classifier.backbone.prompts import template_child
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import CheckpointError

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used for checkpoints without a chat template."""

_MOST_TEMPLATE = 1_000_000  # characters
_MOST_RENDERED, _MOST_FOR_A_PICTURE = 8_192, 256  # characters; attention costs the square of them
_MOST_SECONDS = 2  # of processor time; templates of Qwen take a tenth of one
_MOST_MEMORY = 512 << 20
_WAIT_SECONDS = 60  # a machine can be busy
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
_OPEN_BLOCK = re.compile(r"<think>(\s*)\Z")
_LINES_BETWEEN = 2  # newlines of an empty block: "<think>\n\n</think>\n\n"
_SWITCH = "enable_thinking"
_TURNED_OFF = f"{{% set {_SWITCH} = false +%}}"  # at the start of a template; with +, Jinja keeps a newline after it
_CLOSED_BEHIND = re.compile(r"""\{\{ "(\\n)*</think>\\n\\n" if add_generation_prompt else '' \}\}\Z""")


class RenderingError(Exception):
    """A chat template raises an error; the message names its kind."""


def render_prompt(tokenizer: Any, template: str, text: str, *, images: int = 0) -> str:
    """Render one user message of pictures and a text, with the generation prompt.

    Any template but the default one is rendered in a process apart, with bounds on processor time and memory.

    Args:
        tokenizer: A transformers tokenizer, whose special tokens the template may name.
        template: A Jinja chat template.
        text: The user's text.
        images: Number of pictures before it.

    Raises:
        RenderingError: The template raises an error.
        CheckpointError: It takes too much time or memory, or its result is too long.
    """
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if template == DEFAULT_CHAT_TEMPLATE:
        rendered: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return rendered
    if len(template) > _MOST_TEMPLATE:
        raise _unusable(f"it has {len(template):,} characters, expected at most {_MOST_TEMPLATE:,}")
    special = {name: token if isinstance(token, list) else str(token) for name, token in _special(tokenizer).items()}
    variables = {**special, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    request = {"template": template, "variables": variables, "most": _MOST_RENDERED + images * _MOST_FOR_A_PICTURE}
    answer = json.loads(_rendered_apart(json.dumps(request)))
    if "rendered" in answer:
        return str(answer["rendered"])
    if "lost" in answer:
        raise _unusable(answer["lost"])
    raise RenderingError(answer["error"])


def with_thinking_closed(tokenizer: Any, template: str) -> str:
    """Return the chat template, changed so that it asks for an answer without thinking.

    A template that says something else where `enable_thinking` is false gets this variable set in its first line; one
    whose generation prompt ends in an open `<think>` block gets the end of the block. The result is the template that
    is used, recorded and part of the fingerprint. Changing it twice changes nothing.

    Args:
        tokenizer: A transformers tokenizer, which renders the template.
        template: A Jinja chat template.
    """
    if "<think>" not in template or _CLOSED_BEHIND.search(template):
        return template
    try:
        rendered = render_prompt(tokenizer, template, "?")
    except RenderingError:  # reported when the processor renders the template
        return template
    closing = _closing(rendered)
    if _SWITCH in template and not template.startswith(_TURNED_OFF):
        turned_off = _TURNED_OFF + template
        with suppress(RenderingError):  # thinking cannot be turned off
            if render_prompt(tokenizer, turned_off, "?") != rendered + closing:
                return with_thinking_closed(tokenizer, turned_off)
    if not closing:
        return template
    # An expression, since a block would strip blanks before it; and Jinja drops one newline at the end of a template.
    before = template.removesuffix("\n")
    return before + "{{ " + json.dumps(closing) + " if add_generation_prompt else '' }}"


def thinking_in(template: str) -> str | None:
    """Describe what a chat template, as it is used, does about thinking; `None` if it has none."""
    return "turned off in the chat template" if "<think>" in template else None


def _closing(rendered: str) -> str:
    """Return what closes the thinking block at the end of a prompt, nothing where none is open."""
    block = _OPEN_BLOCK.search(rendered)
    return "" if block is None else "\n" * max(0, _LINES_BETWEEN - block[1].count("\n")) + "</think>\n\n"


def _unusable(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's chat template cannot be rendered: {reason}; "
        f"use the template of an instruction-tuned Qwen-VL checkpoint ({spelled('chat_template')})"
    )


def _special(tokenizer: Any) -> dict[str, Any]:
    return dict(tokenizer.special_tokens_map)


@lru_cache(maxsize=256)
def _rendered_apart(request: str) -> str:
    """Render a template in a process apart; failures are remembered too, since they cost the most.

    Returns:
        What `template_child.render` returns, or a JSON object of `lost`: why there is no answer.
    """
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", template_child.__file__, str(_MOST_SECONDS), str(_MOST_MEMORY)],
            input=request.encode(),
            capture_output=True,
            timeout=_WAIT_SECONDS,
            check=True,
            cwd="/",
            env={
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **{name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            },
        )
    except (OSError, subprocess.SubprocessError) as error:
        bounds = f"{_MOST_SECONDS} s of processor time or {_MOST_MEMORY >> 20} MB"
        return json.dumps({"lost": f"it takes more than {bounds} ({type(error).__name__})"})
    return done.stdout.decode()
