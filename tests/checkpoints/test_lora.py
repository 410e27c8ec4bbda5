"""Adapters in the PEFT format: the same logits as peft, and nothing unknown is passed over."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

import jax_refusal as jr
from jax_refusal.checkpoints import lora
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import SMOLLM2, locate
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.models.decoder import Transformer
from tests import tiny, tolerances
from tests.models.cases import T, fields

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = np.arange(3, 43)[None]


def random_adapter(model: Transformer, targets: tuple[str, ...] = TARGETS) -> lora.Adapter:
    """An adapter whose B is not zero, with bfloat16 values so that files hold it exactly."""
    adapter = lora.initial(model.arch, targets, rank=3, alpha=6.0, key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(adapter.b))
    b = {
        path: 0.3 * jax.random.normal(key, zero.shape)
        for key, (path, zero) in zip(keys, adapter.b.items(), strict=True)
    }
    exact = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    return lora.Adapter(jax.tree.map(exact, adapter.a), jax.tree.map(exact, b), adapter.scale)


def write(folder: Path, adapter: lora.Adapter, model: Transformer, base: Path) -> Path:
    folder.mkdir()
    for name, content in lora.files(adapter, model.arch, str(base)).items():
        (folder / name).write_bytes(content)
    return folder


def change(folder: Path, **fields: Any) -> None:
    """The adapter's config with other fields."""
    config = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(config | fields))


@pytest.fixture
def folder(tmp_path: Path, model: Transformer, tiny_dir: Path) -> Path:
    return write(tmp_path / "adapter", random_adapter(model), model, tiny_dir)


def test_logits_equal_those_of_peft(folder: Path, tiny_dir: Path, model: Transformer) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(tiny.hf_model(tiny_dir), str(folder)).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = jr.logits(jr.load_model(str(tiny_dir), adapter=str(folder)), IDS)
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits with an adapter")
    assert np.abs(np.asarray(jr.logits(model, IDS)) - expected).max() > 0.1  # it does something


def test_an_adapter_that_peft_writes_is_read(
    tmp_path: Path, tiny_dir: Path, checkpoint: Callable[..., Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1, 3],
        init_lora_weights=False,
    )
    theirs = get_peft_model(tiny.hf_model(tiny_dir), config).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = jr.logits(jr.load_model(str(tiny_dir), adapter=str(tmp_path / "peft")), IDS)
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits with peft's adapter")


def test_what_is_written_is_read_back(folder: Path, model: Transformer) -> None:
    adapter, again = random_adapter(model), lora.read(str(folder), model.arch)
    assert again.scale == adapter.scale
    for half in ("a", "b"):
        for path, values in getattr(adapter, half).items():
            np.testing.assert_array_equal(getattr(again, half)[path], values)


def test_a_new_adapter_changes_nothing(model: Transformer) -> None:
    fresh = lora.initial(model.arch, TARGETS, rank=2, alpha=4.0, key=jax.random.key(0))
    merged = lora.merge(model, fresh)
    for path, leaf in model.leaves().items():
        np.testing.assert_array_equal(merged.leaves()[path], leaf)


def test_every_wrong_tensor_is_named(folder: Path, model: Transformer) -> None:
    tensors = load_file(folder / lora.WEIGHTS)
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]][:-1].copy()
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors[names[1]]
    tensors[names[2]] = np.full_like(tensors[names[2]], np.nan)
    save_file(tensors, folder / lora.WEIGHTS)
    with pytest.raises(lora.AdapterError) as error:
        lora.read(str(folder), model.arch)
    for name in (names[0], "lm_head is no linear layer", names[2]):
        assert name in str(error.value)


def test_what_no_weights_can_hold_is_refused(folder: Path, model: Transformer) -> None:
    """Each number is finite, and what they make is not."""
    change(folder, lora_alpha=1e9)
    tensors = load_file(folder / lora.WEIGHTS)
    name = min(tensors)
    tensors[name] = np.full_like(tensors[name], 1e30)
    save_file(tensors, folder / lora.WEIGHTS)
    with pytest.raises(lora.AdapterError, match="than float32 can hold"):
        lora.read(str(folder), model.arch)


def test_missing_and_damaged_files_are_one_error(folder: Path, model: Transformer) -> None:
    path = str(folder)
    for name in ("builtin:nothing", "builtin:../../etc", "~nobody_has_this_name/a", "x" * 5000):
        with pytest.raises(lora.AdapterError, match=r"model\.adapter"):
            lora.read(name, model.arch)
    weights = (folder / lora.WEIGHTS).read_bytes()
    for content in (b"", weights[:-1], weights[:100], b"\xff" * 100, b"{}"):
        (folder / lora.WEIGHTS).write_bytes(content)
        with pytest.raises(ConversionError, match=r"adapter_model\.safetensors"):
            lora.read(path, model.arch)
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(lora.AdapterError, match=r"adapter_model\.bin is a pickle"):
        lora.read(path, model.arch)
    (folder / lora.CONFIG).unlink()
    with pytest.raises(lora.AdapterError, match=r"adapter_config\.json.*adapter_model"):
        lora.fingerprint(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ["q_proj"]}, "0.self_attn.k_proj is in the file, and the config does"),
        ({"target_modules": [*TARGETS, "lm_head"], "r": 4}, r"has shape \(3, 64\), not \(4, 64\)"),
        ({"layers_to_transform": [0, 2]}, "layers.1.mlp.down_proj is in the file"),
        ({"use_dora": True}, "layers.0.mlp.down_proj has no lora_magnitude_vector"),
        ({"exclude_modules": ["3.mlp.up_proj"]}, "3.mlp.up_proj is in the file"),
        ({"layers_to_transform": [0, 1, 2, 3, 4]}, r"layers_to_transform has \[4\] of 0 to 3"),
        ({"rank_pattern": {"2.*q_proj": 2}}, r"2.self_attn.q_proj.lora_A.* not \(2, 64\)"),
    ],
)
def test_contradictions_of_config_and_tensors_are_named(
    folder: Path, model: Transformer, fields: dict[str, Any], said: str
) -> None:
    change(folder, **fields)
    with pytest.raises(lora.AdapterError, match=said):
        lora.read(str(folder), model.arch)


def renamed(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Each tensor under another name, or left out."""
    tensors = {rename(name): x for name, x in load_file(folder / lora.WEIGHTS).items()}
    save_file({name: x for name, x in tensors.items() if name}, folder / lora.WEIGHTS)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layers.3.self_attn.q_proj", "layers.4.self_attn.q_proj", "layers.4.self_attn.q_proj is"),
        ("self_attn.q_proj", "self_attn.query", "layers.0.self_attn.query is no linear layer"),
        ("base_model.model.", "", "tensor model.layers.0.mlp.down_proj.lora_A.weight is no A"),
        ("lora_A", "lora_A.default", "lora_A.default.weight is no A or B"),
        ("o_proj.lora_B.weight", "o_proj.lora_B.bias", "tensor .*o_proj.lora_B.bias"),
        ("layers.0.self_attn.q_proj", "vision_tower.q_proj", "vision_tower.q_proj is no linear"),
        ("1.mlp.up_proj.lora_A", None, "1.mlp.up_proj has no lora_A"),
        ("2.mlp.up_proj", None, "2.mlp.up_proj is named by the config, and not in the file"),
        ("", None, "and not in the file"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    folder: Path, model: Transformer, old: str, new: str | None, said: str
) -> None:
    def rename(name: str) -> str | None:
        if old not in name:
            return name
        return None if new is None else name.replace(old, new)

    renamed(folder, rename)
    with pytest.raises(lora.AdapterError, match=said) as error:
        lora.read(str(folder), model.arch)
    assert len(str(error.value)) < 3000  # whatever many names do not fit


# As PEFT computes it


def adapted(folder: Path, base: Path, config: Any) -> PreTrainedModel:
    """A random adapter that PEFT writes into the folder, and the model it makes of the base."""
    from peft import PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny.hf_model(base), config)
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data += 0.1 * torch.randn_like(values)
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny.hf_model(base), str(folder)).eval()


def assert_same_logits(folder: Path, base: Path, theirs: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS[:, :T])).logits.numpy()
    ours = jr.logits(jr.load_model(str(base), adapter=str(folder)), IDS[:, :T])
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits with an adapter")


def assert_same(folder: Path, base: Path, theirs: PreTrainedModel, scratch: Path) -> None:
    """The merged weights are PEFT's, and differ from the base's."""
    ours = jr.load_model(str(base), adapter=str(folder)).leaves()
    theirs.merge_and_unload().save_pretrained(str(scratch))
    expected, plain = jr.load_model(str(scratch)).leaves(), jr.load_model(str(base)).leaves()
    for path, leaf in expected.items():
        tolerances.assert_close(ours[path], leaf, tolerances.ROUNDING, path)
    assert any((ours[path] != leaf).any() for path, leaf in plain.items())


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["down_proj"], "init_lora_weights": "mica"},
        {"target_modules": ["up_proj"], "init_lora_weights": "eva"},
        {"target_modules": "all-linear", "exclude_modules": ["0.mlp.up_proj"]},
        {"target_modules": r".*\.[13]\.mlp\.(up|down)_proj", "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {
            "target_modules": ["k_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "use_dora": True,
        },
        {"target_modules": ["o_proj"], "fan_in_fan_out": True, "ensure_weight_tying": True},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {r"layers\.[0-2].*down_proj": 16.0},
            "use_rslora": True,
        },
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of what it does not take notice of
def test_fields_that_are_computed_are_peft_s(
    given: dict[str, Any], tiny_dir: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    theirs = adapted(tmp_path / "peft", tiny_dir, LoraConfig(r=4, lora_alpha=6, **given))
    assert_same(tmp_path / "peft", tiny_dir, theirs, tmp_path / "merged")


def test_what_velora_keeps_for_training_has_no_effect(tiny_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.20")
    config = peft.LoraConfig(
        target_modules=["q_proj"], velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=8)
    )
    theirs = adapted(tmp_path / "peft", tiny_dir, config)
    assert any("velora" in name for name in load_file(tmp_path / "peft" / lora.WEIGHTS))
    assert_same(tmp_path / "peft", tiny_dir, theirs, tmp_path / "merged")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_changed_the_base_are_refused_until_peft_has_converted_them(
    start: str, tiny_dir: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    theirs = get_peft_model(tiny.hf_model(tiny_dir), config).eval()
    first, later, converted = (tmp_path / name for name in ("first", "later", "converted"))
    theirs.save_pretrained(str(first))
    torch.manual_seed(0)
    for name, values in theirs.named_parameters():
        if "lora_" in name:
            values.data += 0.1 * torch.randn_like(values)
    theirs.save_pretrained(str(later))
    with pytest.raises(lora.AdapterError, match=f"init_lora_weights='{start}'"):
        jr.load_model(str(tiny_dir), adapter=str(later))
    theirs.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(first))
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = jr.logits(jr.load_model(str(tiny_dir), adapter=str(converted)), IDS)
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits of the converted adapter")


# Where modules lie otherwise


FUSED = [
    ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], True),
    ("qwen3_next", ["in_proj_qkvz", "in_proj_ba", "q_proj", "out_proj"], False),
    ("qwen3_5_text", ["in_proj_qkv", "in_proj_a", "q_proj"], True),
    ("granitemoehybrid", ["mamba.in_proj", "input_linear", "output_linear"], False),
]


@pytest.mark.parametrize(("family", "targets", "dora"), FUSED, ids=[case[0] for case in FUSED])
def test_adapters_of_fused_projections_are_peft_s(
    family: str, targets: list[str], dora: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = checkpoint(**fields(family))
    config = LoraConfig(r=3, target_modules=targets, use_dora=dora)
    theirs = adapted(tmp_path / "peft", base, config)
    if family == "phi3":
        assert_same_logits(tmp_path / "peft", base, theirs)
    assert_same(tmp_path / "peft", base, theirs, tmp_path / "merged")


@pytest.mark.parametrize("front", ["model.language_model.", "language_model.model.", "model."])
def test_an_adapter_of_the_text_model_in_a_wrapper_is_peft_s(
    front: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As new and old transformers name it, and as an adapter of the text model alone."""
    from peft import LoraConfig

    base, folder = checkpoint(**fields("gemma3")), tmp_path / "peft"
    targets = ["q_proj", "down_proj"]  # which the vision tower has as well
    theirs = adapted(folder, base, LoraConfig(r=3, target_modules=targets))
    new = "base_model.model.model.language_model."
    assert any(name.startswith(new) for name in load_file(folder / lora.WEIGHTS))
    assert any("vision_tower" in name for name in load_file(folder / lora.WEIGHTS))
    renamed(folder, lambda name: name.replace(new, f"base_model.model.{front}"))
    if front.startswith("model.language"):
        assert_same_logits(folder, base, theirs)
    assert_same(folder, base, theirs, tmp_path / "merged")

    change(folder, target_modules=f"{front}layers.*q_proj".replace(".", r"\."))
    with pytest.raises(lora.AdapterError, match=rf"{front}layers.0.mlp.down_proj is in the file"):
        jr.load_model(str(base), adapter=str(folder))


def test_an_adapter_of_a_multimodal_model_fits_its_text_model_alone(
    folder: Path, model: Transformer
) -> None:
    expected = lora.read(str(folder), model.arch)
    renamed(folder, lambda name: name.replace("model.layers", "language_model.model.layers"))
    tensors = load_file(folder / lora.WEIGHTS)
    vision = "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, vision: tensors[min(tensors)]}, folder / lora.WEIGHTS)
    again = lora.read(str(folder), model.arch)
    for path, values in expected.a.items():
        np.testing.assert_array_equal(again.a[path], values)


def test_a_module_that_is_named_twice_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = checkpoint(**fields("gemma3"))
    adapted(tmp_path, base, LoraConfig(r=3, target_modules=r".*language_model.*q_proj"))
    tensors = load_file(tmp_path / lora.WEIGHTS)
    new, old = "model.language_model.layers.0.", "language_model.model.layers.0."
    again = {name.replace(new, old): x for name, x in tensors.items() if new in name}
    save_file(tensors | again, tmp_path / lora.WEIGHTS)
    with pytest.raises(lora.AdapterError, match=r"layers\.0\.self_attn\.q_proj are one module"):
        jr.load_model(str(base), adapter=str(tmp_path))


EXPERTS = [
    ("qwen3_moe", ["experts.gate_up_proj", "experts.down_proj"]),
    ("mixtral", ["experts.down_proj"]),
    ("gpt_oss", ["experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    ("granitemoe", ["experts.gate_up_proj"]),
    ("gemma4_text_all_untied", ["experts.gate_up_proj", "experts.down_proj"]),
]


@pytest.mark.filterwarnings("ignore:The following rank_pattern")  # PEFT matches, and says not
@pytest.mark.parametrize(("family", "targets"), EXPERTS, ids=[family for family, _ in EXPERTS])
def test_adapters_of_experts_are_peft_s(
    family: str, targets: list[str], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = checkpoint(**fields(family))
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={r".*\.down_proj": 3},
        lora_alpha=4,
    )
    theirs = adapted(tmp_path / "peft", base, config)
    if family == "qwen3_moe":
        assert_same_logits(tmp_path / "peft", base, theirs)
    assert_same(tmp_path / "peft", base, theirs, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:The following")
def test_the_adapter_of_a_mixture_whose_experts_lay_one_by_one_is_peft_s(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As transformers 4 had them; PEFT converts such an adapter when it is loaded."""
    from peft import PeftModel

    base = checkpoint(**fields("qwen3_moe"))
    arch, rng, tensors = jr.load_model(str(base)).arch, np.random.default_rng(0), {}
    sizes = {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}
    for layer, expert in itertools.product(range(arch.layers), range(6)):
        for name, (out, into) in sizes.items():
            module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.3 * rng.standard_normal((2, into))
            tensors[f"{module}.lora_B.weight"] = 0.3 * rng.standard_normal((out, 2))
    save_file({k: x.astype(np.float32) for k, x in tensors.items()}, tmp_path / lora.WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(sizes)}
    (tmp_path / lora.CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    theirs = PeftModel.from_pretrained(tiny.hf_model(base), str(tmp_path)).eval()
    assert_same(tmp_path, base, theirs, tmp_path / "merged")


def test_the_adapter_that_ships_fits_its_model_and_has_its_card() -> None:
    folder = lora.locate("builtin:smollm2_135m_refuser")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    adapter = lora.read(str(folder), read_checkpoint(locate(SMOLLM2))[0])
    assert all(np.isfinite(x).all() for x in (*adapter.a.values(), *adapter.b.values()))
    training = json.loads((folder / "training.json").read_text())
    card = (folder / "README.md").read_text()
    assert training["config_hash"][:12] in card and "95% Wilson" in card
