"""The card (README.md) of a model that was converted: what it is made from, and what was done."""

from collections.abc import Mapping
from typing import Any

from jax_refusal.checkpoints.export import has_tokenizer

WHAT = {
    ("none", "hf"): "The weights of the source, unedited, in the Hugging Face layout.",
    ("none", "orbax"): "The weights of the source, unedited, as an Orbax checkpoint.",
    ("orthogonalize", "hf"): "The source's weights, made unable to write along one direction.",
    ("orthogonalize", "orbax"): "The source's weights, made unable to write along one direction.",
    ("addition", "hf"): "The source's weights, with a vector added to the input of one layer.",
    ("addition", "orbax"): "The source's weights, with a vector added to the input of one layer.",
    ("orthogonalize", "peft"): "A LoRA adapter of rank 1, to be put on the source.",
    ("addition", "gguf-control-vector"): "A control vector for llama.cpp.",
}
USE = {
    "hf": "Load it with transformers, or as `model.source` here.",
    "orbax": "Load it as `model.source` here, sharded over any mesh.",
    "peft": (
        "Load it with peft, or as `model.adapter` here. It projects what attention and MLP write "
        "(W - u u^T W of their output matrices). **The embedding is not covered, nor are output "
        "biases**: what they write along the direction stays, so this is less than ablation."
    ),
    "gguf-control-vector": (
        "`llama-cli -m MODEL.gguf --control-vector control_vector.gguf`. llama.cpp adds "
        "`direction.N` to the output of block N, counted from 0, at every token; the coefficient "
        "is part of the vector (`--control-vector-scaled` multiplies it further)."
    ),
}
INTENDED = (
    "A research artefact, for the study of how refusal works and how brittle it is. An edit like "
    "this one changes how a model refuses; it says nothing about what the model then says. Do not "
    "deploy it where people rely on its refusals. The licence and the terms of use of the source "
    "hold for what is made from it."
)


def model_card(
    request: Mapping[str, Any],  # the fields of run.convert.Request
    facts: Mapping[str, Any],
    hashes: Mapping[str, str],  # file -> sha256
    versions: Mapping[str, str],  # package -> version
) -> str:
    """README.md."""
    edit, to = request["edit"], request["to"]
    lines = [f"# {facts['source']}, edit: {edit}", "", f"{WHAT[edit, to]} {USE[to]}", ""]
    lines += ["| | |", "|---|---|"]
    rows = {
        "source": f"`{facts['source']}` ({facts['family']})",
        "fingerprint of the source": f"`{facts['fingerprint']}`",
        "dtype": facts["dtype"],
        "edit": edit,
    }
    if facts.get("packed"):
        rows["weights"] = f"{facts['packed']} in the source, numbers of this dtype here"
    if "adapter" in facts:
        rows["adapter merged in"] = f"`{facts['adapter']}`, `{facts['adapter_fingerprint']}`"
    if "direction" in facts:
        d = facts["direction"]
        rows |= {
            "direction": f"`{d['file']}`, norm {d['norm']:.6g}",
            "sha256 of the direction": f"`{d['sha256']}`",
        }
    if edit == "addition":
        rows["layer"] = f"input of layer {facts['layer']}"
        rows["times"] = f"{request['coefficient']:g}"
    if request["approximate"]:
        rows["approximate"] = "yes: a norm stands between some writes and the stream"
    if facts.get("edited leaves"):
        rows["leaves that differ"] = ", ".join(f"`{path}`" for path in facts["edited leaves"])
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    if to in ("hf", "orbax") and not has_tokenizer(hashes):
        lines += ["", "**No tokenizer**: the source has none, so there is none here."]
    if "choice" in facts:
        lines += ["", *_choice(facts["choice"], facts["thresholds"])]
    if "measured" in facts:
        m = facts["measured"]
        lines += [
            "",
            f"Against the same edit made in the stream while the unedited model runs, on "
            f"{m['tokens']} tokens of {m['on']}: logits differ by at most "
            f"{m['largest_difference']:.3g} where the largest is {m['largest_logit']:.3g}, and the "
            f"next token is the same at {100 * m['same_next_token']:.1f}% of them.",
        ]
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += ["", "## Intended use", "", INTENDED, "", "## Files", "", "| file | sha256 |"]
    lines += ["|---|---|", *(f"| {name} | `{digest}` |" for name, digest in hashes.items())]
    lines += ["", f"Made with {made_with}.", ""]
    return "\n".join(lines)


def _choice(choice: Mapping[str, Any], thresholds: Mapping[str, Any]) -> list[str]:
    """How a run came to its direction."""
    scores = {
        "bypass": choice["refusal_score"],
        "induce": choice["steering_score"],
        "KL": choice["kl_div_score"],
    }
    given = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
    return [
        f"The run chose position {choice['position']} (`{choice['token']}`), layer "
        f"{choice['layer']}: {given} (nats). Its thresholds: KL at most {thresholds['kl']:g}, "
        f"induce at least {thresholds['induce']:g}, the upper {100 * thresholds['pruned']:g}% of "
        "the layers left out."
        + " **No candidate passed them; this is the nearest one.**"
        * bool(choice["fallback"])
    ]
