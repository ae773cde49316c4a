"""lm-evaluation-harness on our models: its class of a model, over our sessions. A context is
read once for all the choices that follow it, and no text is too long."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
from tqdm import tqdm

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    from ..errors import AHNError

    raise AHNError("this needs lm-eval: pip install 'ahn-mlx[lm-eval]'") from None

from ..hub.zoo import load
from ..reading.generate import Run
from ..reading.sampling import Sampling
from ..reading.sandbox import render
from ..reading.session import Session
from ..reading.tokens import Encoder, check_ids
from .mixers import mixing

NAME = "ahn-mlx"  # of --model
LONGEST = 256  # tokens of an answer, if a task says nothing


@register_model(NAME)
class AHNLM(LM):
    """model: a name, ORG/NAME or directory, or a loaded model, then with its tokenizer. window,
    sinks, dtype, q_bits: as ahn_mlx.load takes them. mixer: "memory", "window" or "full".

    tokenizer of a name is what tasks that make their own texts measure them with; it is not
    used here. Raises AHNError as ahn_mlx.load does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        window: int | None = None,
        sinks: int | None = None,
        dtype: str | None = None,
        q_bits: int | None = None,
        mixer: str = "memory",
        **_: Any,
    ):
        super().__init__()
        if isinstance(model, str):
            settings: dict[str, Any] = {"window": window, "sinks": sinks}
            model, tokenizer = load(model, dtype=dtype, q_bits=q_bits, **settings)
        self.model, self.tokenizer, self.mixer = model, tokenizer, mixer
        self.encoder = Encoder(tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.origin.name).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability and whether it is what is likeliest."""
        pairs = [self._pair(*request.args) for request in requests]
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
        found: dict[int, tuple[float, bool]] = {}
        with mixing(self.model, self.mixer), tqdm(total=len(pairs), desc="choices") as bar:
            for context, group in groupby(order, key=lambda i: pairs[i][0]):
                session = Session(self.model, self.tokenizer, chat=False)
                session.read_ids(list(context[:-1]))
                for i in group:
                    said = list(pairs[i][1])
                    scores = list(self._scores(session.fork(), [context[-1], *said]))
                    found[i] = sum(s for s, _ in scores), all(g for _, g in scores)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
                    bar.update(1)
        return [found[i] for i in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of each text, all of it, after what the tokenizer puts before one."""
        found = []
        with mixing(self.model, self.mixer):
            for request in requests:
                (text,) = request.args
                session = Session(self.model, self.tokenizer, chat=False)
                ids = [*self._before(), *self.encoder(text)]
                found.append(sum(score for score, _ in self._scores(session, ids)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, up to the first of a task's texts that end one."""
        answers = []
        with mixing(self.model, self.mixer):
            for request in tqdm(requests, desc="answers"):
                context, settings = request.args
                run = Run(self.model, self.tokenizer, self._ids(context), _sampling(settings))
                answers.append("".join(run))
                self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _ids(self, text: str) -> list[int]:
        """A template that was put in already may begin with what begins a text."""
        ids, begin = self.encoder(text), self.encoder.begin
        ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
        return ids or self._before()

    def _before(self) -> list[int]:
        """What stands before a text that has nothing before it."""
        return self.encoder.begin or [self.tokenizer.eos_token_id]

    def _pair(self, context: str, said: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a context, at least one, and of what follows it; white space between the two
        belongs to the latter."""
        kept = context.rstrip()
        before, whole = self._ids(kept), self._ids(context + said)
        if not kept or whole[: len(before)] != before:
            whole = [*before, *self.encoder(context[len(kept) :] + said)]
        return tuple(before), tuple(whole[len(before) :])

    def _scores(self, session: Session, ids: Sequence[int]) -> Iterator[tuple[float, bool]]:
        """Of each id but the first: its log-probability, and whether it is the likeliest."""
        check_ids(list(ids), self.model)
        for a in range(0, len(ids) - 1, session.step):
            b = min(a + session.step, len(ids) - 1)
            logits = self.model(mx.array([list(ids[a:b])]), cache=session.caches)[0].astype(
                mx.float32
            )
            log = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            targets = mx.array(list(ids[a + 1 : b + 1]))
            scores = mx.take_along_axis(log, targets[:, None], axis=-1)[:, 0]
            greedy = log.argmax(axis=-1) == targets
            mx.eval(scores, greedy, [c.state for c in session.caches])
            pairs: Any = zip(scores.tolist(), greedy.tolist(), strict=True)  # type: ignore[arg-type]
            yield from pairs


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Of a task's settings; names as transformers has them."""
    until = settings.get("until") or ()
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    temp = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
    longest = settings.get("max_gen_toks") or settings.get("max_new_tokens") or LONGEST
    return Sampling(
        max_tokens=int(longest), temp=temp, top_p=float(settings.get("top_p") or 1), stop=stop
    )
