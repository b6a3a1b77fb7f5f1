"""A chat template that would never end or fill the memory is stopped; others do what they did."""

import time

import pytest

from research.errors import InputError
from research.sources import template_program
from research.sources.template_program import Exhausted, InvalidTemplate

VALUES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "tools": None}
DOUBLED = "{%% set ns = namespace(a=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.a }}"

HOSTILE = [
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000)|list|length }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 9**(9**9) }}",
    "{{ [[1] * 100000] * 100000 }}",
    DOUBLED % ("'x'", "{% set ns.a = ns.a ~ ns.a %}"),
    DOUBLED % ("'x'", "{% set ns.a = ns.a + ns.a %}"),
    DOUBLED % ("'x'", "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}"),
    DOUBLED % ("['x']", "{% set ns.a = ns.a + ns.a %}"),
    DOUBLED % ("['x']", "{% set ns.a = [ns.a, ns.a] %}"),
    DOUBLED % ("{'x': 1}", "{% set ns.a = {'a': ns.a, 'b': ns.a} %}"),
    DOUBLED % ("{'x': 1}", "{% set ns.a = dict(a=ns.a, b=ns.a) %}"),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '%*d' % (1000000000, 5) }}",
    "{{ '{:1000000000}'.format(5) }}",
    "{{ '{:{w}}'.format(5, w=1000000000) }}",
    "{{ range(100000)|join('x' * 4000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a\n' * 100000)|indent(9999) }}",
    "{{ messages|tojson(indent=10000000) }}",
    "{{ ('\t' * 100000).expandtabs(10000) }}",
    "x" * 2_000_000,
]
HARMLESS = {
    "{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] }};{% endfor %}": "user: hi;assistant: ho;",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}": "a1b2",
    "{% if 'a' in ['a', 'b'] and (1, 2) == (1, 2) %}y{% endif %}{% set a, b = 1, 2 %}{{ a }}{{ b }}": "y12",
    "{{ messages|map(attribute='content')|join(', ') }} {{ 'a,b'.split(',')|join('-') }}": "hi, ho a-b",
    "{{ 7.126|round(2) }} {{ 3 * 4.5 }} {{ 1000000 * 2.5 }} {{ 2 + 3 }} {{ 2 ** 10 }} {{ 7 % 4 }}": (
        "7.13 13.5 2500000.0 5 1024 3"
    ),
    "{{ '%s of %d' % ('a', 123456) }} {{ '{} {:>4}'.format(123456, 'b') }}": "a of 123456 123456    b",
    "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}": "123",
    "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ ' ' if not loop.last }}{% endfor %}": "1/3 2/3 3/3",
    "{% for i in [] %}x{% else %}none{% endfor %}{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}": "none23",
    "{% macro f(a, b='c') %}{{ a + b }}{% endmacro %}{{ f('x') }}{{ messages[1:]|length }}": "xc1",
    "{{ {'a': [1, 'é']}|tojson }} {{ namespace(x=1).x }} {{ (messages|first).content|upper }}": '{"a": [1, "é"]} 1 HI',
    "{{ missing is defined }}{{ missing or 'd' }}{{ [missing]|length }}": "Falsed1",
    "{{ 'x' * 1000 }}".replace("1000", "3"): "xxx",
}


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_keeps_to_its_budget(source, monkeypatch):
    monkeypatch.setattr(template_program, "MOST_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(Exhausted):
        template_program.render(source, VALUES)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("source", HARMLESS, ids=range(len(HARMLESS)))
def test_what_templates_do_is_as_before(source):
    assert template_program.render(source, VALUES) == HARMLESS[source]


def test_long_conversations_have_a_larger_budget():
    turns = [{"role": "user", "content": "x" * 1000}] * 3000
    source = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    assert len(template_program.render(source, {"messages": turns})) == 3000 * 1004


@pytest.mark.parametrize(
    "source", ["{{", "{% for %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ x|nofilter }}"]
)
def test_what_is_no_template_is_named(source):
    with pytest.raises(InvalidTemplate, match="chat template"):
        template_program.render(source, VALUES)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{% set x = [1] %}{{ x.append(1) }}"])
def test_the_sandbox_holds(source):
    with pytest.raises(Exception, match="unsafe") as caught:
        template_program.render(source, VALUES)
    assert not isinstance(caught.value, InputError)
