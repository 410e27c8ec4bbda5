"""Chat templates: instructions to token ids, and where the instruction ends.

Letters: P post-instruction tokens, the ones that the template puts after every instruction; the
paper reads the residual stream there (Arditi et al. 2024, section 2.3).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from jax_refusal.checkpoints.sources import Source, SourceError, locate, read_json
from jax_refusal.data import qwen_tokenizer, templates
from jax_refusal.data.templates import ChatError, Template

# Some templates write today's date into the prompt. A study is the same study tomorrow, so the date
# is always the one that Llama 3.x's template itself falls back to. A template that asks the clock
# and no variable, as gpt-oss's does, finds a clock in front of it that stands still.
DATE = "26 Jul 2024"
PARTS = "%Y=2024 %y=24 %m=07 %d=26 %b=Jul %B=July %a=Fri %A=Friday %H=00 %I=12 %M=00 %S=00 %p=AM"
REPLACED = " ".join("| replace('{}', '{}')".format(*part.split("=")) for part in PARTS.split())
CLOCK = "{% macro strftime_now(format) %}{{ format " + REPLACED + " }}{% endmacro %}{{ '' }}"

# Their endings differ in every way that could merge with the template's first tokens.
PROBES = ("Name a color", "What is 7 x 8?", "Stop.", '"Quote"', "def f(x):", "a 1", "(b)", "Z!")

# Thinking models: the block before the answer. Qwen3's templates write an empty one in this form.
THINK, ANSWER = "<think>", "</think>\n\n"
# gpt-oss writes each message into a channel (its format is called harmony): thoughts into
# "analysis", then the answer into "final". Its template stops before the name of a channel.
CHANNEL, TURN, FINAL = "<|channel|>", "<|start|>assistant", "<|channel|>final<|message|>"

AT_ONCE = 1000  # prompts; of more, what a tokenizer returns would be felt: five times what is kept


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template, for one user turn.

    stop_ids: tokens that end a reply. context: longest prompt in tokens, 0 when not known.
    system: text of a system turn; None leaves that to the template.
    template: one of data/templates.py in place of the tokenizer's own.

    Of a thinking model the prompt ends after an empty think block, or in the channel of answers, so
    that the next token is the first of the answer, where the refusal score is read.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    context: int = 0
    system: str | None = None
    template: Template | None = None

    def render(self, instruction: str) -> str:
        """The prompt as text, up to where the reply starts."""
        if self.template is not None:
            return self.template.bos + self.template.render(instruction, self.system)
        turns = [{"role": "user", "content": instruction}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        switch: dict[str, Any] = {"enable_thinking": False} if self._can_think else {}
        own = self.tokenizer.chat_template
        if isinstance(own, str) and "strftime_now" in own:
            switch["chat_template"] = CLOCK + own
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
                **switch,
            )
        except Exception as error:  # a template is a program of the checkpoint: it raises anything
            raise ChatError(f"The chat template failed on {instruction!r}: {error}.") from error
        if self._has_channels and text.endswith(TURN):
            return text + FINAL
        return text + _rest_of_an_empty_block(text)

    def encode(self, instructions: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt; ChatError for an empty, non-text or too long instruction."""
        if isinstance(instructions, str):
            raise ChatError("A list of instructions is needed and one string was given.")
        for i, instruction in enumerate(instructions):
            if not isinstance(instruction, str) or not instruction.strip():
                raise ChatError(
                    f"Instruction {i} is {instruction!r}: a text that is not empty is needed."
                )
        if not instructions:
            raise ChatError("No instructions were given.")
        parts = range(0, len(instructions), AT_ONCE)
        # Equal ids are one object: a tokenizer makes a new one each time, and all of them would
        # take three times the memory of the lists.
        same: dict[int, int] = {}
        prompts = [
            [same.setdefault(token, token) for token in prompt]
            for at in parts
            for prompt in self._tokens(instructions[at : at + AT_ONCE])
        ]
        for i, prompt in enumerate(prompts):
            if self.context and len(prompt) > self.context:
                raise ChatError(
                    f"Instruction {i} ({instructions[i][:40]!r}...) makes a prompt of "
                    f"{len(prompt)} tokens; the model's context is {self.context}."
                )
        return prompts

    def _tokens(self, instructions: Sequence[str]) -> list[list[int]]:
        if self.template is None:
            texts, first = [self.render(instruction) for instruction in instructions], []
        else:  # the family's tokenizer puts its first token in front of a text
            texts = [self.template.render(text, self.system) for text in instructions]
            bos = self.template.bos
            first = [self.tokenizer.convert_tokens_to_ids(bos)] if bos else []
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*first, *prompt] for prompt in prompts]

    @cached_property
    def post_instruction(self) -> tuple[int, ...]:
        """The [P] token ids that follow every instruction, found by comparing prompts."""
        text = self.render("INSTRUCTION").rsplit("INSTRUCTION", 1)[-1]
        prompts = self.encode(PROBES)
        count = common_prefix([prompt[::-1] for prompt in prompts])
        while count and not text.endswith(self._text(prompts[0][-count:])):
            count -= 1
        if not count:
            raise ChatError(
                f"The chat template puts no token of its own after the instruction ({text!r}), so "
                "there is no position to read. Use a template with an end-of-instruction marker."
            )
        return tuple(prompts[0][-count:])

    @property
    def position_labels(self) -> list[str]:
        """The text of each post-instruction token, for tables and plots; escaped, [P]."""
        return [
            json.dumps(self._text([i]), ensure_ascii=False)[1:-1] for i in self.post_instruction
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def template_name(self) -> str:
        return self.template.name if self.template else "the tokenizer's own"

    @property
    def _can_think(self) -> bool:
        return "enable_thinking" in str(self.tokenizer.chat_template)

    @property
    def _has_channels(self) -> bool:
        return CHANNEL in str(self.tokenizer.chat_template)

    @cached_property
    def template_hash(self) -> str:
        if self.template is not None:
            parts: list[Any] = [*self.template.identity, self.system]
        else:
            parts = [self.tokenizer.chat_template, self.system, self.render("INSTRUCTION")]
            parts += ["an empty think block"] * self._can_think
        text = "\n".join(map(str, parts))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def load_chat(source: str | Source, system: str | None = None, template: str = "") -> Chat:
    """Tokenizer and chat template of a model source (the same strings as `load_model`).

    system: text of a system turn. template: a name of data/templates.py, such as "paper/gemma";
    empty is the tokenizer's own. Raises SourceError or ChatError.
    """
    named = templates.find(template) if template else None
    found = locate(source) if isinstance(source, str) else source
    if found.gguf is not None:
        from jax_refusal.data.gguf_tokenizer import tokenizer_from_gguf

        try:
            tokenizer, config, generation = tokenizer_from_gguf(found.gguf), {}, {}
        except (OSError, ValueError) as error:
            raise SourceError(f"{found.name} has no usable tokenizer: {error}") from error
    else:
        tokenizer = _from_directory(found)
        config = found.config()
        assert found.directory is not None
        path = found.directory / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
    if named is not None:
        named.check(tokenizer)
    elif not tokenizer.chat_template:
        raise ChatError(
            f"{found.name} has no chat template, so it is not a chat model. Use its instruct or "
            "chat variant, add a chat_template to its tokenizer_config.json, or name one in "
            "model.template."
        )
    stops: set[Any] = set()
    for fields in ({"eos_token_id": tokenizer.eos_token_id}, config, generation):
        stated: Any = fields.get("eos_token_id")
        stops |= set(stated) if isinstance(stated, list) else {stated}
    context = config.get("max_position_embeddings", 0)
    chat = Chat(tokenizer, tuple(sorted(stops - {None})), context, system, named)
    # Where a template closes a turn with a special token, a reply ends there too, stated or not.
    turn_end = chat.post_instruction[0]
    added = tokenizer.added_tokens_decoder.get(turn_end)
    if turn_end in tokenizer.all_special_ids or (added is not None and added.special):
        chat = dataclasses.replace(chat, stop_ids=tuple(sorted({*chat.stop_ids, turn_end})))
    return chat


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _rest_of_an_empty_block(text: str) -> str:
    """What closes the think block that a template opens at the end of a prompt; else nothing."""
    opened = text.rstrip("\n")
    if not opened.endswith(THINK):
        return ""
    return "\n\n"[len(text) - len(opened) :] + ANSWER


def _from_directory(source: Source) -> Any:
    from transformers import AutoTokenizer

    assert source.directory is not None
    try:
        # Qwen-1's own tokenizer is a program that its checkpoints ship.
        if (source.directory / qwen_tokenizer.FILE).is_file():
            return qwen_tokenizer.tokenizer_from_tiktoken(source.directory)
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        if "trust_remote_code" in str(error):
            raise SourceError(
                f"{source.name} has no tokenizer but a program of its own, which is never run. A "
                f"tokenizer.json is needed, or for Qwen-1 its {qwen_tokenizer.FILE}."
            ) from None
        raise SourceError(f"{source.name} has no usable tokenizer: {error}") from error
