"""SmolLM3: every fourth layer does without rotary embedding."""

from jax_refusal.families.common import (
    attention,
    decoder,
    layers,
    mlp,
    one_rope,
    some_layers,
    switched,
)
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Rope, UnsupportedModel


def read(config: Config) -> Architecture:
    """Layers without rotary embedding are every fourth one, or those that `no_rope_layers` says."""
    count, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    turned = config.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % every != 0) for i in range(count)]
    if len(turned) < count:
        raise UnsupportedModel(
            f"no_rope_layers={shown(turned)} is shorter than the {count} layers."
        )
    config = switched(config)
    windows = some_layers(config, lambda i: bool(config["sliding_window"]) and not turned[i])
    rope, still = one_rope(config, 2e6), [int(not on) for on in turned[:count]]
    specs = layers(config, attention(config), mlp(config), windows=windows, ropes=still)
    return decoder(config, specs, (rope, Rope(base=rope.base, kind="none")))


register(
    Family(
        model_type="smollm3",
        read=read,
        fields="""attention_bias mlp_bias no_rope_layers? no_rope_layer_interval layer_types?
            use_sliding_window sliding_window? max_window_layers pretraining_tp
            num_key_value_heads?""",
        required="num_key_value_heads",
        defaults={"tie_word_embeddings": True, "no_rope_layer_interval": 4},
        fixed={"pretraining_tp": (1, 2, None)},  # the library takes no notice here
    )
)
