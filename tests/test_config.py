"""The configuration: one schema, and errors that name what is allowed."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from jax_refusal import config as configs
from jax_refusal import fields as rules
from jax_refusal.config import ConfigError, DataConfig, GenerateConfig, ModelConfig, RunConfig
from jax_refusal.fields import MANY, Range, declared, flatten
from jax_refusal.organism import config as organism
from jax_refusal.organism.config import BaseConfig, OrganismConfig

# What ml_collections opens a config file with.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

GOOD = RunConfig(model=ModelConfig(source="org/name"))


def changed(**fields) -> RunConfig:
    """GOOD with some dotted fields (`data__n_train=3`) set."""
    config = configs.from_identity({"model.source": "org/name"})
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def test_only_the_fields_that_say_how_are_left_out_of_the_identity():
    how = set(flatten(GOOD)) - set(configs.identity(GOOD))
    assert how == {
        "mesh.data",
        "mesh.model",
        "generate.batch_size",
        "compute.row_tokens",
        "compute.batch_tokens",
    }


def test_identity_is_json_and_leads_back_to_the_config():
    config = changed(refusal__token_ids=(3, 4), data__seed=None, model__system="Be brief.")
    fields = configs.identity(config)
    assert fields["refusal.token_ids"] == [3, 4]
    assert configs.from_identity(fields) == config


def test_defaults_are_the_papers():
    flat = flatten(RunConfig())
    paper = {
        "data.n_train": 128,
        "data.n_val": 32,
        "data.n_test": 100,
        "data.seed": 42,
        "data.filter": True,
        "selection.kl_threshold": 0.1,
        "selection.induce_threshold": 0.0,
        "selection.prune_layers": 0.2,
        "generate.max_new_tokens": 512,
        "generate.temperature": 0.0,
    }
    assert {name: flat[name] for name in paper} == paper


def test_validate_returns_a_good_config():
    assert configs.validate(GOOD) is GOOD


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__dtype": "float16"}, ["model.dtype='float16'", "float32, bfloat16"]),
        ({"data__source": "alpaca"}, ["data.source='alpaca'", "builtin, paper"]),
        ({"data__n_val": 0}, ["data.n_val=0", "at least 1"]),
        ({"generate__temperature": -1.0}, ["generate.temperature=-1.0", "at least 1e-06, or 0"]),
        ({"model__source": ""}, ["model.source is empty"]),
        (
            {"selection__prune_layers": 1.0},
            ["prune_layers=1.0", "at least 0 and below 1"],
        ),
        ({"data__harmful": "a.json"}, ["data.harmful and data.harmless go together"]),
        ({"data__n_test": 10**400}, ["data.n_test=1000", "...", f"at most {MANY}"]),
        ({"mesh__data": 0}, ["mesh.data=0", "at least 1", ", or -1"]),
        ({"model__source": "a\0b"}, ["model.source='a", "text without NUL"]),
        ({"evals__judges": ("\ud800",)}, ["evals.judges=", "that UTF-8 can hold"]),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(fields, words):
    with pytest.raises(ConfigError) as error:
        configs.validate(changed(**fields))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("data__n_train", "8", "int"),
        ("data__n_train", 8.0, "int"),
        ("data__n_train", True, "int"),
        ("data__filter", "no", "bool"),
        ("data__seed", "none", "int | None"),
        ("generate__temperature", None, "float"),
        ("refusal__token_ids", ("a",), "tuple[int, ...]"),
        ("refusal__token_ids", 3, "tuple[int, ...]"),
        ("model__source", 3, "str"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(field, value, kind):
    with pytest.raises(ConfigError) as error:
        configs.validate(changed(**{field: value}))
    assert f"{field.replace('__', '.')}={value!r} ({kind} is needed)" in str(error.value)


NUMBERS = [
    (schema, name)
    for schema in (RunConfig, OrganismConfig)
    for name, (kind, _) in declared(schema).items()
    if kind in (int, float, int | None)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("schema", "name"), NUMBERS)
def test_no_number_may_be_nan_or_infinite(schema: type, name: str, value: float):
    """And there is no number without a range."""
    kind, allowed = declared(schema)[name]
    assert isinstance(allowed, Range)
    config = schema()
    config.model.source = "org/name"
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
    check = configs.validate if schema is RunConfig else organism.validate
    with pytest.raises(ConfigError, match=rf"{name}={value} \("):
        check(config)
    for end in (allowed.low, allowed.high):
        inside = end in allowed
        setattr(getattr(config, section), field, int(end) if kind is not float else end)
        if inside:
            check(config)
        else:
            with pytest.raises(ConfigError, match=name):
                check(config)


def test_a_range_by_hand():
    share = Range(0, 1, below=True, also=(-1,))
    assert [x in share for x in (0, 0.5, 1, -1, -0.1, math.nan, 10**400)] == [
        *(True, True, False, True, False, False, False)
    ]
    assert str(share) == "at least 0 and below 1, or -1"
    assert str(Range(0, above=True)) == "finite and above 0" and str(Range()) == "finite"
    assert 3.4e38 in Range() and 3.5e38 not in Range()  # where float32 ends


def test_arguments_are_held_against_the_fields_they_are_named_after():
    import numpy as np

    rules.check_fields(GenerateConfig, max_new_tokens=np.int64(3), temperature=np.float32(1))
    with pytest.raises(ConfigError, match=r"seed=-1 .*at least 0.*; temperature=nan .*finite"):
        rules.check_fields(GenerateConfig, seed=-1, temperature=math.nan)
    with pytest.raises(ConfigError, match=r"coefficient='a' \(float is needed"):
        rules.check_number("coefficient", "a")


@pytest.mark.parametrize("section", [None, 3, DataConfig()])
def test_a_section_of_another_kind(section: Any):
    config = changed()
    config.model = section
    with pytest.raises(ConfigError, match=r"model=.* \(ModelConfig is needed\)"):
        configs.validate(config)


def test_an_attribute_that_is_no_field():
    """A file that sets one meant something by it."""
    config = changed()
    config.generate.max_tokens = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"generate\.max_tokens=3 \(there is no such field\)"):
        configs.validate(config)
    with pytest.raises(ConfigError, match=r"\['data\.n'\]: a RunConfig has no such fields"):
        configs.from_identity({"data.n": 3})


def test_something_else_than_a_config():
    for given in (None, {}, OrganismConfig(model=BaseConfig("a"))):
        with pytest.raises(ConfigError, match="needs a RunConfig"):
            configs.validate(given)  # pyright: ignore[reportArgumentType]


def test_an_int_is_a_float():
    configs.validate(changed(generate__temperature=1, selection__kl_threshold=1))


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError, match=r"model\.dtype.*data\.n_test.*generate\.batch_size"):
        bad = changed(model__dtype="int8", data__n_test=0, generate__batch_size=0)
        configs.validate(bad)


def test_an_unknown_override_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"data\.n_trian.*Did you mean data\.n_train"):
        configs.check_overrides(["run", "--config.data.n_trian=3"])


def test_an_override_of_a_section_is_refused():
    with pytest.raises(ConfigError, match=r"--config\.data: there is no such field"):
        configs.check_overrides(["run", "--config.data=3"])


def test_every_field_can_be_overridden():
    arguments = ["run", *(f"--config.{name}=1" for name in flatten(GOOD))]
    assert configs.check_overrides(arguments) == arguments


def test_none_is_taken_from_optional_fields_alone():
    arguments = ["run", "--config.data.seed=None", "--config.data.n_train=None", "--other=None"]
    assert configs.check_overrides(arguments) == [arguments[0], *arguments[2:]]
    config = configs.empty_optional(changed(), arguments)
    assert config.data == DataConfig(seed=None)


@pytest.mark.parametrize("arguments", [["--config=no.py"], ["--config", "no.py:variant"]])
def test_a_missing_config_file_is_refused(arguments):
    with pytest.raises(ConfigError, match=r"--config=no\.py: there is no such file"):
        configs.check_overrides(["run", *arguments])


def test_overrides_of_another_schema():
    @dataclasses.dataclass
    class Small:
        generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)

    configs.check_overrides(["--config.generate.seed=3"], Small)
    with pytest.raises(ConfigError):
        configs.check_overrides(["--config.data.seed=3"], Small)


# The config file


def read(path: Path, *overrides: str) -> RunConfig:
    """As an entry point reads its flags, in a process of its own."""
    sys.modules.pop("config_config", None)
    arguments, values = ["run", f"--config={path}", *overrides], flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    configs.parsed(values, arguments)
    configs.check_kind(holder.value, RunConfig)
    return configs.validate(configs.empty_optional(holder.value, arguments))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.py"


BODY = """
from jax_refusal.config import *

def get_config():
    config = RunConfig(model=ModelConfig(source="org/name"))
    {}
    return config
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("config = (", r", line 6: SyntaxError: .*never closed"),
        ("1 / 0", r", line 6: ZeroDivisionError: division by zero"),
        ("raise ValueError('no\\nsuch thing')", r", line 6: ValueError: no such thing$"),
        ("raise SystemExit(0)", r", line 6: SystemExit: 0"),
        ("config.generate.max_new_tokens = 'many'", r"max_new_tokens='many' \(int is needed\)"),
        ("config.selection.kl_threshold = float('nan')", r"kl_threshold=nan \(allowed: finite"),
        ("config.generate = None", r"generate=None \(GenerateConfig is needed\)"),
        ("open('/no/such/file')", r"No such file or directory: '/no/such/file'"),
        ("return None", r"returns a NoneType and this command needs a RunConfig"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_one_line(body: str, words: str, file: Path):
    file.write_text(BODY.format(body))
    with pytest.raises(ConfigError, match=words) as error:
        read(file)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no attribute 'get_config'"),
        (b"get_config = 3", "TypeError: 'int' object is not callable"),
        (b"def get_config(name): pass", "get_config.. missing 1 required positional argument"),
        (b"a\0b", "null bytes"),
        (b"a = '\xff'", "can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_config(content: bytes, words: str, file: Path):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        read(file)
    assert str(file) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_override_where_the_file_has_no_section(file: Path):
    file.write_text(BODY.format("config.generate = None"))
    with pytest.raises(ConfigError, match=r"generate.*is None"):
        read(file, "--config.generate.seed=1")


@pytest.mark.parametrize("form", ["--config.{}={}", "-config.{}={}", "--config.{} {}"])
def test_an_override_that_is_not_allowed(form: str, file: Path):
    file.write_text(BODY.format("pass"))
    for name, value, words in (
        ("selection.kl_threshold", "nan", "kl_threshold=nan"),
        ("generate.temperature", "1e999", "temperature=inf"),
        ("generate.max_new_tokens", "-1", "max_new_tokens=-1"),
        ("data.n_trian", "3", r"data\.n_trian.*Did you mean data\.n_train"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(file, *form.format(name, value).split())


def test_the_last_override_counts(file: Path):
    file.write_text(BODY.format("pass"))
    one, none = "--config.data.seed=1", "--config.data.seed=None"
    assert read(file, one, none).data.seed is None
    assert read(file, none, one).data.seed == 1


def test_what_is_no_flag_is_refused(file: Path):
    file.write_text(BODY.format("pass"))
    with pytest.raises(ConfigError, match=r"\['data.n_train=3'\] are no flags"):
        read(file, "data.n_train=3")


def test_errors_of_other_flags_are_absls(file: Path):
    file.write_text(BODY.format("pass"))
    with pytest.raises(flags.Error, match=r"--config\.generate\.seed=a"):
        read(file, "--config.generate.seed=a")
    with pytest.raises(flags.Error, match="wrokdir"):
        read(file, "--wrokdir=3")
