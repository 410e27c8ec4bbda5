"""A whole run on a tiny checkpoint: what it leaves, and that this is the paper's."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedModel

import jax_refusal as jr
from jax_refusal.data.chat import Chat
from jax_refusal.data.prompts import KINDS, load_prompts
from jax_refusal.evals import substring
from jax_refusal.evals.rates import rate
from jax_refusal.evals.substring import is_refusal
from jax_refusal.models.decoder import Transformer
from jax_refusal.run import pipeline
from jax_refusal.runtime import startup
from tests import runs
from tests.runs import COMPLETIONS, STAGES, contents, results, run, small

P, L, D = 5, 4, 64


# What a run leaves


def test_every_file_is_there_and_nothing_else(finished: Path):
    assert set(contents(finished)) == {
        "manifest.json",
        "refusal_tokens.json",
        "directions/means.safetensors",
        "directions/filter.json",
        "selection/candidates.jsonl",
        "selection/direction.safetensors",
        "selection/direction.json",
        *(f"completions/{name}.jsonl" for name in COMPLETIONS),
        "judgements/substring.jsonl",
        "metrics.json",
        "report.md",
        "plots/bypass.png",
        "plots/induce.png",
        "plots/kl.png",
    }


def test_manifest(finished: Path, tiny_dir: Path):
    manifest = runs.manifest(finished)
    identity = manifest["identity"]
    assert identity["config.model.source"] == str(tiny_dir)
    assert identity["config.data.n_train"] == 6
    for name in ("model", "data", "template", "tokenizer"):
        assert re.fullmatch("[0-9a-f]{64}", identity[name])
    assert "config.generate.batch_size" not in identity
    assert list(manifest["stages"]) == STAGES
    listed = {k: v for stage in manifest["stages"].values() for k, v in stage["files"].items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in results(finished).items()}
    assert listed == hashes


def test_means_are_those_of_the_oracle(
    finished: Path, tiny_dir: Path, chat: Chat, hf: PreTrainedModel
):
    from tests import oracle

    tensors = load_file(finished / "directions/means.safetensors")
    assert {name: (x.shape, x.dtype.name) for name, x in tensors.items()} == {
        name: ((P, L, D), "float32") for name in ("mean_harmful", "mean_harmless", "mean_diffs")
    }
    prompts = load_prompts(small(tiny_dir).data)
    for kind in KINDS:
        expected = oracle.mean_activations(hf, chat.encode(prompts.texts(kind, "train")), P)
        np.testing.assert_allclose(tensors[f"mean_{kind}"], expected, atol=2e-4)
    gap = tensors["mean_harmful"] - tensors["mean_harmless"]
    np.testing.assert_allclose(tensors["mean_diffs"], gap, atol=1e-5)


def test_candidates_are_scored_and_chosen_as_by_the_oracle(
    finished: Path, tiny_dir: Path, chat: Chat, hf: PreTrainedModel
):
    from tests import oracle

    table = runs.rows(finished / "selection/candidates.jsonl")
    fields = (
        "position layer refusal_score steering_score kl_div_score kl_at_least kept reason".split()
    )
    assert all(list(row) == fields for row in table)
    cells = [(row["position"], row["layer"]) for row in table]
    assert cells == [(p, layer) for p in range(-P, 0) for layer in range(L)]
    prompts = load_prompts(small(tiny_dir).data)
    expected = oracle.candidate_scores(
        hf,
        load_file(finished / "directions/means.safetensors")["mean_diffs"],
        *(chat.encode(prompts.texts(kind, "val")) for kind in KINDS),
        small(tiny_dir).refusal.token_ids,
    )
    by_cell = {(row["position"], row["layer"]): row for row in expected}
    for row in table:
        if row["layer"] in (0, 3):  # all prompts share the template's embeddings; pruned
            assert not row["kept"] and row["refusal_score"] is None
            assert row["reason"].startswith("zero" if row["layer"] == 0 else "layer 3 >= 3")
            continue
        assert row["kept"] and not row["reason"]
        for name in fields[2:5]:
            assert row[name] == pytest.approx(
                by_cell[row["position"], row["layer"]][name], abs=2e-3
            )
    best = min((row for row in table if row["kept"]), key=lambda row: row["refusal_score"])
    choice = json.loads((finished / "selection/direction.json").read_text())
    assert {name: choice[name] for name in fields} == best
    assert choice["token"] == chat.position_labels[best["position"]]
    assert choice["fallback"] is False
    others = [row["refusal_score"] for row in table if row["kept"] and row is not best]
    assert choice["margin"] == pytest.approx(min(others) - best["refusal_score"])


def test_the_direction_is_the_chosen_difference_of_means(finished: Path):
    choice = json.loads((finished / "selection/direction.json").read_text())
    diffs = load_file(finished / "directions/means.safetensors")["mean_diffs"]
    stored = load_file(finished / "selection/direction.safetensors")
    assert list(stored) == ["direction"]
    np.testing.assert_array_equal(stored["direction"], diffs[choice["position"], choice["layer"]])
    assert choice["norm"] == pytest.approx(float(np.linalg.norm(stored["direction"])))


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(name: str, finished: Path, tiny_dir: Path, chat: Chat, hf: PreTrainedModel):
    """One row for every test prompt, in order, with the oracle's greedy reply under the edit."""
    from tests import oracle

    kind, edit = name.split("_")
    test = getattr(load_prompts(small(tiny_dir).data), kind)["test"]
    rows = runs.rows(finished / f"completions/{name}.jsonl")
    assert all(list(row) == "instruction category response".split() for row in rows)
    assert [(r["instruction"], r["category"]) for r in rows] == [(i.text, i.category) for i in test]

    choice = json.loads((finished / "selection/direction.json").read_text())
    vector = load_file(finished / "selection/direction.safetensors")["direction"]
    hooks = {
        "baseline": lambda: oracle.ablation_hooks(hf, 0 * vector),
        "ablation": lambda: oracle.ablation_hooks(hf, vector),
        "addition": lambda: oracle.addition_hooks(
            hf, vector, choice["layer"], 1.0 if kind == "harmless" else -1.0
        ),
    }
    with hooks[edit]():
        replies = oracle.greedy(hf, chat.encode([i.text for i in test]), 8, chat.stop_ids)
    assert [row["response"] for row in rows] == [chat.decode(ids).strip() for ids in replies]


def test_the_edits_change_the_replies(finished: Path):
    replies = {name: contents(finished)[f"completions/{name}.jsonl"] for name in COMPLETIONS}
    assert len(set(replies.values())) == len(COMPLETIONS)


def test_judgements_are_a_line_for_each_reply(finished: Path):
    rows = iter(runs.rows(finished / "judgements/substring.jsonl"))
    for name in COMPLETIONS:
        for number, reply in enumerate(runs.rows(finished / f"completions/{name}.jsonl")):
            verdict = is_refusal(reply["response"])
            assert next(rows) == {"condition": name, "prompt": number, "verdict": verdict}
    assert not list(rows)


def test_metrics_are_those_of_the_files(finished: Path):
    metrics = json.loads((finished / "metrics.json").read_text())
    choice = json.loads((finished / "selection/direction.json").read_text())
    for name in COMPLETIONS:
        replies = runs.rows(finished / f"completions/{name}.jsonl")
        refused = [is_refusal(row["response"]) for row in replies]
        assert metrics["refusal"][name] == rate(refused).__dict__
        parts = metrics["by_category"][name].values()
        assert sum(part["n"] for part in parts) == len(refused)
    assert (metrics["position"], metrics["layer"]) == (choice["position"], choice["layer"])
    assert metrics["layers"] == L and metrics["kept"] == 10
    assert metrics["bypass"] == choice["refusal_score"]
    assert metrics["prompts"]["harmful train"] == "6 of 6"
    assert [t["token_id"] for t in metrics["refusal_tokens"]["tokens"]] == [40, 43]
    assert metrics["refusal_tokens"]["origin"] == "config"


def test_report(finished: Path, tiny_dir: Path):
    report = (finished / "report.md").read_text()
    metrics = json.loads((finished / "metrics.json").read_text())
    assert report.startswith(f"# Refusal direction of {tiny_dir}\n")
    assert f"Position {metrics['position']}" in report
    assert f"layer {metrics['layer']} of 4" in report
    baseline = metrics["refusal"]["harmful_baseline"]
    assert f"| harmful, unedited | {baseline['count']}/3 = " in report
    plots = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(plots) == 3
    for plot in plots:
        data = (finished / plot).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000


# Other settings


def test_sampled_replies_are_reproducible(copy: Path, tiny_dir: Path, tmp_path: Path):
    """The same seed gives the same replies, in one go or in two, whatever the batch size; another
    seed gives others."""
    runs.cut_after(copy, "selection")
    replies = {}
    for name, seed, size in (("a", 1, 32), ("b", 1, 2), ("c", 2, 32)):
        workdir = Path(shutil.copytree(copy, tmp_path / name))
        sampled = {"generate__temperature": 1.0, "generate__seed": seed}
        config = small(tiny_dir, **sampled, generate__batch_size=size)
        if name == "b":
            with pytest.raises(KeyboardInterrupt):
                run(config, workdir, progress=runs.stop_at("completions"))
        run(config, workdir)
        files = results(workdir)
        replies[name] = {key: files[f"completions/{key}.jsonl"] for key in COMPLETIONS}
    assert replies["a"] == replies["b"]
    assert all(replies["a"][key] != replies["c"][key] for key in COMPLETIONS)


def test_the_filter_keeps_prompts_by_the_sign_of_their_score(
    tiny_dir: Path, tmp_path: Path, chat: Chat, hf: PreTrainedModel
):
    """With tokens that share the probability about evenly, prompts fall on both sides of zero."""
    from tests import oracle

    ids = tuple(range(0, len(chat.tokenizer), 2))
    config = small(
        tiny_dir, data__filter=True, data__n_train=12, data__n_val=6, refusal__token_ids=ids
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, progress=runs.stop_at("select"))
    record = json.loads((tmp_path / "directions/filter.json").read_text())
    means = load_file(tmp_path / "directions/means.safetensors")
    for kind, sign in (("harmful", 1), ("harmless", -1)):
        for split in ("train", "val"):
            texts = load_prompts(config.data).texts(kind, split)
            scores = oracle.refusal_scores(oracle.last_logits(hf, chat.encode(texts)), ids)
            kept = [t for t, s in zip(texts, scores.tolist(), strict=True) if sign * s > 0]
            assert 0 < len(kept) < len(texts)
            assert record[kind][split]["kept"] == kept
            assert record[kind][split]["of"] == len(texts)
            if split == "train":
                expected = oracle.mean_activations(hf, chat.encode(kept), P)
                np.testing.assert_allclose(means[f"mean_{kind}"], expected, atol=2e-4)


def test_refusal_tokens_are_discovered_from_the_models_own_replies(
    tiny_dir: Path, tmp_path: Path, chat: Chat, model: Transformer, monkeypatch
):
    """A judge that knows this model's ways: a reply with an 'e' is a refusal."""
    config = small(tiny_dir, refusal__token_ids=(), refusal__discovery_tokens=8)
    prompts = load_prompts(config.data)
    replies = {
        kind: jr.generate(model, chat, prompts.texts(kind, "train"), max_new_tokens=8)
        for kind in KINDS
    }
    monkeypatch.setattr(substring, "is_refusal", lambda text: "e" in text)
    refused = sum("e" in text for text in replies["harmful"])
    assert refused
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, str(tmp_path), log=log.append, progress=runs.stop_at("means"))
    assert f"{refused} of 6 harmful training prompts are refused" in log
    found = json.loads((tmp_path / "refusal_tokens.json").read_text())
    assert found["origin"] == "discovered"
    first = found["tokens"][0]
    assert any("e" in text and text.startswith(first["text"]) for text in replies["harmful"])


@pytest.mark.parametrize(("enabled", "folder"), [(True, True), (True, False), (False, True)])
def test_a_stage_leaves_no_programs_where_they_are_kept_on_disk(
    enabled: bool, folder: bool, tmp_path: Path
) -> None:
    """Without a persistent cache all would have to be compiled again, and is kept."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    program, before = jax.jit(lambda x: x + 1), [jax.config.values[name] for name in names]
    program(1.0)
    for name, value in zip(names, (enabled, str(tmp_path) if folder else None), strict=True):
        jax.config.update(name, value)
    try:
        startup.end_stage()
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
    assert program._cache_size() == (0 if enabled and folder else 1)
