"""How the paper's authors put a question and take an answer: what is cut from a prompt that is
too long, what is a message, the penalty of the checkpoint, greedy."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.directory import read_json
from ..errors import AHNError
from ..hub.download import find
from ..hub.zoo import ZOO
from ..reading.generate import Run
from ..reading.sampling import Sampling
from ..reading.template import Template
from ..reading.tokens import Encoder


def checkpoint_penalty(model: nn.Module) -> float | None:
    """The repetition penalty of the checkpoint's generation_config.json; None if there is no
    such file. Raises AHNError if it is no number above 0."""
    name = model.origin.name
    if name in ZOO:
        return None
    file = find(name) / "generation_config.json"
    if not file.is_file():
        return None
    value = read_json(file).get("repetition_penalty")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise AHNError(f"{file}: repetition_penalty must be a number above 0")
    return float(value)


@dataclass
class Asker:
    """Prompts and answers of one model. limit: the most tokens of a prompt before it is put
    into the chat template; cut: what is kept of a longer one, its "end" or "both" ends.
    penalty: over all of prompt and answer."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    limit: int
    cut: str
    penalty: float

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer)
        self.template = Template(self.tokenizer) if self.tokenizer.has_chat_template else None

    def prompt(self, text: str, max_new: int, chat: bool) -> list[int]:
        """Token ids. chat: as a message of the user, if the tokenizer has a template."""
        text = self._cut(text, max_new)
        if chat and self.template:
            return self.encoder(*self.template.question("start", text))
        return [*self.encoder.begin, *self.encoder("", text)]

    def _cut(self, text: str, max_new: int) -> str:
        """Tokens are cut, and become text again."""
        ids = [*self.encoder.begin, *self.encoder("", text)]
        if len(ids) <= self.limit:
            return text
        if self.cut == "end":
            # With as much room as an answer takes; never nothing.
            return self._decode(ids[-max(1, self.limit - max_new) :])
        half = self.limit // 2
        return self._decode(ids[:half]) + self._decode(ids[len(ids) - half :])

    def answer(self, prompt: list[int], max_new: int, progress: Callable[[int], None]) -> str:
        """Greedy. progress: called with the tokens read so far."""
        sampling = Sampling(
            max_tokens=max_new,
            repetition_penalty=self.penalty,
            repetition_context_size=0,
        )
        run = Run(self.model, self.tokenizer, prompt, sampling)
        run.progress = lambda read, size: progress(read)
        for _ in run:
            pass
        ends = self.tokenizer.eos_token_ids
        return self._decode(run.said[:-1] if run.said and run.said[-1] in ends else run.said)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
