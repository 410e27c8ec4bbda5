"""The PyTorch side of the benchmark: Hugging Face models and hooks, the way the paper's code works.

Written from the protocol of Arditi et al. 2024: left-padded batches of 32 in the order given, no
position ids, every position unembedded, edits made in place in float32. Nothing of jax_refusal is
imported, so that this side starts without JAX. One function for each job of launch/bench.py; it
takes the task (launch.bench_rows.task_of) and returns JSON values.

Letters: B batch row, T token, P post-instruction tokens, L layers, D residual width, V vocabulary,
N prompts, C candidates.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from launch.bench_rows import timed

Task = dict[str, Any]
Ids = list[list[int]]
Kind = dict[str, Any]  # the fields of batching.Prompts
Inputs = dict[str, Tensor]  # input_ids and attention_mask, [B, T]
BATCH = 32


def machine(task: Task) -> dict[str, Any]:
    """The rate of this side's float32 products [GFLOP/s]."""
    side = task["sizes"]["matmul"]
    a = torch.ones(side, side)
    seconds = timed(lambda: a @ a, 20)["seconds"]
    return {"gflops": 2 * side**3 / min(seconds) / 1e9}


def source(task: Task) -> dict[str, Any]:
    """Where `from_pretrained` finds the model."""
    gguf = {"gguf_file": task["gguf"]} if task["gguf"] else {}
    return {
        "pretrained_model_name_or_path": task["directory"],
        "local_files_only": True,
        **gguf,
    }


def load_model(task: Task) -> Any:
    """The model in float32, with Hugging Face's default attention (sdpa)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(**source(task), dtype=torch.float32)
    # Greedy and with no stop token, whatever the checkpoint says: the other side's steps exactly.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def load_tokenizer(task: Task) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(**source(task))


def padded(ids: Ids) -> Inputs:
    """Prompts in one batch, padded on the left."""
    width = max(map(len, ids))
    rows = [[0] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def batches(ids: Ids) -> Iterator[Inputs]:
    for first in range(0, len(ids), BATCH):
        yield padded(ids[first : first + BATCH])


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Hooks that were just registered, for as long as the context lasts."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


# collect: each way runs one batch and hands every block's input to `add(layer, x [B, T, D])`

Add = Callable[[int, Tensor], None]


def collect(task: Task) -> dict[str, Any]:
    """Mean block inputs of harmful and of harmless prompts, [2, P, L, D], in several ways."""
    model = load_model(task)
    ways: dict[str, Any] = {}
    for name, way in WAYS.items():
        if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name]) is None:
            ways[name] = {"missing": "not installed"}
            continue
        try:
            run = way(model, task)
            ways[name] = timed(
                lambda run=run: means(model, task["train"], run), task["sizes"]["repeats"]
            )
            ways[name]["result"] = [x.tolist() for x in ways[name]["result"]]
        except Exception as error:
            if name not in OPTIONAL:
                raise
            # These libraries change often: one that fails is shown so and hides nothing else.
            ways[name] = {"missing": f"failed: {type(error).__name__}: {error}"[:100]}
    return {"ways": ways}


@torch.no_grad()
def means(model: Any, kinds: Sequence[Kind], run: Callable[[Inputs, Add], None]) -> list[Tensor]:
    found, config = [], model.config
    for kind in kinds:
        positions = kind["positions"]
        shape = (positions, config.num_hidden_layers, config.hidden_size)
        total = torch.zeros(shape, dtype=torch.float64)

        def add(layer: int, x: Tensor, total: Tensor = total, positions: int = positions) -> None:
            total[:, layer] += x[:, -positions:].double().sum(0)

        for inputs in batches(kind["ids"]):
            run(inputs, add)
        found.append(total / len(kind["ids"]))
    return found


def by_hooks(model: Any, task: Task) -> Callable[[Inputs, Add], None]:
    def run(inputs: Inputs, add: Add) -> None:
        def hook(layer: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
            return lambda _, args: add(layer, args[0])

        blocks = enumerate(model.model.layers)
        with hooked([block.register_forward_pre_hook(hook(i)) for i, block in blocks]):
            model(**inputs)

    return run


def by_hidden_states(model: Any, task: Task) -> Callable[[Inputs, Add], None]:
    def run(inputs: Inputs, add: Add) -> None:
        # The last of them has left the last block.
        states = model(**inputs, output_hidden_states=True).hidden_states[:-1]
        for layer, x in enumerate(states):
            add(layer, x)

    return run


def by_transformer_lens(model: Any, task: Task) -> Callable[[Inputs, Add], None]:
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore

    bridge = TransformerBridge.boot_transformers(
        task["directory"], hf_model=model, tokenizer=load_tokenizer(task), dtype=torch.float32
    )
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.config.num_hidden_layers)]

    def run(inputs: Inputs, add: Add) -> None:
        _, cache = bridge.run_with_cache(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            names_filter=lambda name: name in names,
        )
        for layer, name in enumerate(names):
            add(layer, cache[name])

    return run


def by_nnsight(model: Any, task: Task) -> Callable[[Inputs, Add], None]:
    from nnsight import LanguageModel  # pyright: ignore

    wrapped = LanguageModel(model, tokenizer=load_tokenizer(task))

    def run(inputs: Inputs, add: Add) -> None:
        with wrapped.trace(inputs):
            for layer, block in enumerate(wrapped.model.layers):
                add(layer, block.input)

    return run


OPTIONAL = {"nnsight": "nnsight", "TransformerLens": "transformer_lens"}  # the modules
# TransformerLens puts its own modules into the model, so it comes last.
WAYS = {
    "forward pre-hooks": by_hooks,
    "output_hidden_states": by_hidden_states,
    "nnsight": by_nnsight,
    "TransformerLens": by_transformer_lens,
}


# select: three loops over the candidates, one full forward of all prompts in each


def select(task: Task) -> dict[str, Any]:
    """KL, bypass and induce [nats] of the task's candidates, [C, 3]."""
    model = load_model(task)
    harmful, harmless = (kind["ids"] for kind in task["val"])
    base = last_logits(model, harmless)  # once for all candidates, so not in their time
    return timed(lambda: scores(model, task, harmful, harmless, base), task["sizes"]["repeats"])


def scores(model: Any, task: Task, harmful: Ids, harmless: Ids, base: Tensor) -> list[list[float]]:
    vectors = [torch.tensor(values, dtype=torch.float32) for values in task["vectors"]]  # [D] each
    layers = [layer for _, layer in task["cells"]]
    divergences, bypass, induce = [], [], []
    for vector in vectors:
        with hooked(ablation(model, vector)):
            divergences.append(kl_divergence(base, last_logits(model, harmless)))
    for vector in vectors:
        with hooked(ablation(model, vector)):
            bypass.append(refusal_score(last_logits(model, harmful), task["refusal_ids"]))
    for vector, layer in zip(vectors, layers, strict=True):
        with hooked(addition(model, vector, layer)):
            induce.append(refusal_score(last_logits(model, harmless), task["refusal_ids"]))
    return [list(row) for row in zip(divergences, bypass, induce, strict=True)]


@torch.no_grad()
def last_logits(model: Any, ids: Ids) -> Tensor:  # [N, V], float64
    return torch.cat([model(**inputs).logits[:, -1].double() for inputs in batches(ids)])


def refusal_score(logits: Tensor, token_ids: list[int]) -> float:
    """Mean log odds of a refusal token, 1e-8 inside both logs."""
    p = logits.softmax(-1)[:, token_ids].sum(-1)
    return float((torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)).mean())


def kl_divergence(base: Tensor, edited: Tensor) -> float:
    """Mean over prompts, 1e-6 inside both logs."""
    p, q = base.softmax(-1), edited.softmax(-1)
    return float((p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1).mean())


def ablation(model: Any, vector: Tensor) -> list[Any]:
    """Hooks that take a direction out of block inputs and of what attention and MLP write."""

    def remove(x: Tensor) -> None:
        unit = vector / vector.norm()  # on every call, as the paper's hooks do
        x -= (x @ unit)[..., None] * unit

    def enter(_: Any, args: tuple[Tensor, ...]) -> None:
        remove(args[0])

    def leave(_module: Any, _args: Any, output: Any) -> None:
        remove(output[0] if isinstance(output, tuple) else output)

    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(enter))
        handles.append(block.self_attn.register_forward_hook(leave))
        handles.append(block.mlp.register_forward_hook(leave))
    return handles


def addition(model: Any, vector: Tensor, layer: int) -> list[Any]:
    """A hook that adds the vector [D] to the input of one block."""

    def enter(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].add_(vector)

    return [model.model.layers[layer].register_forward_pre_hook(enter)]


# generate, start and pipeline


def new_ids(model: Any, inputs: Inputs, count: int) -> list[list[int]]:
    """Greedy new tokens of each row, exactly `count`."""
    ids = model.generate(**inputs, min_new_tokens=count, max_new_tokens=count)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def generate(task: Task) -> dict[str, Any]:
    model, sizes = load_model(task), task["sizes"]
    found = {}
    for rows in sizes["rows"]:
        inputs = padded(task["long"]["ids"][:rows])
        found[str(rows)] = {
            name: timed(
                lambda inputs=inputs, count=count: new_ids(model, inputs, count), sizes["repeats"]
            )
            for name, count in (("many", sizes["new_tokens"]), ("one", 1))
        }
    return found


def start(task: Task) -> dict[str, Any]:
    """From the instruction's text to its first new token; done is the clock at that token."""
    began = time.time()
    tokenizer, model = load_tokenizer(task), load_model(task)
    loading = time.time() - began
    turns = [{"role": "user", "content": task["instruction"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new = new_ids(model, padded([ids]), 1)
    return {"done": time.time(), "loading": loading, "ids": ids + new[0]}


def pipeline(task: Task) -> dict[str, Any]:
    """Seconds of the workflow's parts, as launch.bench_rows.whole_workflow takes them.

    Batches are [seconds, how many of such a size]; replies are [condition, prompt, text].
    """
    clock = Clock()
    model, tokenizer = load_model(task), load_tokenizer(task)
    found: dict[str, Any] = {"loading": clock.lap(), "batches": [], "replies": []}
    prompts, refusal = task["prompts"], task["refusal_ids"]
    for kind in (kind for split in ("train", "val") for kind in prompts[split]):
        refusal_score(last_logits(model, kind["ids"]), refusal)
    found["filter"] = clock.lap()
    means(model, prompts["train_kept"], by_hooks(model, task))
    found["means"] = clock.lap()
    harmful, harmless = (kind["ids"] for kind in prompts["val_kept"])
    refusal_score(last_logits(model, harmful), refusal)
    base = last_logits(model, harmless)
    found["unedited"] = clock.lap()
    scores(model, task, harmful, harmless, base)
    found["scores"] = clock.lap()

    vector = torch.tensor(task["direction"], dtype=torch.float32)
    for kind, edit, coefficient in task["conditions"]:
        ids = prompts["test"][("harmful", "harmless").index(kind)]["ids"]
        full, rest = divmod(len(ids), BATCH)
        for first, size, times in ((0, BATCH, full), (full * BATCH, rest, 1)):
            if not size * times:
                continue
            clock.lap()
            with hooked(edited(model, vector, task["layer"], edit, coefficient)):
                inputs = padded(ids[first : first + size])
                new = replies(model, inputs, task["sizes"]["new_tokens"], task["stop_ids"])
            found["batches"].append([clock.lap(), times])
            for i, reply in enumerate(new):
                text = tokenizer.decode(reply, skip_special_tokens=True).strip()
                found["replies"].append([f"{kind}_{edit}", first + i, text])
    return found


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def edited(model: Any, vector: Tensor, layer: int, edit: str, coefficient: float) -> list[Any]:
    """The hooks of one condition."""
    if edit == "ablation":
        return ablation(model, vector)
    return addition(model, coefficient * vector, layer) if edit == "addition" else []


def replies(model: Any, inputs: Inputs, count: int, stop_ids: list[int]) -> Ids:
    """Greedy new tokens of each row, `count` at most; a batch ends with its last row."""
    ids = model.generate(**inputs, max_new_tokens=count, eos_token_id=stop_ids)
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((i for i, x in enumerate(row) if x in stop_ids), count) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]
