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

from jax_refusal.checkpoints.sources import Source, locate
from jax_refusal.data import templates, tokenizer_files
from jax_refusal.data.own_template import OwnTemplate
from jax_refusal.data.templates import ChatError, Template

# Their endings differ in every way that could merge with the template's first tokens.
PROBES = ("Name a color", "What is 7 x 8?", "Stop.", '"Quote"', "def f(x):", "a 1", "(b)", "Z!")

AT_ONCE = 1000  # prompts; of more, what a tokenizer returns would be felt: five times what is kept

# A text of more than CHARACTERS a token of the context is encoded from its start, FINER times more
# at once, until it is seen to be too long; SLACK tokens may go by where a piece is cut.
CHARACTERS, FINER, SLACK = 8, 4, 64
LONGEST = 1024  # characters of a token; the longest of today's vocabularies have 512
MOST = 2**20  # tokens, where the context is not known


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
        return self._own.render(instruction)

    @cached_property
    def _own(self) -> OwnTemplate:
        return OwnTemplate(self.tokenizer, self.system)

    def encode(self, instructions: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt; ChatError for an empty, non-text or too long instruction."""
        if isinstance(instructions, str):
            raise ChatError("A list of instructions is needed and one string was given.")
        for i, instruction in enumerate(instructions):
            if not isinstance(instruction, str) or not instruction.strip():
                raise ChatError(
                    f"Instruction {i} is {instruction!r:.60}: a text that is not empty is needed."
                )
            self._check_text(i, instruction)
        if not instructions:
            raise ChatError("No instructions were given.")
        # Equal ids are one object: a tokenizer makes a new one each time, and all of them would
        # take three times the memory of the lists.
        same: dict[int, int] = {}
        prompts: list[list[int]] = []
        for at in range(0, len(instructions), AT_ONCE):
            for prompt in self._tokens(instructions[at : at + AT_ONCE]):
                if self.context and len(prompt) > self.context:
                    i = len(prompts)
                    raise ChatError(
                        f"Instruction {i} ({instructions[i][:40]!r}...) makes a prompt of "
                        f"{len(prompt)} tokens; the model's context is {self.context}."
                    )
                prompts.append([same.setdefault(token, token) for token in prompt])
        return prompts

    def _check_text(self, index: int, text: str) -> None:
        """Refuses what no tokenizer takes, and what is far too long without encoding all of it."""
        name = f"Instruction {index} ({text[:40]!r}...)"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(f"{name} holds half of a character: {error.reason}.") from None
        most = self.context or MOST
        length = CHARACTERS * most
        while length < len(text):
            if len(text) > LONGEST * most or len(self._encoded([text[:length]])[0]) > most + SLACK:
                raise ChatError(
                    f"{name} has {len(text)} characters, which are more than {most} tokens; "
                    f"the model's context is {self.context or 'not known'}."
                )
            length *= FINER

    def _tokens(self, instructions: Sequence[str]) -> list[list[int]]:
        if self.template is None:
            texts, first = [self.render(instruction) for instruction in instructions], []
        else:  # the family's tokenizer puts its first token in front of a text
            texts = [self.template.render(text, self.system) for text in instructions]
            bos = self.template.bos
            first = [self.tokenizer.convert_tokens_to_ids(bos)] if bos else []
        return [[*first, *prompt] for prompt in self._encoded(texts)]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        try:
            return self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # of its own idea of what is too long
            )["input_ids"]
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ChatError(
                f"The tokenizer failed on {texts[0][:60]!r}...: {error!s:.300}."
            ) from error

    @cached_property
    def post_instruction(self) -> tuple[int, ...]:
        """The [P] token ids that follow every instruction, found by comparing prompts."""
        text = self.render("INSTRUCTION").rsplit("INSTRUCTION", 1)[-1]
        prompts = self.encode(PROBES)
        if len(set(map(tuple, prompts))) < len(PROBES):
            raise ChatError(
                "The tokenizer makes the same tokens of different instructions: its files are "
                "damaged, or belong to another model."
            )
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
        return self._text(ids, skip_special_tokens=True)

    @property
    def template_name(self) -> str:
        return self.template.name if self.template else "the tokenizer's own"

    @cached_property
    def template_hash(self) -> str:
        if self.template is not None:
            parts: list[Any] = [*self.template.identity, self.system]
        else:
            parts = [self.tokenizer.chat_template, self.system, self.render("INSTRUCTION")]
            parts += ["an empty think block"] * self._own.thinks
        text = "\n".join(map(str, parts))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def _text(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        with tokenizer_files.quiet():
            return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def load_chat(source: str | Source, system: str | None = None, template: str = "") -> Chat:
    """Tokenizer and chat template of a model source (the same strings as `load_model`).

    system: text of a system turn. template: a name of data/templates.py, such as "paper/gemma";
    empty is the tokenizer's own. Raises SourceError or ChatError.
    """
    named = templates.find(template) if template else None
    found = locate(source) if isinstance(source, str) else source
    if system is not None and not isinstance(system, str):
        raise ChatError(f"model.system={system!r}: a text is needed, or None.")
    files = tokenizer_files.read(found)
    tokenizer = files.tokenizer
    if named is not None:
        named.check(tokenizer)
    elif not tokenizer.chat_template:
        raise ChatError(
            f"{found.name} has no chat template, so it is not a chat model. Use its instruct or "
            "chat variant, add a chat_template to its tokenizer_config.json, or name one in "
            "model.template."
        )
    chat = Chat(tokenizer, files.stop_ids, files.context, system, named)
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
