"""A chat template is a program that came with a checkpoint: it renders as in transformers, or is refused soon."""

from __future__ import annotations

import json
import shutil

import pytest

from qwen_vl_classifier import Backbone, Example
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from qwen_vl_classifier.backbone.prompts import thinking
from qwen_vl_classifier.backbone.prompts.thinking import DEFAULT_CHAT_TEMPLATE, render_prompt
from qwen_vl_classifier.errors import CheckpointError

TEXT = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"

QWEN_3 = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}
{%- macro place(content) %}{%- if content is string %}{{- content }}{%- else %}
{%- for item in content %}
{%- if item.type == 'image' or 'image' in item %}
{%- set image_count.value = image_count.value + 1 %}
{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in item %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}
{%- for message in messages %}
{%- if message.role == "user" %}{{- '<|im_start|>' + message.role + '\\n' + place(message.content) + '<|im_end|>\\n' }}
{%- elif message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ raise_exception('Unexpected role') }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

SOUND = {
    "default": DEFAULT_CHAT_TEMPLATE,
    "another": DEFAULT_CHAT_TEMPLATE.replace("assistant", "helper"),
    "as of Qwen3-VL": QWEN_3,
    "special tokens": "{{ eos_token }}|{{ pad_token }}|{{ bos_token }}|" + TEXT,
    "filters": "{{ messages | tojson(indent=2) }}{{ dict(a='ü') | tojson(ensure_ascii=True) }}" + TEXT,
    "loop controls": "{% for x in range(9) %}{% if x == 3 %}{% continue %}{% endif %}{{ x }}{% endfor %}" + TEXT,
    "blanks": "  {% if true %}\n  a\n  {% endif %}\n{{ tools is none }}{{ documents is defined }}\n" + TEXT + "\n\n",
    "generation": "{% generation %}\n a \n{% endgeneration %}\n" + TEXT,
    "namespace": "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}" + TEXT,
    "the year": "{{ strftime_now('%Y') }}" + TEXT,
}

HOSTILE = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=1) %}{% for _ in range(64) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "repeated text": "{{ ('a' * 1000000000) * 9 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a wide format": "{{ '%1000000000d' | format(1) }}",
    "centred": "{{ 'a' | center(2000000000) }}",
    "indented": "{{ messages | tojson(indent=1000000000) }}",
    "long": "{{ 'a' * 9000 }}",
    "division": "{{ 1 / 0 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "open": "{% for",
    "a message": "{{ raise_exception('\x1b[2J') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a shell": "{{ cycler.__init__.__globals__.os.popen('touch PLACE') }}",
    "a file": "{{ namespace.__init__.__globals__.sys.modules.os.system('touch PLACE') }}",
    "included": "{% include '/etc/passwd' %}",
}


@pytest.fixture
def tokenizer(tiny_backbone):
    return tiny_backbone.processor.tokenizer


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("name", SOUND)
def test_it_renders_as_in_transformers(tokenizer, name, images):
    message = {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "Größe\n是 \ud83d"}]}
    expected = tokenizer.apply_chat_template(
        [message], chat_template=SOUND[name], tokenize=False, add_generation_prompt=True
    )
    assert render_prompt(tokenizer, SOUND[name], "Größe\n是 \ud83d", images=images) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(thinking, "_MOST_SECONDS", 1)
    folder = shutil.copytree(BUILTIN["builtin:tiny"], tmp_path / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = HOSTILE[name].replace("PLACE", str(tmp_path / "ran")) + TEXT
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="chat template cannot be rendered") as caught:
        Backbone.load(folder, device="cpu").prepare([Example(None, "a text")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_one_that_is_too_long(tokenizer):
    with pytest.raises(CheckpointError, match="it has 1,000,0"):
        render_prompt(tokenizer, "{# " + "a" * 10**6 + " #}", "a text")


def test_it_is_rendered_once_for_each_number_of_pictures(tokenizer, monkeypatch):
    started = []
    run = thinking.subprocess.run
    monkeypatch.setattr(thinking.subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    for images in (0, 1, 0, 1, 1):
        render_prompt(tokenizer, "once " + DEFAULT_CHAT_TEMPLATE, "a text", images=images)
        render_prompt(tokenizer, DEFAULT_CHAT_TEMPLATE, "a text", images=images)
    assert len(started) == 2
