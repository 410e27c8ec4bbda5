"""Ways of quantising by `quant_method`, and a config refused where it names none that is read."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax_refusal.checkpoints.quantised import awq, bnb, compressed, fp8, gptq, mxfp4
from jax_refusal.checkpoints.quantised.config import WHAT_TO_DO
from jax_refusal.checkpoints.quantised.formats import Format
from jax_refusal.families.registry import QUANTISATION
from jax_refusal.messages import shown
from jax_refusal.models.spec import UnsupportedModel

METHODS: dict[str, Callable[[Mapping[str, Any], Collection[str]], Format]] = {
    "fp8": fp8.read,
    "mxfp8": fp8.read,
    "compressed-tensors": compressed.read,
    "awq": awq.read,
    "gptq": gptq.read,
    "bitsandbytes": bnb.read,
    "mxfp4": mxfp4.read,
}


def quantisation(config: Mapping[str, Any], vouched: Collection[str] = ()) -> Format | None:
    """How the weights of a `config.json` are quantised; None where they are not.

    vouched: fields that the caller vouches for, `quantization_config.NAME` among them.
    Raises UnsupportedModel, before any weight is read, where that is not read, with what to do.
    """
    given = _given(config)
    if given is None:
        return None
    method = given.get("quant_method")
    if method is None:
        method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(given) else None
        method = "compressed-tensors" if "config_groups" in given else method
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedModel(
            f"The weights are quantised with quant_method={shown(method)}, which is not read; "
            f"{list(METHODS)} are. {WHAT_TO_DO}"
        )
    if method == "mxfp4" and config.get("model_type") != "gpt_oss":
        raise UnsupportedModel(
            f"quant_method='mxfp4' is read of gpt_oss, not of {config.get('model_type')}. "
            f"{WHAT_TO_DO}"
        )
    return METHODS[method](given, vouched)


def label(config: Mapping[str, Any], vouched: Collection[str] = ()) -> str:
    """How a card calls what `quantisation` finds; "" for weights that are not quantised."""
    found = quantisation(config, vouched)
    return found.label if found else ""


def _given(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of quantisation, for itself or for the text model inside."""
    text = config.get("text_config")
    places = [config, text if isinstance(text, Mapping) else {}]
    found = [place[name] for place in places for name in QUANTISATION if place.get(name)]
    if not found:
        return None
    if not isinstance(found[0], Mapping) or any(each != found[0] for each in found):
        raise UnsupportedModel(
            f"The config says of quantisation {', and '.join(map(shown, found))}, which is not one "
            f"object. {WHAT_TO_DO}"
        )
    return found[0]
