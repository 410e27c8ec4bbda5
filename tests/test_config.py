"""The configuration: one schema, and errors that name what is allowed."""

import dataclasses

import pytest

from jax_refusal import config as configs
from jax_refusal.config import ConfigError, DataConfig, GenerateConfig, ModelConfig, RunConfig

GOOD = RunConfig(model=ModelConfig(source="org/name"))


def changed(**fields) -> RunConfig:
    """GOOD with some dotted fields (`data__n_train=3`) set."""
    config = configs.from_identity({"model.source": "org/name"})
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def test_only_the_fields_that_say_how_are_left_out_of_the_identity():
    how = set(configs.flatten(GOOD)) - set(configs.identity(GOOD))
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
    flat = configs.flatten(RunConfig())
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
        ({"generate__temperature": -1.0}, ["generate.temperature=-1.0", "at least 0"]),
        ({"model__source": ""}, ["model.source is empty"]),
        ({"selection__prune_layers": 1.0}, ["selection.prune_layers=1.0", "0 <= x < 1"]),
        ({"data__harmful": "a.json"}, ["data.harmful and data.harmless go together"]),
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
    arguments = ["run", *(f"--config.{name}=1" for name in configs.flatten(GOOD))]
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
