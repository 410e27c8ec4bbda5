"""Qwen-1, whose config and weights are named as nobody else's."""

from jax_refusal.families.common import attention, decoder, layers, mlp, one_rope, stored
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.models.spec import Architecture, Naming, Rope, UnsupportedModel


def read(config: Config) -> Architecture:
    """Two halves make the MLP's width, and two switches act beyond `seq_length` tokens.

    Log-n attention makes queries longer there, by their position. Dynamic NTK takes the rotary base
    from the length of a row's prompt when it is read, and keeps it for the reply, as the published
    code does. (That code counts the padding in front of a prompt as positions for log-n attention.
    Here a prompt is what it is alone, whatever it shares a batch with.) Up to `seq_length` neither
    acts, and where the context ends there neither is computed.
    """
    heads, channels = config["num_attention_heads"], config["kv_channels"]
    if heads * channels != config["hidden_size"]:
        raise UnsupportedModel(
            f"kv_channels={channels!r} x {heads} heads is not hidden_size={config['hidden_size']}."
        )
    context, trained = config["max_position_embeddings"], config["seq_length"]
    rope, log = one_rope(config), 0
    if config.get("use_logn_attn", True) and context > trained:
        log = trained
    if config.get("use_dynamic_ntk", True) and context > trained:
        if rope.kind != "default":
            raise UnsupportedModel(f"rope type {rope.kind!r} cannot be had with use_dynamic_ntk.")
        factor = context / trained
        rope = Rope(rope.base, kind="prompt_ntk", factor=factor, original_context=trained)
    mixer = attention(config, head_width=channels, qkv_bias=True)
    specs = layers(config, mixer, mlp(config, width=config["intermediate_size"] // 2))
    return decoder(config, specs, (rope,), query_log=log)


QKV, BIAS = "attn.c_attn.weight", "attn.c_attn.bias"

register(
    Family(
        model_type="qwen",
        read=read,
        fields="""seq_length kv_channels no_bias rotary_pct scale_attn_weights use_dynamic_ntk
            use_logn_attn use_cache_quantization use_cache_kernel softmax_in_fp32 onnx_safe
            use_flash_attn bf16 fp16 fp32""",
        required="seq_length kv_channels no_bias rotary_pct scale_attn_weights",
        renamed={"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"},
        fixed={
            "no_bias": (True,),
            "rotary_pct": (1.0,),
            "scale_attn_weights": (True,),
            "use_cache_quantization": (False, None),
        },
        namings=(
            Naming(
                layer="transformer.h.{layer}.",
                tensors=stored(
                    embed="transformer.wte.weight",
                    final_norm="transformer.ln_f.weight",
                    attn_norm="ln_1.weight",
                    mlp_norm="ln_2.weight",
                    **dict.fromkeys("qkv", QKV),
                    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), BIAS),
                    o="attn.c_proj.weight",
                    gate="mlp.w2.weight",  # the second is activated
                    up="mlp.w1.weight",
                    down="mlp.c_proj.weight",
                ),
            ),
        ),
    )
)
