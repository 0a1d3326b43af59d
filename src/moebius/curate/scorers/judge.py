"""A chat model as the judge of a text, over any OpenAI-compatible endpoint.

As Llama 3 (2407.21783, 3.1) and FineWeb-Edu had pages judged: a prompt file states what quality is
and how to answer, `{text}` in it is the page; the answer is one number, or one of some labels. An
answer that is neither is counted and gives no score. Judging all of a corpus is dear; `distil`
beside this file has a small classifier learn from some thousands of answers.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import regex

from moebius.config import runtime
from moebius.curate.scorers import Scorer, Scores
from moebius.curate.scorers.endpoint import Endpoint
from moebius.curate.scorers.features import excerpt

_PLACE = "{text}"
# A number alone, "4/5" or "4 out of 5"; not the 4 of "B4" or "4.1.2".
_NUMBER = regex.compile(
    r"(?<![\w.])(-?\d{1,9}(?:\.\d{1,9})?)(?:\s?(?:/|out of)\s?\d{1,9})?(?![\w/]|\.\d)"
)


@dataclasses.dataclass(frozen=True)
class Judge(Scorer):
    """An endpoint, a model and a prompt file.

    Without `labels` the score is the one number in the answer, named `score`, from `low` to `high`;
    with them it is 1 for the label in the answer and 0 for the others. With `marker` only what
    comes after its last occurrence is read, so that a judge may reason first.
    """

    model: str = ""
    prompt: str = ""
    labels: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 5.0
    marker: str = ""
    # Of a longer text the judge sees the beginning, the middle and the end.
    max_chars: int = 8000
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    # More fields of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_url: str = runtime("http://localhost:8000/v1")
    # The environment variable that holds the key; none: no key is sent.
    api_key_variable: str = runtime("")
    # The folder of answers; none: nothing is kept.
    cache: str = runtime("")
    concurrency: int = runtime(8)
    tries: int = runtime(6)
    # Seconds to wait before the second try, twice as long before each further one.
    backoff: float = runtime(1.0)
    timeout: float = runtime(120.0)
    # So many questions in a row without an answer end the run.
    most_failures: int = runtime(20)

    def __post_init__(self) -> None:
        counts = ("max_chars", "max_tokens", "concurrency", "tries", "most_failures")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.backoff < 0 or self.timeout <= 0:
            raise ValueError("backoff must not be below 0, and timeout above 0")
        folded = [label.casefold() for label in self.labels]
        if self.labels and (len(set(folded)) < 2 or len(set(folded)) < len(folded)):
            raise ValueError(f"labels must be two different ones or more, not {list(self.labels)}")

    def build(self) -> "JudgeScores":
        if not self.model or not self.prompt:
            raise ValueError("a judge needs model, its name at the endpoint, and prompt, a file")
        try:
            prompt = Path(self.prompt).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the judge's prompt {self.prompt} ({error})") from error
        if _PLACE not in prompt:
            raise ValueError(f"{self.prompt} has no {_PLACE}, the place of the text to be judged")
        endpoint = Endpoint(
            self.base_url,
            self._key(),
            Path(self.cache) if self.cache else None,
            tries=self.tries,
            backoff=self.backoff,
            timeout=self.timeout,
            most_failures=self.most_failures,
        )
        return JudgeScores(self, prompt, endpoint)

    def _key(self) -> str:
        """The key: a secret, so it stands in the environment and in no file."""
        if not self.api_key_variable:
            return ""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(
                f"the environment variable {self.api_key_variable} holds no key; put it there"
            )
        return key

    def parse(self, answer: str) -> dict[str, float]:
        """The scores an answer states; none where it states none, or more than one."""
        if self.marker:
            _, found, answer = answer.rpartition(self.marker)
            if not found:
                return {}
        if self.labels:
            return self._label(answer)
        numbers = {float(match[1]) for match in _NUMBER.finditer(answer)}
        if len(numbers) != 1:
            return {}
        (number,) = numbers
        return {"score": number} if self.low <= number <= self.high else {}

    def _label(self, answer: str) -> dict[str, float]:
        # Longer labels first: "not good" is not "good".
        names = sorted(self.labels, key=lambda label: (-len(label), label))
        pattern = "|".join(regex.escape(name.casefold()) for name in names)
        said = set(regex.findall(rf"(?<!\w)(?:{pattern})(?!\w)", answer.casefold()))
        if len(said) != 1:
            return {}
        return {label: float(label.casefold() in said) for label in self.labels}


class JudgeScores(Scores):
    """The judge at work. `failures` counts the texts without a score, by reason."""

    def __init__(self, config: Judge, prompt: str, endpoint: Endpoint) -> None:
        self.config, self.prompt, self.endpoint = config, prompt, endpoint
        self.failures: Counter[str] = Counter()

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Each text's scores, `concurrency` questions at a time; none for what has no answer."""
        with ThreadPoolExecutor(min(self.config.concurrency, max(1, len(texts)))) as pool:
            results = list(pool.map(self._one, texts))
        self.failures.update(why for _, why in results if why)
        return [scores for scores, _ in results]

    def payload(self, text: str) -> dict[str, Any]:
        """The request for one text."""
        config = self.config
        shown = excerpt(text, config.max_chars).encode("utf-8", "replace").decode()
        return {
            "model": config.model,
            "messages": [{"role": "user", "content": self.prompt.replace(_PLACE, shown)}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": config.seed,
            **config.extra,
        }

    def _one(self, text: str) -> tuple[dict[str, float], str]:
        answer = self.endpoint.ask(self.payload(text))
        if answer.text is None:
            return {}, answer.why
        scores = self.config.parse(answer.text)
        return scores, "" if scores else "the answer states no score"
