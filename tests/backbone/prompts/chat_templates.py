"""Chat templates built as those of published checkpoints are: the same parts, written again and shorter."""

from __future__ import annotations

_PICTURES = """{%- set pictures = namespace(count=0) %}
{%- macro written(content, counted, of_system=false) %}
{%- if content is string %}{{- content }}
{%- elif content is iterable and content is not mapping %}
    {%- for part in content %}
        {%- if 'image' in part or 'image_url' in part or part.type == 'image' %}
            {%- if of_system %}{{- raise_exception('A system message has no pictures.') }}{%- endif %}
            {%- if counted %}{%- set pictures.count = pictures.count + 1 %}{%- endif %}
            {%- if add_vision_id %}{{- 'Picture ' ~ pictures.count ~ ': ' }}{%- endif %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
        {%- elif 'text' in part %}{{- part.text }}
        {%- else %}{{- raise_exception('Unknown part.') }}{%- endif %}
    {%- endfor %}
{%- elif content is none or content is undefined %}{{- '' }}
{%- else %}{{- raise_exception('Unknown content.') }}{%- endif %}
{%- endmacro %}
{%- if not messages %}{{- raise_exception('No messages.') }}{%- endif %}
"""

_EFFORT = """{%- set advice = '' %}
{%- if enable_thinking is undefined or enable_thinking is true %}
    {%- set effort = reasoning_effort|default('xhigh') %}
    {%- if effort not in ('xhigh', 'medium', 'low') %}{{- raise_exception('Unknown effort ' ~ effort) }}{%- endif %}
    {%- if effort == 'xhigh' %}{%- set advice = 'Think for a long time.' %}
    {%- elif effort == 'low' %}{%- set advice = 'Think briefly.' %}{%- endif %}
{%- endif %}
"""

_SYSTEM = """{%- if tools and tools is iterable and tools is not mapping %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {%- set content = written(messages[0].content, false, true)|trim %}
        {{- '<|im_start|>system\\n' + (ADVICE + '\\n\\n' if ADVICE else '') + content + '<|im_end|>\\n' }}
    {%- elif ADVICE %}{{- '<|im_start|>system\\n' + ADVICE + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
"""

_MESSAGES = """{%- set ns = namespace(tool_steps=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.tool_steps and message.role == "user" %}
        {%- set content = written(message.content, false)|trim %}
        {%- if not(content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set ns.tool_steps = false %}{%- set ns.last_query = index %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.tool_steps %}{{- raise_exception('No query.') }}{%- endif %}
{%- for message in messages %}
    {%- set content = written(message.content, true)|trim %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}{{- raise_exception('The system message is not the first.') }}{%- endif %}
    {%- elif message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if KEPT or loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought|trim + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- if message.tool_calls and message.tool_calls is iterable and message.tool_calls is not mapping %}
            {%- for call in message.tool_calls %}
                {%- for name, value in call.arguments|items %}
                    {%- set value = value | string if value is string else value | tojson | safe %}
                    {{- '<parameter=' + name + '>' + value }}
                {%- endfor %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if not loop.last and loop.nextitem.role != "tool" or loop.last %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{{- raise_exception('Unknown role.') }}{%- endif %}
{%- endfor %}
"""

_OPEN_UNLESS_OFF = """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""

_CLOSED_UNLESS_ON = """{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is true %}
        {{- '<think>\\n' }}
    {%- else %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

_ALWAYS_OPEN = "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n"


def _template(end: str, *, effort: str = "", kept: str = "false") -> str:
    system = _SYSTEM.replace("ADVICE", "advice" if effort else "''")
    return _PICTURES + effort + system + _MESSAGES.replace("KEPT", kept) + end


_KEPT_IN_3_6 = "(preserve_thinking is defined and preserve_thinking is true)"
_KEPT_IN_3_8 = "preserve_thinking is undefined or preserve_thinking is true"
_REFUSAL = "{%- if enable_thinking is false %}{{- raise_exception('This model always thinks.') }}{%- endif %}\n"

QWEN_3_5_SMALL = _template(_CLOSED_UNLESS_ON)
"""Of Qwen3.5 0.8B and 2B: closed unless thinking is asked for."""

QWEN_3_5 = _template(_OPEN_UNLESS_OFF)
"""Of Qwen3.5 from 4B on."""

QWEN_3_6 = _template(_OPEN_UNLESS_OFF, kept=_KEPT_IN_3_6)

QWEN_3_8 = _template(_OPEN_UNLESS_OFF, effort=_EFFORT, kept=_KEPT_IN_3_8)
"""A system message asks for careful thought unless thinking is turned off."""

ALWAYS_THINKS = _template(_ALWAYS_OPEN, effort=_REFUSAL)
"""Of checkpoints that refuse to turn thinking off."""

QWEN_3_VL_THINKING = (_template(_ALWAYS_OPEN)).replace("|trim", "")
"""Knows no variable, and leaves texts as they are."""

SWITCHABLE = {"3.5 small": QWEN_3_5_SMALL, "3.5": QWEN_3_5, "3.6": QWEN_3_6, "3.8": QWEN_3_8}
"""Those that turn thinking off where `enable_thinking` is false."""
