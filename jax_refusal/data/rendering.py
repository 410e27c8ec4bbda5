"""Chat templates rendered under a bound: a template is a program of the checkpoint.

transformers' own sandbox keeps it from reaching out, not from running for hours or filling the
memory. Here every step is paid for before it is taken, out of a budget for the whole prompt: what
an operation may take (characters or items that it makes or looks at), and STEP for each of Python's
own steps. A template that is spent is refused at the same step on every machine, in every thread,
without a clock. Filters, methods and operators cannot be entered: what they may cost is bounded
from their arguments.

The text is the one that transformers renders, but for the day, which stands still, and for what is
left out because it draws by chance, or takes more than linear time.
"""

import contextvars
import datetime
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Template, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from jax_refusal.data.metering import STEP, STEPPED, WEIGHED, Metering

# A unit is a character in memory or some 10 ns of Python. Published templates take some 3 thousand.
BUDGET = 100_000_000
PER_CHARACTER = 300  # units more for each character of an instruction
LONGEST = 200_000  # characters of a template; published ones have 30 thousand at most
BITS = 4096  # of an integer that is computed

# Some templates write today's date into the prompt. A study is the same study tomorrow, so the day
# is always the one that Llama 3.x's template itself falls back to, in English.
TODAY = datetime.datetime(2024, 7, 26)
ENGLISH = {"%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%p": "AM"}

BY_CHANCE = ("random", "lipsum")
SLOW = ("urlize", "wordwrap", "striptags", "pprint")
# Filters and methods that may make, or take the time of, the product of two arguments.
PRODUCTS = frozenset(
    "batch center expandtabs format format_map indent join ljust replace rfind rindex rjust round "
    "rpartition rsplit slice sum to_bytes tojson translate zfill".split()
)
LAZY = frozenset("batch items map reject rejectattr reverse select selectattr slice unique".split())
COMPARING = frozenset(
    "== != < <= > >= eq equalto ne lt lessthan le gt greaterthan ge in lower upper".split()
)
ITS_OWN = ("_loop_vars", "_block_vars")  # arguments that jinja hands to every call


class Spent(RuntimeError):
    """The budget of a template is used up."""


class Meter:
    """What is left of a prompt's budget."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def pay(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise Spent("it loops, or makes a text, beyond all bounds")


_METER: contextvars.ContextVar[Meter] = contextvars.ContextVar("meter")


def render(source: str, variables: Mapping[str, Any], length: int) -> str:
    """The template's text. length: characters of the instruction. Raises whatever a template may.

    Nothing is kept between two calls but the compiled template.
    """
    template = compiled(source)
    token = _METER.set(Meter(BUDGET + PER_CHARACTER * length))
    try:
        return template.render(variables)
    finally:
        _METER.reset(token)


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    if len(source) > LONGEST:
        raise ValueError(f"it has {len(source)} characters, and {LONGEST} are allowed")
    token = _METER.set(Meter(BUDGET))  # constants are folded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of what it compiles to
            return _environment().from_string(source)
    finally:
        _METER.reset(token)


def strftime_now(form: str) -> str:
    """The standing clock that a template asks."""
    if len(form) > 1000:
        raise ValueError("a date of more than 1000 characters")
    directive = r"%[-_0^#]?."
    return re.sub(directive, lambda m: ENGLISH.get(m[0]) or TODAY.strftime(m[0]), form)


class Metered(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which steps are paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Metering().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        if operator == "+" and type(left) is str and type(right) is str:
            meter.pay(STEP + len(left) + len(right))
        else:
            meter.pay(_cost_of_operator(operator, left, right, meter.left))
        return super().call_binop(context, operator, left, right)

    # Named so that no keyword argument of a template collides, as jinja's own.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        named = [value for name, value in kwargs.items() if name not in ITS_OWN]
        meter.pay(_cost_of_call(__obj, [*args, *named], meter.left))
        return super().call(__context, __obj, *args, **kwargs)


@functools.cache
def _environment() -> Metered:
    from transformers.utils import chat_template_utils

    theirs = chat_template_utils._compile_jinja_template("").environment
    ours = object.__new__(Metered)
    vars(ours).update(vars(theirs))
    ours.extensions = {name: ext.bind(ours) for name, ext in theirs.extensions.items()}
    left_out = {*BY_CHANCE, *SLOW}
    ours.filters = {
        name: _metered(name, function)
        for name, function in theirs.filters.items()
        if name not in left_out
    }
    ours.filters |= {STEPPED: _step, WEIGHED: _weigh}
    ours.tests = {
        name: _metered(name, test) if name in COMPARING else test
        for name, test in theirs.tests.items()
    }
    ours.globals = {k: value for k, value in theirs.globals.items() if k not in left_out}
    ours.globals["strftime_now"] = strftime_now
    ours.finalize = _written
    return ours


def _written(value: Any) -> Any:
    """Pays for what `{{ }}` writes."""
    meter = _METER.get()
    meter.pay(len(value) + STEP if type(value) is str else size(value, meter.left))
    return value


@pass_context
def _step(_: Context, cost: int) -> bool:
    _METER.get().pay(cost)
    return True


@pass_context
def _weigh(_: Context, value: Any) -> Any:
    meter = _METER.get()
    meter.pay(size(value, meter.left))
    return value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is paid for. What it makes is made at once, while it is counted."""
    skip = int(hasattr(function, "jinja_pass_arg"))  # its first argument is jinja's, not a value
    product, lazy = name in PRODUCTS, name in LAZY

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        subject, *others = args[skip:] or (None,)
        meter.pay(_cost(subject, [*others, *kwargs.values()], name if product else "", meter.left))
        if not lazy:
            return function(*args, **kwargs)
        made = list(function(*args, **kwargs))
        meter.pay(size(made, meter.left))
        return made

    return metered


def _cost_of_call(function: Any, args: list[Any], limit: int) -> int:
    # A format method is wrapped by the sandbox, and all are bound to what they work on.
    method = getattr(function, "__wrapped__", function)
    subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(subject, str | bytes | int | list | tuple | dict):
        subject = None
    return _cost(subject, args, name if name in PRODUCTS else "", limit)


def _cost(subject: Any, args: list[Any], product: str, limit: int) -> int:
    """product: the name of what may take the product of two arguments, a width included."""
    sizes = [size(value, limit) for value in (subject, *args)]
    if not product:
        return STEP + sum(sizes)
    if product in ("format", "format_map"):
        return STEP + sum(sizes) + _cost_of_format(subject, args, limit)
    if product == "sum":  # of lists: the sums of all beginnings
        return STEP + sizes[0] ** 2
    widths = [abs(value) for value in args if isinstance(value, int)]
    *_, second, first = sorted([0, 0, *widths, *(count - STEP for count in sizes)])
    return STEP + sum(sizes) + first * second


def _cost_of_operator(operator: str, left: Any, right: Any, limit: int) -> int:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * right if operator == "**" else bits + right.bit_length()
        if bits > BITS:
            raise OverflowError(f"an integer of some {bits} bits")
        return STEP
    cost = STEP + size(left, limit) + size(right, limit)
    if operator == "*" and (isinstance(left, int) or isinstance(right, int)):  # a text repeated
        text, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(text, str | bytes | list | tuple):
            cost += (size(text, limit) - STEP) * abs(times)
    if operator == "%" and isinstance(left, str | bytes):
        cost += _cost_of_format(left, right if isinstance(right, tuple) else [right], limit)
    return cost


def _cost_of_format(form: Any, args: Iterable[Any], limit: int) -> int:
    """Of filling in a format: every field may be as wide as the largest number or argument."""
    text = form if isinstance(form, str) else str(form)
    values = list(args)
    widest = max([0, *(size(value, limit) for value in values)])
    numbers = [text]
    if "*" in text or re.search(r"\{[^{}]*\{", text):  # a width may come from an argument
        numbers += [str(value) for value in values]
    digits = (run for value in numbers for run in re.findall(r"\d+", value))
    widest = max([widest, *(int(run[:18]) for run in digits)])
    fields = text.count("%") + text.count("{")
    return fields * widest


_CONTAINERS = (list, tuple, set, frozenset, *(type(view()) for view in ({}.keys, {}.values)))
_ITEMS = type({}.items())


def size(value: Any, limit: int) -> int:
    """Characters in it, and STEP for each value, those inside included; counted up to `limit`."""
    if type(value) is str:
        return STEP + len(value)
    total, todo = 0, [value]
    while todo and total <= limit:
        value = todo.pop()
        total += STEP
        if isinstance(value, str | bytes | range):
            total += len(value)
            continue
        if isinstance(value, Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        inside = 2 * len(value) if isinstance(value, dict | _ITEMS) else 0
        inside = len(value) if isinstance(value, _CONTAINERS) else inside
        if total + inside * STEP > limit:
            return total + inside * STEP
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, _ITEMS):
            todo += [part for pair in value for part in pair]
        elif inside:
            todo += value
    return total
