"""A tokenizer's own chat template for one user turn, under two laws.

What it renders holds the instruction and the system text as they are (blanks at the ends may be
trimmed, and the system text may stand in the user's turn, as Gemma 3 puts it): a template that
leaves one out, escapes, cuts or rewrites it is refused. And the same instruction renders to the
same prompt on every day.

Some templates, those of multimodal models above all, take content as a list of parts,
[{"type": "text", "text": ...}], and make nothing of a plain text. Text is tried first.
"""

from collections.abc import Mapping
from typing import Any

from jax_refusal.data.templates import ChatError
from jax_refusal.messages import shown

DATE = "26 Jul 2024"  # for templates that take the date as a variable; the clock of the others
# stands still in rendering.py

# Thinking models: the block before the answer. Qwen3's templates write an empty one in this form.
THINK, ANSWER = "<think>", "</think>\n\n"
# gpt-oss writes each message into a channel (its format is called harmony): thoughts into
# "analysis", then the answer into "final". Its template stops before the name of a channel.
CHANNEL, TURN, FINAL = "<|channel|>", "<|start|>assistant", "<|channel|>final<|message|>"

# Texts that escaping, cutting, lowering and the like would change.
TRIED = (
    "Why is \"a\" < 'b' & {{ c }}, Ünder \\ {% d %} <e>?",
    "Which words are LOST here? " + "Count to 7. " * 500 + "Stop.",
)
TRIED_SYSTEM = "Be BRIEF & \"kind\", 'f' < g, {{ h }} \\ Ü."

TEXT, PARTS = "text", "parts"
FORMS = (  # of the user's turn and of the system's
    (TEXT, TEXT),
    (TEXT, PARTS),
    (PARTS, TEXT),
    (PARTS, PARTS),
)


class OwnTemplate:
    """The template of a tokenizer, with a system turn or without, in the form that it takes."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self.system = system
        self.source = source(tokenizer)
        self.thinks = "enable_thinking" in self.source
        self.has_channels = CHANNEL in self.source
        self._variables: Mapping[str, Any] = {
            **tokenizer.special_tokens_map,
            "date_string": DATE,
            **({"enable_thinking": False} if self.thinks else {}),
        }
        self._form = self._find_form()

    def render(self, instruction: str) -> str:
        """The prompt as text, up to where the reply starts."""
        text = self._write(instruction, self.system, self._form)
        if instruction.strip() not in text:
            raise ChatError(_changed("the instruction", instruction, text))
        if self.system is not None and self.system.strip() not in text:
            raise ChatError(_changed("model.system", self.system, text) + NO_SYSTEM)
        if self.has_channels and text.endswith(TURN):
            return text + FINAL
        return text + _rest_of_an_empty_block(text)

    def _find_form(self) -> tuple[str, str]:
        """The first form in which texts arrive; ChatError where there is none.

        A template that fails whatever it is given is left to fail on what it is used for.
        """
        system = None if self.system is None else TRIED_SYSTEM
        complaint, failed = "", False
        for form in FORMS if self.system is not None else FORMS[::2]:
            try:
                texts = [self._write(tried, system, form) for tried in TRIED]
            except ChatError:
                failed |= form == FORMS[0]
                continue
            lost = next((p for p in zip(TRIED, texts, strict=True) if p[0] not in p[1]), None)
            if lost is None and (system is None or all(system in text for text in texts)):
                return form
            if lost is not None:
                complaint = complaint or _changed("the instruction", *lost)
            else:
                what = f"model.system={shown(self.system or '', 60)}"
                complaint = complaint or _changed(what, TRIED_SYSTEM, texts[0]) + NO_SYSTEM
        if failed:
            return FORMS[0]
        raise ChatError(complaint)

    def _write(self, instruction: str, system: str | None, form: tuple[str, str]) -> str:
        from jax_refusal.data import rendering

        turns = [{"role": "user", "content": _content(instruction, form[0])}]
        if system is not None:
            turns.insert(0, {"role": "system", "content": _content(system, form[1])})
        variables = {
            **self._variables,
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            text = rendering.render(self.source, variables, len(instruction) + len(system or ""))
        except Exception as error:  # a template is a program of the checkpoint: it raises anything
            reason = str(error)[:300] or type(error).__name__
            raise ChatError(
                f"The chat template failed on {shown(instruction, 60)}: {reason}."
            ) from error
        if PARTS in form and ("'type': 'text'" in text or '"type": "text"' in text):
            raise ChatError("The chat template writes a list of parts as it would be typed.")
        return text


def source(tokenizer: Any) -> str:
    """The template that is used: of several, the one that is called "default"."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ChatError(
                f"The tokenizer has the chat templates {sorted(own)!s:.200} and none is called "
                '"default": rename one in its tokenizer_config.json, or name a template in '
                "model.template."
            )
        own = own["default"]
    if not isinstance(own, str):
        raise ChatError(f"The chat template is {str(own)[:60]!r}: a text is needed.")
    return own


def _content(text: str, form: str) -> Any:
    return text if form == TEXT else [{"type": "text", "text": text}]


NO_SYSTEM = " Set model.system=None, or put the text into the instructions."


def _changed(what: str, text: str, made: str) -> str:
    return (
        f"The chat template leaves out or changes {what}: {shown(text, 60)} does not stand in the "
        f"prompt as it is, which ends in {made[-120:]!r}. Mend chat_template in "
        "tokenizer_config.json, or name a template in model.template."
    )


def _rest_of_an_empty_block(text: str) -> str:
    """What closes the think block that a template opens at the end of a prompt; else nothing."""
    opened = text.rstrip("\n")
    if not opened.endswith(THINK):
        return ""
    return "\n\n"[len(text) - len(opened) :] + ANSWER
