"""Chat templates are untrusted code: they can read only the chat, change nothing, terminate, and write bounded text."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.chat_template import budget
from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import ChatTemplate, Renderer, RenderSettings
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.conversation import Message

DATE = datetime.datetime(2031, 5, 17, 10, 30)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": {"name": "Rome"}}}}
CHAT = [
    Message("user", "Hello"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "12"),
    Message("assistant", "Bye"),
]
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
SECRET = "tunesmith-secret-value"


def template(text: str, **kwargs: Any) -> Renderer:
    return ChatTemplate(text, "test", {"bos_token": "<s>"}).with_settings(RenderSettings(DATE, kwargs))


def encode(text: str, tokenizer: Any) -> str:
    encoder = build_encoder(copy.deepcopy(tokenizer), None, {}, DATE)
    encoder.template = template(text).template
    return encoder.tokenizer.decode(encoder.encode_prompt(CHAT[:1]))


def outcomes(text: str, tokenizer: Any) -> list[str]:
    """The result of each way to run a template; a refusal as its text."""
    ways: list[Callable[[], str]] = [
        lambda: template(text).render(CHAT, [TOOL]),
        lambda: template(text).render_beginnings(CHAT, [TOOL]).text,
        lambda: encode(text, tokenizer),
    ]
    found = []
    for way in ways:
        try:
            found.append(way())
        except (TemplateRefused, TunesmithError) as error:
            found.append(f"refused: {error}")
    return found


# starting points: everything that a template can name
ROOTS = [
    "''", "'{}'|safe", "[]", "()", "{}", "1", "1.5", "true", "none", "range", "range(2)", "dict", "namespace", "namespace(a=1)",
    "cycler", "cycler('a')", "joiner", "joiner()", "lipsum", "strftime_now", "raise_exception", "self", "loop", "caller", "m",
    "tunesmith_generation", "tunesmith_endgeneration", "tunesmith_turn_done", "tunesmith_concat", "messages", "messages[0]",
    "messages[1].tool_calls[0].function.arguments.items()", "messages[0].content.upper", "messages[0].items", "''.format",
    "''.join", "undefined_name", "tools", "tools[0]", "(messages|map('upper'))", "m.caller", "'a'|e", "environment", "context",
]  # fmt: skip
LEADS = [
    "__class__", "__globals__", "__init__", "__self__", "__func__", "__code__", "__closure__", "__module__", "__dict__",
    "__wrapped__", "__builtins__", "__mro__", "gi_frame", "gi_code", "f_back", "func_globals", "_func", "_environment",
    "_iterable", "_turns", "_watch", "_function", "cr_frame", "mro", "budget", "environment", "unwatched", "watcher",
]  # fmt: skip


@pytest.mark.parametrize("way", ["({root}).{lead}", "({root})['{lead}']", "({root})|attr('{lead}')", "[{root}]|map(attribute='{lead}')|first"])  # fmt: skip
def test_no_value_leads_out(way: str) -> None:
    is_all = way.endswith(".{lead}") or os.environ.get("TUNESMITH_LONG")
    for root in ROOTS:
        found = [way.format(root=root, lead=lead) for lead in (LEADS if is_all else LEADS[:: len(LEADS) // 4])]
        tests = [
            f"{{% if n in ({n}, none) and ({path}) is defined and ({path}) is not none %}}OUT {path}{{% endif %}}"
            for n, path in enumerate(found)
        ]
        text = "{% macro m() %}{{ caller }}{% endmacro %}{% for x in [1] %}" + "".join(tests) + "{% endfor %}"
        made = template(text)
        for run in (made.render, lambda *args, made=made, **named: made.render_beginnings(*args, **named).text):
            try:
                assert "OUT" not in run(CHAT, variables={"n": None})
            except TemplateRefused:  # the value does not exist, or an attribute is not accessible
                for n in range(len(found)):
                    with contextlib.suppress(TemplateRefused):
                        assert "OUT" not in run(CHAT, variables={"n": n})


ESCAPES = [
    # a format string accesses attributes itself, whatever object the method belongs to
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ''.format.__self__ }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{{ ''|attr('format')|attr('__self__') }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ [messages]|map(attribute='0.__class__')|list }}",
    "{{ '{0.__init__.__globals__}'|attr('format')(cycler) }}",
    "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(namespace()) }}",
    "{{ tunesmith_generation.format('{0.__globals__}', raise_exception) }}",
    "{{ tunesmith_generation('x') }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ (messages|groupby('__class__')|list)[0] }}",
    "{{ messages|sort(attribute='__class__')|length }}x",
    "{{ [range]|map(attribute='__class__')|list }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ dict.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ dict['x'].__origin__ }}",
    "{% set ns = namespace() %}{{ ns.__class__ }}",
    "{{ (messages|map('upper')).gi_frame.f_back.f_globals }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ ()|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages[0]['__class__'] }}",
    "{{ 5 .to_bytes(10, 'big') }}",
    "{{ int.from_bytes }}",
    "{{ '/etc/hostname'|include }}",
    "{% include '/etc/hostname' %}",
    "{% import '/etc/hostname' as x %}",
    "{% from '/etc/hostname' import x %}",
    "{% extends '/etc/hostname' %}",
    "{% do messages.append(1) %}",
    "{{ [1, 2, 3]|random }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_known_escapes_are_refused(text: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_SECRET", SECRET)
    for found in outcomes(text, tokenizer):
        assert SECRET not in found
        assert "<class" not in found and "0x" not in found  # noqa: PT018
        assert found.startswith("refused: ") or found.strip() in HARMLESS, found


HARMLESS = ("", "1x", "4x", "[Undefined]", "(Undefined, [{'role': 'user', 'content': 'Hello'}])")

CHANGES = [
    "messages.append(1)", "messages.clear()", "messages[0].update(role='x')", "messages[0].pop('role')",
    "messages[0].setdefault('a', 1)", "messages[0].clear()", "messages[0].popitem()", "dict.update(messages[0], {'role': 'x'})",
    "dict.pop(messages[0], 'role')", "dict.clear(messages[0])", "dict.setdefault(messages[0], 'a', 1)",
    "dict.__setitem__(messages[0], 'role', 'x')", "messages[1].tool_calls.append(1)", "messages[1].tool_calls[0].update(a=1)",
    "messages[1].tool_calls[0].function.arguments.update(a=1)", "messages[1].tool_calls[0].function.arguments.city.clear()",
    "tools.append(1)", "tools[0].clear()", "tools[0].function.parameters.update(a=1)", "extra.deep.append(1)", "extra.clear()",
    "messages|map('clear')|list", "[messages[0]]|map(attribute='clear')|first()", "(messages[0]|attr('clear'))()",
    "(messages[0].items()|list).clear()", "messages[0]['clear']()", "messages[1]['tool_calls'].sort()",
    "messages[1]['tool_calls'].reverse()", "messages[1]['tool_calls'].insert(0, 1)", "messages[1]['tool_calls'].extend([1])",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_watched", [False, True])
def test_nothing_that_is_given_can_be_changed(change: str, is_watched: bool) -> None:
    extra: dict[str, Any] = {"deep": [1, 2]}
    turns = [copy.deepcopy(message.to_template()) for message in CHAT]
    tool = copy.deepcopy(TOOL)
    made = template("{% set x = " + change + " %}", extra=extra)
    with contextlib.suppress(TemplateRefused):
        made.render_beginnings(CHAT, [tool]) if is_watched else made.render_turns(turns, [tool])
    assert turns == [message.to_template() for message in CHAT]
    assert tool == TOOL
    assert extra == {"deep": [1, 2]}
    assert CALL["function"] == {"name": "look", "arguments": {"city": {"name": "Rome"}}}


LARGE = [
    "{{ 'a' * 10**12 }}", "{{ 10**12 * 'a' }}", "{{ [1] * 10**12 }}", "{{ (1,) * 10**12 }}", "{{ 10**(10**8) }}",
    "{{ 9**(9**9) }}", "{{ 'a'|center(10**9) }}", "{{ 'a'.center(10**9) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(width=10**9) }}", "{{ '1'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}", "{{ ('\t' * 10**6).expandtabs(9999) }}",
    "{{ '{:>1000000000}'.format('a') }}", "{{ '{:>{w}}'.format('a', w=10**9) }}", "{{ ('{:>99999}' * 10**4).format(*range(10**4)) }}",
    "{{ '{0:>1000000000}'.format_map({'0': 1}) }}", "{{ '%1000000000s' % 'a' }}", "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' % 1.0 }}", "{{ '%1000000000s'|format('a') }}", "{{ ('%(x)s' * 10**5) % {'x': 'a' * 10**6} }}",
    "{{ 'a'|indent(10**9, true) }}", "{{ ('a\n' * 10**6)|indent(10**4) }}", "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}", "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "{{ range(99999)|join('a' * 10**6) }}", "{{ ('a' * 10**6).join(['b'] * 10**6) }}", "{{ (['b' * 10**6] * 10**6)|join }}",
    "{{ ''.join(['b' * 10**6] * 10**6) }}", "{{ [1, [2]]|tojson(indent=10**9) }}", "{{ [1, 2]|tojson(separators=('a' * 10**7, ':')) }}",
    "{{ 1.5|round(10**8, 'ceil') }}", "{{ 5|round(-10**8) }}", "{{ [1]|batch(10**9, 0)|list }}", "{{ [1]|slice(10**9)|list }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = '{}{}'.format(ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|sum(start=[]) %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% macro m(n) %}{{ 'a' * 10**6 }}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "{% for i in range(10000) %}{{ 'a' * 10**6 }}{% endfor %}",
    "{% set ns = namespace(l=[], s='a' * 10**6) %}{% for i in range(99999) %}{% set ns.l = ns.l + [ns.s ~ i] %}{% endfor %}",
    "{% set ns = namespace(l=[], s='a' * 10**6) %}{% for i in range(99999) %}{% set ns.l = ns.l + [ns.s[1:]] %}{% endfor %}",
]  # fmt: skip
# lists that contain the previous one twice: small in memory, huge when written, compared or hashed
BOMB = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
BOMB2 = BOMB + BOMB.replace("ns", "other")
BOMBS = [
    BOMB + use
    for use in (
        "{{ ns.x }}", "{{ ns }}", "{{ ns.x|tojson }}", "{{ ns.x|string }}", "{{ 'a' ~ ns.x }}", "{{ [ns.x]|join }}",
        "{{ '%s' % (ns.x,) }}", "{{ '{}'.format(ns.x) }}", "{{ {ns.x: 1} }}", "{{ {}[ns.x] }}", "{{ {}.get(ns.x) }}",
        "{{ [ns.x, ns.x]|unique|list }}", "{{ ns.x|e }}", "{{ ns.x|upper }}", "{{ ns.x|trim }}", "{{ raise_exception(ns.x) }}",
        "{{ [ns.x]|map('string')|list }}", "{{ [ns.x]|groupby(0)|list }}", "{{ ns.x|replace('a', 'b') }}",
        "{% set x %}{{ ns.x }}{% endset %}", "{% filter upper %}{{ ns.x }}{% endfilter %}",
    )
] + [
    BOMB2 + use
    for use in (
        "{{ ns.x == other.x }}", "{{ ns.x in [other.x] }}", "{{ ns.x < other.x }}", "{{ [ns.x, other.x]|sort }}",
        "{{ [ns.x, other.x]|max }}", "{{ [[ns.x]]|selectattr(0, 'eq', other.x)|list }}", "{{ ns.x is eq(other.x) }}",
        "{{ [ns.x].index(other.x) }}", "{{ [ns.x].count(other.x) }}", "{{ [other.x]|select('in', [ns.x])|list }}",
    )
]  # fmt: skip
LONG = [
    "{{ ('<a>' * 300000)|striptags }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999)|map('string')|select|list %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{% if n %}{{ caller(n) }}{% call(k) m(n - 1) %}{% endcall %}{% call(k) m(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call(k) m(60) %}{% endcall %}",
    "{% for i in [[1, 1]] recursive %}{{ loop([[1, 1], [1, 1]]) }}{% endfor %}",
    "{% block a %}{% if not done %}{{ self.a() }}{{ self.a() }}{% endif %}{% endblock %}",
]  # fmt: skip


# half a million nested lists: hashing them overflows Python's stack
DEEP = (
    "{% set ns = namespace(t=()) %}{% for i in range(1000) %}{% for j in range(500) %}{% set ns.t = (ns.t,) %}{% endfor %}"
    "{% endfor %}"
)
DEEP_USES = [
    "{{ messages[0].get(ns.t) }}", "{{ {ns.t: 1}|length }}", "{{ [ns.t]|unique|list|length }}", "{{ ns.t in messages[0] }}",
    "{{ dict([(ns.t, 1)])|length }}", "{{ dict.fromkeys([ns.t])|length }}", "{{ namespace([(ns.t, 1)]) }}", "{{ messages[0][ns.t] }}",
    "{{ ns.t == ns.t }}", "{{ ns.t }}", "{{ ns.t|tojson }}", "{{ [ns.t]|groupby(0)|list|length }}", "{{ {1: ns.t}.values() }}",
    "{% for i in [1] %}{{ loop.changed(ns.t) }}{% endfor %}",
]  # fmt: skip
# one C operation that would take minutes, or many that each scan a long list or text
SLOW = [
    "{{ ('a' * 1000000).strip('b' * 1000000 + 'a')|length }}", "{{ ('a' * 1000000).rstrip('b' * 1000000 + 'a')|length }}",
    "{{ ('a' * 1000000)|trim('b' * 1000000 + 'a')|length }}", "{{ ('a' * 1000000).rfind('ab' + 'a' * 400000) }}",
    "{{ ('a' * 1000000).rsplit('ab' + 'a' * 400000) }}", "{{ ('f' * 4000000)|int(base=16) // 7 > 1 }}",
    "{{ ('f' * 4000000)|int(0, 16) is divisibleby(7) }}", "{{ 0x" + "f" * 200_000 + " // 0x" + "e" * 90_000 + " > 1 }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(30000) %}{% set ns.l = ns.l + [i * 2305843009213693951] %}{% endfor %}{{ ns.l|unique|list|length }}",
    "{% set ns = namespace(n=1) %}{% for i in range(99999) %}{% set ns.n = ns.n - (0 - ns.n) %}{% endfor %}",
    *(
        "{% set l = range(100000)|list %}{% set d = dict(range(50000)|batch(2)) %}{% set f = '{0}' * 5000 %}{% set p = '%s' * 5000 %}"
        "{% set t = 'aB' * 8000 %}{% set u = 'a' * 4000 + 'b' %}{% set w = [t] * 500 %}"
        "{% for i in range(100000) %}{% set x = " + use + " %}{% endfor %}"
        for use in (
            "'zz' in l", "i + 1000000 in l", "'zz' not in l", "l.count('z')", "[l.index(99999)]", "range(100000).count('z')", "'z' in range(100000)",
            "d.copy()", "dict(d)", "dict.fromkeys(l)", "(i + 1000000) in d.values()", "d.items()|list|length", "f.format('')",
            "p|format(*l[:5000])", "t.swapcase()|length", "t|title|length", "t|wordcount", "t.split('a')|length", "t.count(u)",
            "u in t", "1 == (u in t)", "w|sort|length", "namespace(d)", "t|list|length", "cycler(*l)",
        )
    ),
]  # fmt: skip
# lists and groups take memory, whatever their texts
HEAPS = [
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, [1]|batch(100000, 0)|list] %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, [1]|slice(10000)|list] %}{% endfor %}",
    "{% set d = dict(range(50000)|batch(2)) %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, d.copy()] %}{% endfor %}",
    "{% set t = 'ab ' * 300000 %}{% set x = t.split()|length %}", "{% set t = 'ab ' * 300000 %}{% set x = t|list|length %}",
    "{{ strftime_now('%255d' * 2000000)|length }}", "{{ ('\U0001d11e' * 500000)|urlencode|length }}",
]  # fmt: skip


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower limits of the same kind, reached sooner."""
    monkeypatch.setattr(budget, "MAX_STEPS", 1_000_000)
    monkeypatch.setattr(budget, "MAX_TEXT", 2**20)
    monkeypatch.setattr(budget, "MAX_MADE", 2**26)


def is_refused_in_time(text: str, kind: str, seconds: float) -> bool:
    started = time.monotonic()
    with pytest.raises((TemplateRefused, ModelError)) as refused:
        template(text).render(CHAT) if kind == "render" else template(text).render_beginnings(CHAT)
    assert len(str(refused.value)) < 1000
    return time.monotonic() - started < seconds  # far below the time without limits; not the limit itself


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("text", [*LARGE, *BOMBS, *HEAPS])
@pytest.mark.parametrize("kind", ["render", "beginnings"])
def test_no_large_text_or_number_is_made(text: str, kind: str) -> None:
    assert is_refused_in_time(text, kind, 30)


@pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="two minutes; set TUNESMITH_LONG=1")
@pytest.mark.parametrize("text", [*LARGE, *BOMBS, *LONG, *SLOW, *HEAPS])
def test_the_real_limits_are_reached_in_time(text: str) -> None:
    assert is_refused_in_time(text, "render", 60)


@pytest.mark.parametrize("use", DEEP_USES)
def test_deep_lists_are_refused_before_python_walks_them(use: str) -> None:
    with pytest.raises(TemplateRefused, match=r"1,000"):
        template(DEEP + use).render(CHAT[:1])


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("text", [*LONG, *SLOW])
def test_a_template_without_end_is_refused(text: str) -> None:
    assert is_refused_in_time(text, "beginnings", 30)


@pytest.mark.usefixtures("_small_limits")
def test_the_limit_holds_in_other_threads_and_is_the_same_there() -> None:
    text = "{% set ns = namespace(n=0) %}{% for i in range(999) %}{% for j in range(N) %}{% set ns.n = j %}{% endfor %}{% endfor %}"
    found: list[str] = []

    def run() -> None:
        for size in ("1", "99999"):
            try:
                found.append(str(len(template(text.replace("N", size)).render(CHAT[:1]))))
            except TemplateRefused as error:
                found.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["0", "0", max(found), max(found)]
    assert "1,000,000 steps" in max(found)


TOO_DEEP = [
    "{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}",
    "{{ " + "[" * 9_000 + "]" * 9_000 + " }}",
    "{{ " + "not " * 9_000 + "x }}",
    "{{ " + "-" * 9_000 + "1 }}",
    "{{ x" + ".a" * 9_000 + " }}",
    "{{ x" + "|e" * 9_000 + " }}",
    "{{ 1" + "+x" * 9_000 + " }}",
    "{{ 1" + " if x else 1" * 9_000 + " }}",
    "{% if x %}" * 5_000 + "{% endif %}" * 5_000,
    "{% if x %}" * 120 + "{% endif %}" * 120,
    "{% for x in y %}" * 40 + "{% endfor %}" * 40,
    "{% if x %}" + "{% elif x %}" * 3_000 + "{% endif %}",
    "a" * 1_000_001,
    "{# " * 10 + "{% if",
    "{% macro m(x, x) %}{% endmacro %}",
    "{{ f(**a, **b) }}",
    "{% break %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{{ loop = 1 }}",
    "{% set true = 1 %}",
    "\x00{{ '\x00' }}{% for",
    "{{ " + "9" * 5_000 + " }}",
    "{{ 1e999999999999999999999 }}{{",
    "{% unknown %}",
]


@pytest.mark.parametrize("text", TOO_DEEP, ids=lambda text: f"{text[:12]}-{len(text)}")
def test_what_cannot_be_compiled_is_an_error_in_words(text: str) -> None:
    for run in (
        lambda: template(text).render(CHAT),
        lambda: template(text).render_beginnings(CHAT).text,
        lambda: template(text).habits,
        lambda: template(text).template.reads,
    ):
        try:
            run()
        except (ModelError, TemplateRefused) as error:
            assert len(str(error)) < 1500  # noqa: PT017  # some can be compiled


@pytest.mark.usefixtures("_small_limits")
def test_a_template_without_end_is_no_model_s_template() -> None:
    with pytest.raises(ModelError) as error:
        _ = template(LONG[0]).habits
    assert error.value.code == "template-over-limit"


def test_long_real_chats_stay_far_below_the_limits() -> None:
    """A thousand turns with a nested loop over them, as in templates that search for the last question."""
    text = (
        "{% for m in messages %}{% set ns = namespace(last=0) %}{% for n in messages %}{% if n.role == 'user' %}"
        "{% set ns.last = loop.index %}{% endif %}{% endfor %}{{ m.role + ': ' + m.content }}{{ ns.last }}{% endfor %}"
    )
    chat = [Message("user" if n % 2 == 0 else "assistant", "word " * 20) for n in range(1000)]
    assert template(text).render(chat).endswith("999")


def test_a_long_text_may_be_written_several_times() -> None:
    long = "ab " * 4_000_000
    text = "{{ messages[0].content }}{{ messages[0].content|trim }}{{ messages[0].content.strip() ~ '!' }}"
    assert len(template(text).render([Message("user", long)])) > 35_000_000


def test_results_stay_as_the_stock_environment_gives_them() -> None:
    """Each bounded operation gives the same result as in plain jinja2."""
    import jinja2.sandbox

    stock = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    given = {"x": [3, 1, 2], "t": "a<b\nc", "d": {"k": [1, None], "j": "v"}, "n": 7, "rows": [{"a": 2}, {"a": 1}]}
    for text in (
        "{{ x }}{{ t }}{{ d }}{{ n }}{{ none }}{{ true }}{{ missing }}", "{{ x + [4] }}{{ t + 'x' }}{{ n + 1 }}{{ 1.5 + n }}",
        "{{ t * 2 }}{{ n * 3 }}{{ n ** 2 }}{{ n % 4 }}{{ '%s-%d' % (t, n) }}{{ '%(a)s' % {'a': n} }}{{ x ~ t ~ n }}",
        "{{ x|join(', ') }}{{ rows|join('-', attribute='a') }}{{ rows|map(attribute='a')|join }}{{ t|join('.') }}{{ x|sum }}",
        "{{ rows|sum(attribute='a') }}{{ x|sort }}{{ x|max }}{{ x|min }}{{ x|unique|list }}{{ x|reverse|list }}{{ x|first }}",
        "{{ t|indent(3) }}{{ t|center(20) }}{{ t|replace('a', 'bb') }}{{ t.replace('a', 'bb') }}{{ 1.256|round(2) }}{{ t|e }}",
        "{{ x|batch(2, 0)|list }}{{ x|slice(2)|list }}{{ rows|groupby('a')|list }}{{ rows|sort(attribute='a') }}{{ d|items|list }}",
        "{{ '{:>5}|{}'.format(n, t) }}{{ '{a}'.format_map({'a': 1}) }}{{ '{0[k]}'.format(d) }}{{ d.k }}{{ d['j'] }}{{ d.get('q', 1) }}",
        "{% for k, v in d.items() %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ k }}{{ v }}{% else %}none{% endfor %}",
        "{% for r in rows recursive %}{{ r.a }}{% if r.a == 2 %}{{ loop([{'a': 5}]) }}{% endif %}{% endfor %}",
        "{% for i in x if i > 1 %}{{ loop.previtem }}{{ loop.nextitem }}{{ i }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}{{ m(1, 3, 4, z=5) }}",
        "{% macro m() %}<{{ caller('q') }}>{% endmacro %}{% call(v) m() %}{{ v }}{% endcall %}{{ m.name }}",
        "{% set ns = namespace(a=1) %}{% for i in x %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ x[1:] }}{{ t[::-1] }}{{ x[-1] }}",
        "{% set v %}a{{ n }}{% endset %}{{ v }}{% filter upper %}q{{ t }}{% endfilter %}{% with q = 3 %}{{ q }}{% endwith %}",
        "{{ 1 < n < 9 }}{{ n in x }}{{ 2 in x }}{{ 'a' in t }}{{ 'k' in d }}{{ x == [3, 1, 2] }}{{ n is eq(7) }}{{ {n: t, 'q': x} }}",
        "{{ rows|selectattr('a', 'equalto', 1)|list }}{{ x|select('gt', 1)|list }}{{ x|reject('in', [1])|list }}{{ x|map('string')|list }}",
        "{% block b %}{{ n }}{% endblock %}{{ self.b() }}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{% set j = joiner(',') %}{{ j() }}{{ j() }}",
        "{{ dict(a=1) }}{{ dict(d)|length }}{{ range(3)|list }}{{ t.split('\n') }}{{ ','.join(['a', 'b']) }}{{ t.startswith(('a', 'b')) }}",
        "{{ ('<b>'|safe) ~ t }}{{ ('<b>'|safe).upper() }}{{ ('<b>%s'|safe) % t }}{{ ('{}'|safe).format(t) }}{{ t|upper|lower|title|trim }}",
        "{% for r in [] %}{% else %}E{% endfor %}{% for q in missing %}{% endfor %}{{ missing is defined }}{{ d.missing is undefined }}",
    ):  # fmt: skip
        want = stock.from_string(text).render(**given)
        assert template(text, **given).render([]) == want, text


REFUSED_READS = [
    "{{ 'a'.encode('utf-8')|length }}", "{{ 'a'.encode }}", "{% if 'a'.translate %}x{% endif %}", "{{ (5).to_bytes is defined }}",
    "{{ messages.append }}", "{% if messages.append %}x{% endif %}", "{{ messages[0].update }}", "{{ messages|attr('append') }}",
    "{{ 1.5.hex ~ 'x' }}", "{{ messages[0].items().mapping }}", "{{ ('<b>'|safe).unescape }}", "{{ [[1]]|map(attribute='append')|join }}",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED_READS)
def test_a_refused_attribute_is_never_an_empty_text(text: str) -> None:
    for run in (lambda: template(text).render(CHAT), lambda: template(text).render_beginnings(CHAT).text):
        with pytest.raises(TemplateRefused, match="not accessible"):  # not a jinja2 error about an undefined value
            run()


def test_what_transformers_offers_is_there() -> None:
    for text, want in (
        ("{% for g in messages|groupby('role') %}{{ g.grouper }}={{ g.list|length }};{% endfor %}", "assistant=2;tool=1;user=1;"),
        ("{{ messages|groupby('role')|map(attribute='grouper')|join }}", "assistanttooluser"),
        ("{{ dict.fromkeys(['a', 'b'], 1) }}{{ dict.fromkeys('a') }}", "{'a': 1, 'b': 1}{'a': None}"),
        ("{{ true.real }}{{ messages.role is defined }}{{ messages.seen }}{{ messages.total is defined }}", "1FalseFalse"),
        ("{{ 7 - 2 }}{{ 1.5 - 1 }}{{ 2 ** 63 }}{{ 'é' in ['é'] }}{{ 4 not in [1, n] }}", "50.59223372036854775808TrueTrue"),
        ("{{ 'a' in messages[0].keys() }}{{ 'user' in messages[0].values() }}{{ [1] in [[1]] }}{{ 'b' in 'abc' }}", "FalseTrueTrueTrue"),
        ("{{ 1 in [1, 2] in [[1, 2]] }}{{ 1 < 2 in [2] }}{{ strftime_now('%Y') }}", "TrueTrue2031"),
    ):  # fmt: skip
        assert template(text).render(CHAT) == want
        assert template(text).render_beginnings(CHAT).text == want


@pytest.mark.parametrize(
    "text", ["{{ 'a'|pprint }}", "{{ 'a'|wordwrap(3) }}", "{{ 'a'|urlize }}", "{{ [1]|random }}", "{{ lipsum() }}"]
)
def test_what_is_not_available_is_named_with_its_reason(text: str) -> None:
    with pytest.raises(TemplateRefused, match="not available to chat templates"):
        template(text).render(CHAT)


@pytest.mark.parametrize(
    "text", ["{{ 'a'|nosuch }}", "{{ dict.update(1) }}", "{{ raise_exception.x.y }}", "{{ 0x" + "f" * 20 + " }}"]
)
def test_messages_of_templates_are_clean(text: str) -> None:
    with pytest.raises((TemplateRefused, ModelError)) as refused:
        template(text).render(CHAT)
    assert ".." not in str(refused.value)
    assert "Helper" not in str(refused.value) and "tunesmith." not in str(refused.value)  # noqa: PT018
