"""Named chat templates: the forms that the published runs were made with.

A tokenizer's own template is the default. These are for matching a published run to the token
(Arditi et al. 2024, appendix C.3): one user turn, with or without a system turn, written out by
hand. A name with `@` says which of two states of the published code is meant; a template is never
changed under its name, since workdirs record the name.
"""

import dataclasses
import re
from typing import Any

INSTRUCTION, SYSTEM = "{instruction}", "{system}"


class ChatError(ValueError):
    """A template or an instruction that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Template:
    """One user turn as text, up to where the reply starts."""

    name: str
    plain: str  # holds {instruction}
    with_system: str = ""  # holds {instruction} and {system}; empty where there is no such form
    no_system: str = ""  # why there is none
    bos: str = ""  # the token that the family's tokenizer puts in front, as it is written
    special: tuple[str, ...] = ()  # what must be one token each, or the tokenizer is another's
    refusal: tuple[tuple[int, str], ...] = ()  # the paper's refusal tokens, and their text
    # Post-instruction tokens in the published runs. They are counted there by encoding the closing
    # text on its own, which for a tokenizer that writes a blank in front of every text (Llama-2,
    # Yi) may be one more than what follows an instruction inside a prompt.
    positions: int = 0

    @property
    def identity(self) -> tuple[str, ...]:
        """What a prompt depends on."""
        return self.name, self.plain, self.with_system, self.bos

    def render(self, instruction: str, system: str | None = None) -> str:
        """The prompt as text, without `bos`. Both texts are put in as they are."""
        if system is not None and not self.with_system:
            raise ChatError(
                f"model.template={self.name!r} has no system turn ({self.no_system}), and "
                f"model.system={system!r}. Set model.system=None, or use another template."
            )
        parts = {INSTRUCTION: instruction, SYSTEM: system or ""}
        text = self.plain if system is None else self.with_system
        # In one pass, so that braces in an instruction are left alone.
        return re.sub(r"\{instruction\}|\{system\}", lambda match: parts[match[0]], text)

    def check(self, tokenizer: Any) -> None:
        """ChatError where the tokenizer does not have this template's special tokens."""
        vocabulary = tokenizer.get_vocab()
        lacking = [t for t in (self.bos, *self.special) if t and t not in vocabulary]
        if lacking:
            raise ChatError(
                f"model.template={self.name!r} needs the tokens {lacking}, which this tokenizer "
                "does not have: it belongs to another family. Leave model.template empty to use "
                "the tokenizer's own."
            )

    def refusal_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The paper's refusal tokens; ChatError where they mean another text in this tokenizer."""
        for index, text in self.refusal:
            found = tokenizer.decode([index]) if index < len(tokenizer) else "no token"
            if found.strip() != text:
                raise ChatError(
                    f"The refusal tokens of {self.name!r} are {dict(self.refusal)}, and token "
                    f"{index} of this tokenizer is {found!r}. Name the tokens in "
                    'refusal.token_ids, or have them found with refusal.source="discovered".'
                )
        return tuple(index for index, _ in self.refusal)


CHATML = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
CHATML_SYSTEM = "<|im_start|>system\n{system}<|im_end|>\n" + CHATML
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

LLAMA3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3_BOS = "<|begin_of_text|>"

TEMPLATES = {
    template.name: template
    for template in (
        # The published Llama-3 run: a stray quote, and a second <|begin_of_text|> after it.
        Template(
            name="paper/llama-3@published",
            plain=f'"{LLAMA3_BOS}{LLAMA3_TURN}',
            no_system="the published one had a form that left the instruction out",
            bos=LLAMA3_BOS,
            special=LLAMA3_TOKENS,
            refusal=((40, "I"),),
            positions=5,
        ),
        Template(
            name="paper/llama-3@fixed",
            plain=LLAMA3_TURN,
            with_system=LLAMA3_SYSTEM + LLAMA3_TURN,
            bos=LLAMA3_BOS,
            special=LLAMA3_TOKENS,
            refusal=((40, "I"),),
            positions=5,
        ),
        Template(
            name="paper/llama-2",
            plain="[INST] {instruction} [/INST] ",
            with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{instruction} [/INST] ",
            bos="<s>",
            refusal=((306, "I"),),
            positions=6,
        ),
        Template(
            name="paper/qwen",
            plain=CHATML,
            with_system=CHATML_SYSTEM,
            special=CHATML_TOKENS,
            refusal=((40, "I"), (2121, "As")),
            positions=5,
        ),
        Template(
            name="paper/yi",
            plain=CHATML,
            with_system=CHATML_SYSTEM,
            special=CHATML_TOKENS,
            refusal=((59597, "I"),),
            positions=6,
        ),
        Template(
            name="paper/gemma",
            plain="<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
            no_system="Gemma was trained without one",
            bos="<bos>",
            special=("<start_of_turn>", "<end_of_turn>"),
            refusal=((235285, "I"),),
            positions=5,
        ),
    )
}


def find(name: str) -> Template:
    """The template of that name; ChatError lists what there is."""
    if name not in TEMPLATES:
        raise ChatError(
            f"model.template={name!r}: there is no such template. Leave it empty for the "
            f"tokenizer's own, or choose one of {', '.join(sorted(TEMPLATES))}."
        )
    return TEMPLATES[name]
