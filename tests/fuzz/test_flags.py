"""Overrides, values and config files at random: a config that can be run, or one error."""

import itertools
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from jax_refusal import config as configs
from jax_refusal.config import ConfigError, RunConfig
from jax_refusal.fields import declared, flatten
from jax_refusal.organism import config as organism
from jax_refusal.organism.config import OrganismConfig
from tests.fuzz import NUMBERS

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FILES = {
    RunConfig: """
from jax_refusal.config import DataConfig, ModelConfig, RunConfig


def get_config():
    config = RunConfig(model=ModelConfig(source="org/name"), data=DataConfig(n_train=3, seed=None))
    config.generate.temperature = 0.5
    config.refusal.token_ids = (3, 4)
    return config
""",
    OrganismConfig: """
from jax_refusal.organism.config import BaseConfig, OrganismConfig


def get_config():
    return OrganismConfig(model=BaseConfig(source="org/name"))
""",
}
CHECKS: dict[type, Callable[[Any], Any]] = {
    RunConfig: configs.validate,
    OrganismConfig: organism.validate,
}
TEXTS = """
0 1 -1 2 16 0.5 -0.5 nan -nan NaN inf -inf Infinity 1e999 -1e999 1e-999 1e38 4e38 1e300 1_000 0x10
99999999999 -99999999999 2147483648 4294967296 18446744073709551616 True False true false None none
yes builtin paper error least_bad float32 bfloat16 float16 discovered (1,2) (1,) () [1,2] {} {1:2}
(nan,) ("a",) ("a" 'a ( )) (((1 1,2 1,,2 substring * lambda __import__("os") / ~ .. a=b --config é ²
""".split()
OBJECTS: list[Any] = [
    *(None, True, 0, 1, -1, 7, 10**400, -(10**400), 2**63, 0.0, 0.5, -0.5, 1e300, 5e-324, 1j),
    *(math.nan, math.inf, -math.inf, np.nan, np.float32(3), np.int64(3), np.array(3), np.zeros(3)),
    *("", "a", "nan", "\0", "\ud800", b"a", (), (1,), (math.nan,), ("a", 1), ["a"], {}, {1}, print),
    *(object(), type, RunConfig(), OrganismConfig(), RunConfig().model, 10**5000, ("a" * 10**5,)),
]


def read(arguments: list[str], schema: type) -> Any:
    """As an entry point reads its flags, in a process of its own."""
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    configs.parsed(values, arguments, schema)
    configs.check_kind(holder.value, schema)
    return CHECKS[schema](configs.empty_optional(holder.value, arguments))


def judged(number: int, make: Callable[[], Any]) -> bool:
    """Whether a config is accepted; it is valid then, and else the error is one line."""
    try:
        config = make()
    except (ConfigError, flags.Error) as error:
        if isinstance(error, ConfigError):
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 4000, number
        return False
    except BaseException as error:
        raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    for name, value in flatten(config).items():
        parts = list(value) if isinstance(value, tuple | list) else [value]
        for part in parts:
            assert isinstance(part, str | bool | int | float | None), (number, name)
            assert not isinstance(part, float) or math.isfinite(part), (number, name)
            assert not isinstance(part, str) or b"\0" not in part.encode(), (number, name)
            most = 2**128 if declared(type(config))[name][0] is float else 2**32
            assert not isinstance(part, int) or -most < part < most, (number, name)
    json.dumps(configs.identity(config), allow_nan=False)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[type, Path]:
    written = {schema: folder / f"{schema.__name__}.py" for schema in FILES}
    for schema, path in written.items():
        path.write_text(FILES[schema])
    return written


def text(draw: random.Random) -> str:
    """A value as it may stand on a command line."""
    kind = draw.randrange(10)
    if kind < 6:
        return draw.choice(TEXTS)
    if kind == 6:
        return str(draw.uniform(-10, 10) * 10 ** draw.randrange(-50, 50))
    if kind == 7:
        return "".join(draw.choices("()[]{}'\",.:0aé\n\t \\#\udcff", k=draw.randrange(12)))
    if kind == 8:
        return draw.choice("9([{-'a") * draw.choice((10, 300, 3000, 9000))
    return f"({draw.choice(TEXTS)}, {draw.choice(TEXTS)})"


def override(draw: random.Random, names: list[str]) -> list[str]:
    name, value = draw.choice(names), text(draw)
    if draw.random() < 0.1:
        at = draw.randrange(len(name))
        name = name[:at] + draw.choice(["", "x", ".", "[0]", "__class__", "\n"]) + name[at + 1 :]
    forms = [[f"--config.{name}={value}"]] * 6 + [
        [f"-config.{name}={value}"],
        [f"--config.{name}", value],
        [f"--config.{name}"],
        [f"--noconfig.{name}"],
    ]
    return draw.choice(forms)


def test_overrides(files: dict[type, Path]) -> None:
    accepted = 0
    for number in NUMBERS:
        draw = random.Random(f"overrides {number}")
        schema = draw.choice(list(FILES))
        given = [override(draw, list(declared(schema))) for _ in range(draw.randrange(1, 4))]
        place = draw.choice([f"--config={files[schema]}"] * 20 + ["", "--config=", "--config"])
        arguments = ["run", place, *itertools.chain.from_iterable(given)]
        accepted += judged(number, lambda a=arguments, s=schema: read(a, s))
    assert 0 < accepted < len(NUMBERS)


def test_values_from_python() -> None:
    accepted = 0
    for number in NUMBERS:
        draw = random.Random(f"values {number}")
        schema = draw.choice(list(FILES))
        config = schema()
        config.model.source = "org/name"
        for name in draw.sample(list(declared(schema)), draw.randrange(1, 3)):
            section, field = name.split(".")
            place = draw.random()
            if place < 0.05:
                setattr(config, section, draw.choice(OBJECTS))
            elif place < 0.1:
                setattr(config, f"{section}s", draw.choice(OBJECTS))
            elif not isinstance(getattr(config, section), str | int | float | None | complex):
                try:
                    setattr(getattr(config, section), field, draw.choice(OBJECTS))
                except (AttributeError, TypeError):  # of what stands for the section
                    continue
        accepted += judged(number, lambda c=config, s=schema: CHECKS[s](c))
    assert 0 < accepted < len(NUMBERS)


def broken(draw: random.Random, source: str) -> bytes:
    """The text of a config file with a few places changed."""
    content = bytearray(source.encode())
    values = [b'"org/name"', b"0.5", b"(3, 4)", b"=3", b"=None"]
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(content))
        kind = draw.randrange(10)
        if kind == 0:
            del content[at : at + draw.choice((1, 1, 5, 100))]
        elif kind == 1:
            content[at:at] = draw.choice(
                (
                    b"(",
                    b"\0",
                    b"\xff",
                    b"None",
                    b"raise ",
                    b"\n",
                    b" ",
                    b"import x\n",
                    b"1/0",
                    b".a",
                )
            )
        elif kind == 2:
            content[at] = draw.randrange(256)
        elif kind > 3:
            old = draw.choice(values)
            new = b"=" * old.startswith(b"=") + repr(draw.choice(OBJECTS[:24])).encode()
            content = bytearray(bytes(content).replace(old, new))
        else:
            words = source.split()
            one, other = draw.choice(words), draw.choice(words)
            content = bytearray(bytes(content).replace(one.encode(), other.encode(), 1))
        if not content:
            return b""
    return bytes(content)


def test_config_files(folder: Path) -> None:
    accepted = 0
    for number in NUMBERS:
        draw = random.Random(f"files {number}")
        schema = draw.choice(list(FILES))
        path = folder / f"broken{number % 100}.py"
        path.write_bytes(broken(draw, FILES[schema]))
        arguments = ["run", f"--config={path}"]
        if draw.random() < 0.3:
            arguments += override(draw, list(declared(schema)))
        accepted += judged(number, lambda a=arguments, s=schema: read(a, s))
    assert 0 < accepted < len(NUMBERS)
