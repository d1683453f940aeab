"""Templates of strangers: what is sound renders as transformers renders it, what is not is one line."""

from __future__ import annotations

import time
from typing import Any

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from gapo_mega.data.bounded_template import TemplateLimit, rendered

CHAT = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "  What is 2 + 2?\nnow\n"},
    {"role": "assistant", "content": "<think>a</think> 4."},
    {"role": "user", "content": "naïve 東京 '\""},
]
VALUES: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}

SOUND = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- for m in messages -%}{{ loop.index }}/{{ loop.length }} {{ loop.last }} {{ loop.revindex }} "
    "{{ loop.previtem.role if loop.previtem }}\n{%- endfor %}",
    "{{ bos_token + ' ' + messages[0].content ~ 3 ~ none ~ [1, 'a'] }}",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n * 2 ** 3 % 5 }}",
    "{% macro turn(m, end='') %}[{{ m.role | upper }}] {{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m, end=eos_token) }}{% endfor %}",
    "{{ messages | tojson }}\n{{ messages | tojson(indent=4) }}\n"
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages[1].content.split('\n') | list }}{{ messages[2].content.split('</think>')[-1].lstrip() }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content | replace('a', 'bb') }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | indent(2) | center(40) }}",
    "{{ '%s-%05d' % ('a', 3) }}{{ 'x{:>4}'.format('b') }}{{ 'ab' * 3 }}{{ ([0] * 3) | length }}{{ 1.5 * 2 }}",
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns') }}{% endif %}{{ m.content }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for m in messages | reverse %}"
    "{{ m.role }}{% endfor %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}{{ missing }}"
    "{{ tools is none }}",
    "{%- for m in messages recursive %}{{ m.role if m is mapping else m }}"
    "{{ loop([1, 2]) if m is mapping }}{% endfor -%}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    "{% filter upper %}a{{ bos_token }}{% endfilter %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ dict(a=1) }}{{ [1, 2] | sum }}",
]


@pytest.mark.parametrize("text", SOUND)
@pytest.mark.parametrize("copies", [1, 30])
def test_sound_templates_render_as_by_transformers(text: str, copies: int) -> None:
    chat = CHAT[:1] + CHAT[1:3] * copies + CHAT[3:]
    (expected,), _ = render_jinja_template([chat], chat_template=text, **VALUES)
    assert rendered(text, {**VALUES, "messages": chat, "tools": None, "documents": None}) == expected


MANY = "{% for i in range(99999) %}"
END = "{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = EXPR %}{% endfor %}{{ ns.x }}"
)

BOMBS = [
    MANY + MANY + END + END,
    MANY + MANY + "x" + END + END,
    MANY + MANY + "{{ i }}" + END + END,
    "{{ 'x' * 20000000000 }}",
    "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "{{ 20000000000 * 'x' }}",
    "{{ 'x' * 2e10 | int }}",
    "{{ ('x' * 20000000000) | length }}",
    "{% set a = [0] * 20000000000 %}",
    "{% set a = ('x' * 100000) %}" + MANY + "{{ a }}" + END,
    "{% set a = [[0] * 100000] * 100000 %}{{ a }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    DOUBLING.replace("EXPR", "ns.x ~ ns.x"),
    DOUBLING.replace("EXPR", "ns.x + ns.x"),
    DOUBLING.replace("EXPR", "ns.x * 2"),
    DOUBLING.replace("EXPR", "[ns.x, ns.x]"),
    DOUBLING.replace("EXPR", "ns.x | replace('x', 'xx')"),
    DOUBLING.replace("EXPR", "ns.x.replace('x', 'xx')"),
    DOUBLING.replace("EXPR", "(ns.x, ns.x) | join(ns.x)"),
    DOUBLING.replace("EXPR", "'%s%s' % (ns.x, ns.x)"),
    DOUBLING.replace("EXPR", "'{0}{0}'.format(ns.x)"),
    DOUBLING.replace("EXPR", "ns.x.join([ns.x, ns.x, ns.x])"),
    "{{ 'x' | center(20000000000) }}",
    "{{ 'x'.center(20000000000) }}",
    "{{ 'x'.ljust(20000000000) }}",
    "{{ 'x'.zfill(20000000000) }}",
    "{{ '%20000000000d' % 1 }}",
    "{{ '%*d' % (20000000000, 1) }}",
    "{{ '%20000000000d' | format(1) }}",
    "{{ '{:>20000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 20000000000) }}",
    "{{ 'a\nb' | indent(20000000000) }}",
    "{{ [1] | tojson(indent=20000000000) }}",
    "{{ [1] | batch(20000000000, 0) | list }}",
    "{{ 1.5 | round(20000000000, 'ceil') }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ range(99999) | join('x' * 99999) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for i in range(9) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% set x %}" + MANY + "y" * 9999 + END + "{% endset %}",
    "{{ lipsum(n=99999) }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]


@pytest.mark.parametrize("text", BOMBS)
def test_what_takes_too_long_or_makes_too_much_is_one_line(text: str) -> None:
    with pytest.raises(TemplateError) as raised:
        rendered(text, {**VALUES, "messages": CHAT}, seconds=1.0)
    assert len(str(raised.value)) < 300
    assert "memory" not in str(raised.value), "it was made, as far as there was room"


def test_the_limit_grows_with_the_conversation_and_counts_once_a_rendering() -> None:
    chat = [{"role": "user", "content": "x" * 3_000_000}]
    text = "{% for m in messages %}" + "{{ m.content | replace('yyyyyyyyyyyyyyyy', '') | trim }}" * 4 + END
    for _ in range(3):
        assert len(rendered(text, {"messages": chat})) == 12_000_000


def test_the_limit_of_time_is_kept() -> None:
    with pytest.raises(TemplateLimit, match=r"^takes longer than 0\.01 s, the limit of a template$"):
        rendered(MANY + MANY + END + END, {"messages": CHAT}, seconds=0.01)
    begun = time.monotonic()
    assert rendered("{{ messages[0].content }}", {"messages": CHAT}, seconds=5.0) == "Be <brief>."
    assert begun > 0


def test_a_template_that_is_none_is_told_with_its_line() -> None:
    with pytest.raises(TemplateSyntaxError) as raised:
        rendered("\n{% for %}", {})
    assert raised.value.lineno == 2


def test_the_sandbox_is_kept() -> None:
    for text in ("{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateError):
            rendered(text, {"messages": list(CHAT)})
