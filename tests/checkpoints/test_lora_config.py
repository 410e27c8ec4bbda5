"""adapter_config.json: every field of PEFT's is computed, without effect, or refused by name."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.checkpoints import lora_config
from jax_refusal.checkpoints.lora_config import AdapterError
from jax_refusal.checkpoints.sources import SourceError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def write(folder: Path, content: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(folder: Path, content: object) -> str:
    """What is said of this config, with the file's name in it."""
    path = write(folder, content)
    with pytest.raises((AdapterError, SourceError)) as error:
        lora_config.read(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 20_000
    return str(error.value)


def test_every_field_of_the_installed_peft_is_decided() -> None:
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    tables = [lora_config.CHECKS, lora_config.REFUSED, lora_config.WITHOUT_EFFECT]
    assert fields <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))  # each in one of them


def test_every_beginning_of_the_installed_peft_is_decided(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    boolean, named = typing.get_args(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    assert boolean is bool
    names = {*typing.get_args(named), "lora_ga", "pissa_niter_16"}  # its text lacks the second
    kept = {name for name in names if name in lora_config.SAME_BASE}
    assert kept == {"gaussian", "eva", "orthogonal", "mica"}
    for name in kept | {"Gaussian"}:
        lora_config.read(write(tmp_path, PLAIN | {"init_lora_weights": name}))
    for name in names - kept:
        said = refusal(tmp_path, PLAIN | {"init_lora_weights": name})
        assert f"init_lora_weights='{name}" in said and "changed the base weights" in said
        way = "merge_and_unload" if name == "loftq" else "path_initial_model_for_weight_conversion"
        assert way in said


@pytest.mark.parametrize("field", sorted(lora_config.REFUSED))
def test_what_is_not_computed_is_refused_unless_it_is_empty(tmp_path: Path, field: str) -> None:
    for empty in (None, False, [], {}):
        lora_config.read(write(tmp_path, PLAIN | {field: empty}))
    for given in (True, "all", ["lm_head"], {"a": 1}, 1):
        assert f"{field}={given!r} is not supported" in refusal(tmp_path, PLAIN | {field: given})


NUMBERS = [float("nan"), float("inf"), -float("inf"), 0, -1, True, "8", None, [8], 10**400]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("r", [*NUMBERS, 4.0]),
        ("lora_alpha", NUMBERS),
        ("lora_dropout", [float("nan"), 1.5, -0.1, "0"]),
        ("use_rslora", [1, "yes", []]),
        ("use_dora", [1, "yes", []]),
        ("peft_type", ["LOHA", None, 3, ["LORA"]]),
        ("init_lora_weights", [1, [], "unheard_of"]),
        ("target_modules", [None, 3, {"q_proj": 1}, ["q_proj", 3]]),
        ("target_parameters", ["experts.down_proj", {"a": 1}, [1]]),
        ("exclude_modules", [3, {"q_proj": 1}, [None]]),
        ("layers_to_transform", [True, "1", 1.0, -1, [0, -1], {"0": 1}]),
        ("layers_pattern", [3, [3], {}]),
        ("rank_pattern", [[], "q_proj", *({"q_proj": value} for value in [*NUMBERS, 4.0])]),
        ("alpha_pattern", [[], "q_proj", *({"q_proj": value} for value in NUMBERS)]),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, field: str, wrong: list[Any]) -> None:
    for value in wrong:
        assert f"{field}=" in refusal(tmp_path, PLAIN | {field: value})


@pytest.mark.parametrize("field", PLAIN)
def test_fields_that_peft_always_writes_are_needed(tmp_path: Path, field: str) -> None:
    given = {name: value for name, value in PLAIN.items() if name != field}
    assert f"{field} is missing" in refusal(tmp_path, given)


def test_all_problems_are_said_at_once_and_twenty_at_most(tmp_path: Path) -> None:
    said = refusal(tmp_path, PLAIN | {"r": 0, "lora_bias": True, "bias": "all"})
    assert "r=0" in said and "lora_bias=True" in said and "bias='all'" in said
    said = refusal(tmp_path, PLAIN | {f"new{i}": "x" * 10**5 for i in range(30)})
    assert "new19" in said and "new20" not in said and "and 10 more" in said


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"LORA"',
        "[" * 10**5,
        '{"r": ' * 10**5,
        '{"r": 1' + "0" * 5000 + "}",
        "\ud800",
    ],
    ids=["empty", "cut", "a list", "null", "a text", "nested", "nested too", "long", "surrogate"],
)
def test_a_damaged_config_is_one_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises((AdapterError, SourceError), match=r"adapter_config\.json"):
        lora_config.read(path)


# Names


def names(folder: Path, module: str, **fields: Any) -> bool:
    return lora_config.read(write(folder, PLAIN | fields)).names(module)


MODULE = "model.layers.11.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["down_proj"]}, True),
        ({"target_modules": ["own_proj"]}, False),
        ({"target_modules": ["3.down_proj", "q_proj"]}, True),
        ({"target_modules": [MODULE]}, True),
        ({"target_modules": []}, False),
        ({"target_modules": ".*down_proj"}, True),
        ({"target_modules": "down_proj"}, False),  # the whole name has to match
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": "All-Linear"}, True),
        ({"target_modules": ".*down_proj", "exclude_modules": ["3.down_proj"]}, False),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.experts\..*"}, False),
        ({"target_modules": ["down_proj"], "exclude_modules": "down_proj"}, True),
        ({"target_modules": ["down_proj"], "layers_to_transform": 11}, True),
        ({"target_modules": ["down_proj"], "layers_to_transform": [3]}, False),
        ({"target_modules": ["down_proj"], "layers_to_transform": []}, True),
        ({"target_modules": [MODULE], "layers_to_transform": [3]}, True),
        (
            {
                "target_modules": ["down_proj"],
                "layers_to_transform": [3],
                "layers_pattern": ["h", "experts"],
            },
            True,
        ),
        (
            {"target_modules": ["down_proj"], "layers_to_transform": [11], "layers_pattern": "h"},
            False,
        ),
    ],
)
def test_modules_are_matched_as_peft_matches_them(
    tmp_path: Path, fields: dict[str, Any], expected: bool
) -> None:
    assert names(tmp_path, MODULE, **fields) == expected
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**{k: v for k, v in {**PLAIN, **fields}.items() if k != "peft_type"})
    if str(fields["target_modules"]).lower() != "all-linear":  # which PEFT replaces by a list
        assert bool(check_target_module_exists(config, MODULE)) == expected


def test_ranks_and_scales_of_modules_are_those_of_the_first_pattern(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"layers.1.*v_proj": 2, "v_proj": 16},
        "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3.0, "proj": 1.0},
    }
    settings = lora_config.read(write(tmp_path, PLAIN | patterns | {"use_rslora": True}))
    one, two = "model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.v_proj"
    assert [settings.rank_of(name) for name in (one, two, "q_proj")] == [2, 16, 4]
    assert settings.scale_of(one) == 3 / 2**0.5 and settings.scale_of(two) == 8 / 4


def test_what_peft_refuses_of_layers_is_refused(tmp_path: Path) -> None:
    assert "list of target_modules" in refusal(
        tmp_path, PLAIN | {"target_modules": ".*q_proj", "layers_to_transform": [0]}
    )
    assert "goes with layers_to_transform" in refusal(tmp_path, PLAIN | {"layers_pattern": "h"})
    assert "use_dora goes with" in refusal(
        tmp_path, PLAIN | {"use_dora": True, "target_parameters": ["experts.down_proj"]}
    )


NEVER = r"(?:\w|\w\w|\w\w\w|\.)*(?<!j)"  # ends in what no way to split the name reaches


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": "(("}, "no regular expression"),
        ({"target_modules": "a" * 10**5}, "10000"),
        ({"rank_pattern": {"*": 3}}, "no regular expression"),
        ({"target_modules": NEVER}, "seconds"),
        ({"alpha_pattern": {NEVER: 3.0}}, "seconds"),
    ],
)
def test_patterns_that_are_none_or_never_end_are_refused(
    tmp_path: Path, fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_config, "SECONDS", 0.2)
    path = write(tmp_path, PLAIN | fields)
    with pytest.raises(AdapterError, match=said) as error:
        settings = lora_config.read(path)
        settings.names(MODULE)
        settings.scale_of(MODULE)
    assert str(path) in str(error.value)
