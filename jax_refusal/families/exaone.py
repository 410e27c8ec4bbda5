"""EXAONE 4: norms of what is written alone; among layers with windows, those without do without
rotary embedding."""

from jax_refusal.families.common import attention, decoder, layers, mlp, one_rope, some_layers
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Rope, UnsupportedModel


def read(config: Config) -> Architecture:
    pattern, window = config["sliding_window_pattern"], config.get("sliding_window")
    if window and config.get("layer_types") is None and not (isinstance(pattern, int) and pattern):
        raise UnsupportedModel(
            f"sliding_window_pattern={shown(pattern)} without layer_types is not read (supported: "
            "a whole number above 0, or layer_types)."
        )
    windows = some_layers(config, lambda i: bool(window and (i + 1) % pattern))
    rope = one_rope(config)
    still = Rope(base=rope.base, kind="none")  # nor made longer, as a kind of rope may do
    specs = layers(
        config,
        attention(config, qk_norm="head"),
        mlp(config),
        windows=windows,
        ropes=[int(bool(window) and not own) for own in windows],
        pre_norm=False,
        post_norm=True,
    )
    return decoder(config, specs, (rope, still))


register(
    Family(
        model_type="exaone4",
        read=read,
        fields="sliding_window? sliding_window_pattern? layer_types?",
        required="num_key_value_heads",
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    )
)
