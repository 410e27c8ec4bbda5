"""Templates under a bound: what transformers renders, and an end to whatever does not end."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.data import rendering
from jax_refusal.data.rendering import render
from tests import tiny

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a < 'b'"}]
USER = "messages[-1]['content']"

# Templates that use what published ones use, in every statement of the language.
COMMON = {
    "chatml": tiny.CHAT_TEMPLATE,
    "trim and join": "{{ [messages[0].role, " + USER + " | trim] | join(': ') }}",
    "concatenation": "{{ bos_token ~ " + USER + " ~ 1 ~ none ~ [1, (2, 'x'), {'k': messages}] }}",
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages if m.role != 'tool' %}"
        "{% set ns.n = ns.n + loop.index %}{% set ns.last = m['content'][:4] %}{% endfor %}"
        "{{ ns.n }} {{ ns.last }}"
    ),
    "macros": (
        "{%- macro turn(m, sep=': ', ending=eos_token) -%}{{ m.role | capitalize + sep }}"
        "{{- caller() if caller is defined else m.content }}{{ ending }}{%- endmacro -%}"
        "{% call turn(messages[0]) %}inside{% endcall %}{{ turn(messages[1], sep='>') }}"
    ),
    "tests and filters": (
        "{% if messages is sequence and messages[0].content is string %}{{ messages | tojson }}"
        "{{ messages | map(attribute='role') | list | length }}{% endif %}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map('upper') | first }}"
        "{{ messages | rejectattr('role', 'in', ['user']) | list | tojson(indent=2) }}"
        "{{ nothing | default('none at all') }} {{ 'x' in 'xyz' and 3 in [1, 2, 3] }}"
        "{{ nothing is not defined or nothing.x }}{{ 'abc' | replace('b', 'BB') | indent(2) }}"
    ),
    "methods": (
        "{{ " + USER + ".split(' ') | last }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}'.format('b') }}"
        "{{ 'x'.join(['1', '2']) }}{{ ' a '.strip().upper().startswith('A') }}"
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
        "{{ messages[0].get('none', 'given') }}{{ 'ab' * 3 }}{{ 7 // 2 * 2 ** 3 % 5 - 1 / 4 }}"
    ),
    "loops": (
        "{% for m in messages[1:] + messages[:1] %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ loop.index0 }}{{ m.content }}{% break %}{% else %}none{% endfor %}"
        "{% for i in range(3) recursive %}{{ i }}{{ loop(range(i)) }}{% endfor %}"
    ),
    "blocks": (
        "{% set text %}{% for m in messages %}{{ m.content | e }},{% endfor %}{% endset %}"
        "{% filter upper %}{{ text }}{% endfilter %}{% block end %}{{ text | length }}"
        "{% endblock %}"
        "{{ self.end() }}{% with a = 1, b = text %}{{ a }}{{ b }}{% endwith %}"
        "{% generation %}{{ text }}{% endgeneration %}{# a comment #}\n  "
        "{% raw %}{{ x }}{% endraw %}"
    ),
}

LOOP = "{% for i in range(99999) %}"
ENDLESS = {
    "loops in loops": LOOP * 6 + "{% endfor %}" * 6,
    "loops that write": LOOP * 3 + "x{{ i }}" + "{% endfor %}" * 3,
    "loops that pass all by": (LOOP + "{% for j in range(99999) if j < 0 %}{% endfor %}") * 3
    + "{% endfor %}" * 3,
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a recursive loop": "{% for i in [40] recursive %}{{ loop([i - 1] * 9) if i }}{% endfor %}",
    "a text repeated": "{{ 'x' * 10 ** 10 }}",
    "a text repeated, the other way": "{{ 9999999999 * 'x' }}",
    "a list repeated": "{{ ([messages] * 10 ** 9) | length }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of powers": "{{ ((9 ** 999) ** 999) ** 999 }}",
    "a text doubled": (
        "{% set ns = namespace(x='xy') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}"
    ),
    "a text doubled by ~": (
        "{% set ns = namespace(x='xy') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}"
    ),
    "a block doubled": (
        "{% set ns = namespace(x='xy') %}{% for i in range(99) %}"
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}"
    ),
    "a list doubled": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(99) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "a dictionary doubled": (
        "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
        "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}"
    ),
    "a namespace of itself": "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}",
    "replaced": (
        "{% set x = 'a' * 99999 %}{% set y = x | replace('a', x) %}{{ y.replace('a', x) }}"
    ),
    "joined": "{{ range(99999) | join('a' * 99999) }}",
    "joined by a method": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "wide": "{{ 'a' | center(10 ** 9) }}",
    "wide by a method": "{{ 'a'.ljust(2000000000) }}",
    "wide by a format": "{{ '%2000000000d' % 1 }}",
    "wide by another format": "{{ '{:>{}}'.format('a', 2000000000) }}",
    "wide by a text": "{{ '{:>{}}'.format('a', '2000000000') }}",
    "wide by a filter": "{{ '%*d' | format(2000000000, 1) }}",
    "wide by a list": "{{ '{0:>{1[0]}}'.format('a', [2000000000]) }}",
    "indented": "{{ ('\n' * 99999) | indent(99999, true) }}",
    "indented JSON": "{{ messages | tojson(indent=10 ** 9) }}",
    "expanded": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "translated": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "filled": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "sliced": "{{ [1] | slice(10 ** 9, 'x') | list }}",
    "rounded": "{{ 5 | round(10 ** 9, 'ceil') }}",
    "sums of lists": ("{% set l = range(99999) | batch(1) %}{{ l | sum(start=[]) | length }}"),
    "searched": "{% set x = 'a' * 999999 %}{{ x.rfind('b' + 'a' * 499999) }}",
    "compared": (
        "{% set x = 'a' * 999999 %}{% set y = x + 'b' %}"
        + LOOP * 2
        + "{{ 1 if x + 'c' == y }}"
        + "{% endfor %}" * 2
    ),
    "cut": "{% set x = 'a' * 999999 %}" + LOOP + "{% set y = x[1:] %}" * 50 + "{% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ours(template: str, tokenizer: Any, turns: list[dict] = TURNS) -> str:
    variables = {
        **tokenizer.special_tokens_map,
        "messages": turns,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    return render(template, variables, 10)


@pytest.mark.parametrize("name", COMMON)
def test_the_text_is_transformers(name: str, tokenizer: Any) -> None:
    theirs = tokenizer.apply_chat_template(
        TURNS, chat_template=COMMON[name], tokenize=False, add_generation_prompt=True
    )
    assert ours(COMMON[name], tokenizer) == theirs


@pytest.mark.parametrize("name", ENDLESS)
def test_an_end_to_what_does_not_end(name: str, tokenizer: Any) -> None:
    """Within seconds and some 400 MB at most, whatever the machine does besides."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((rendering.Spent, OverflowError)):
        ours(ENDLESS[name], tokenizer)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_the_bound_holds_in_any_thread(tokenizer: Any) -> None:
    found: list[BaseException] = []

    def work() -> None:
        try:
            ours(ENDLESS["a power"] + ENDLESS["loops in loops"], tokenizer)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_long_instructions_have_long_budgets(tokenizer: Any) -> None:
    """A prompt of a million tokens goes through what a usual template does."""
    text = "many words " * 400_000
    turns = [{"role": "user", "content": text}]
    template = (
        "{% for m in messages %}{% set c = m.content | trim %}{% set c = c.replace('<x>', '') %}"
        "{% if '</think>' in c %}{{ c.split('</think>')[-1] }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + c.lstrip('\n') + '<|im_end|>' }}{% endfor %}"
    )
    variables = {"messages": turns}
    assert render(template, variables, len(text)).count("many") == 400_000


def test_a_budget_is_for_one_prompt(tokenizer: Any) -> None:
    """Some 80 million of the 100 million steps, three times."""
    template = "{% for i in range(99999) %}{% set x = 'a' * 500 %}{% endfor %}done"
    assert [ours(template, tokenizer) for _ in range(3)] == ["done"] * 3


@pytest.mark.parametrize(
    "template",
    ["{{ messages | random }}", "{{ lipsum() }}", "{{ 'a b' | wordwrap(1) }}"],
)
def test_chance_and_slow_filters_are_left_out(template: str, tokenizer: Any) -> None:
    with pytest.raises(Exception, match=r"No filter named|'lipsum' is undefined"):
        ours(template, tokenizer)


def test_a_template_of_megabytes(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="it has 2000000 characters, and 200000 are allowed"):
        ours("xy" * 1_000_000, tokenizer)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("%Y-%m-%d %H:%M:%S", "2024-07-26 00:00:00"),
        ("%d %b %Y, %A %a %B %p", "26 Jul 2024, Friday Fri July AM"),
        ("%-d/%-m %j 100%% %I", "26/7 208 100% 12"),
    ],
)
def test_the_clock_stands(form: str, said: str, tokenizer: Any) -> None:
    assert ours("{{ strftime_now('" + form + "') }}", tokenizer) == said


@pytest.mark.parametrize(
    "template",
    [
        "{% macro day(d=strftime_now('%F')) %}{{ d }}{% endmacro %}{{ day() }}",
        "{% macro o() %}{% macro i() %}{{ strftime_now('%F') }}{% endmacro %}{{ i() }}"
        "{% endmacro %}{{ o() }}",
        "{% set clock = strftime_now %}{{ clock('%F') }}",
        "{{ ['%F'] | map('replace', '%F', strftime_now('%F')) | first }}",
    ],
)
def test_the_clock_stands_wherever_it_is_asked(template: str, tokenizer: Any) -> None:
    assert ours(template, tokenizer) == "2024-07-26"


def test_no_template_reaches_out(tokenizer: Any, tmp_path: Path) -> None:
    for template in (
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/hostname' %}",
        "{{ messages | attr('__class__') }}",
        "{{ [messages] | map(attribute='__class__') | first }}",
    ):
        try:
            text = ours(template, tokenizer)
        except Exception:
            text = ""
        assert text == ""
