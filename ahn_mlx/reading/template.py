"""A tokenizer's chat template, taken apart, so that a conversation can be read in pieces."""

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError

# Stand for two messages of the user and the answer between them.
MARKS = ("FIRST-MESSAGE-7f3a", "ANSWER-7f3a", "SECOND-MESSAGE-7f3a")


class Template:
    """What stands between messages. Raises AHNError for a template that does not keep them.

    system: system message, or "" for the template's own.
    """

    def __init__(self, tokenizer: TokenizerWrapper, system: str = ""):
        if not tokenizer.has_chat_template:
            raise AHNError("the tokenizer has no chat template; use --no-chat-template")
        self.system = system
        messages = [{"role": "system", "content": system}] if system else []
        roles = ("user", "assistant", "user")
        messages += [{"role": r, "content": m} for r, m in zip(roles, MARKS, strict=True)]
        try:
            text: str = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            self.start, rest = text.split(MARKS[0])
            self.answer, rest = rest.split(MARKS[1])
            self.between, end = rest.split(MARKS[2])
        except Exception as e:  # whatever the template's own code raises
            reason = " ".join(str(e).split())[:200]
            raise AHNError(f"the chat template failed ({reason}); use --no-chat-template") from None
        if end != self.answer:
            raise AHNError("the chat template treats its last message apart; --no-chat-template")
        # The model ends an answer by itself with the first token of what follows it.
        ends = [tokenizer.decode([token]) for token in tokenizer.eos_token_ids]
        self.end = next((e for e in ends if e and self.between.startswith(e)), "")

    def opening(self, turn: str) -> str:
        """What stands before more text of the user."""
        between = {"answered": self.between.removeprefix(self.end), "cut": self.between}
        return {"start": self.start, "read": "", **between}[turn]

    def question(self, turn: str, question: str) -> str:
        """From where the conversation stands to where the answer begins."""
        gap = "\n\n" if turn == "read" and question else ""
        return self.opening(turn) + gap + question + self.answer
