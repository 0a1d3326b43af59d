"""The judge against a real endpoint on this machine: answers, troubles, cache, key."""

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moebius.config import fingerprint, from_json, to_json
from moebius.curate.scorers import Scorer
from moebius.curate.scorers.judge import Judge

from .server import Chat, serving


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy that this machine may have stands between."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def length_of(question: str) -> str:
    """The rule of the tests' judge: as many points as letters x."""
    return f"Score: {question.count('x')}"


@pytest.fixture
def chat() -> Iterator[Chat]:
    with serving(Chat(length_of)) as running:
        yield running


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text('Judge {"page": "{text}"} from 0 to 5.', encoding="utf-8")
    return str(path)


def judge(chat: Chat, prompt: str, **more: Any) -> Judge:
    return Judge("small", prompt, base_url=chat.url, backoff=0.0, **more)


def test_each_text_gets_its_own_number(chat: Chat, prompt: str) -> None:
    texts = ["x" * (i % 6) for i in range(40)]
    scores = judge(chat, prompt).build()
    assert scores.score(texts) == [{"score": float(i % 6)} for i in range(40)]
    assert scores.failures == {}
    assert set(chat.paths) == {"/v1/chat/completions"}


def test_a_request_says_what_the_config_says(chat: Chat, prompt: str) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    judge(chat, prompt, max_tokens=7, temperature=0.5, seed=3, extra=extra).build().score(["{x}"])
    assert chat.asked == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": 'Judge {"page": "{x}"} from 0 to 5.'}],
            "max_tokens": 7,
            "temperature": 0.5,
            "seed": 3,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


def test_no_more_questions_at_once_than_allowed(chat: Chat, prompt: str) -> None:
    chat.gather = threading.Barrier(3)
    judge(chat, prompt, concurrency=3).build().score(["x" * (i % 6) for i in range(9)])
    assert chat.most_at_once == 3


@pytest.mark.parametrize("trouble", [429, 500, 503, b"<html>", b'{"choices": []}', b"", b"[1]"])
def test_what_may_pass_is_asked_again(chat: Chat, prompt: str, trouble: int | bytes) -> None:
    chat.troubles = [trouble, trouble]
    scores = judge(chat, prompt, tries=3).build()
    assert scores.score(["xx"]) == [{"score": 2.0}]
    assert len(chat.asked) == 3 and chat.asked[0] == chat.asked[2]


def test_what_does_not_pass_gives_no_score_and_is_counted(chat: Chat, prompt: str) -> None:
    chat.answer = lambda question: {0: "1", 1: 500, 2: 400, 3: "none", 4: "7"}[question.count("x")]
    scores = judge(chat, prompt, tries=2).build()
    given = scores.score(["x" * i for i in range(5)])
    assert given == [{"score": 1.0}, {}, {}, {}, {}]
    assert scores.failures == {
        "the server answers 500": 1,
        "the server refused the request": 1,
        "the answer states no score": 2,
    }


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404])
def test_a_wrong_address_or_key_ends_the_run(
    chat: Chat, prompt: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    chat.troubles = [status]
    scores = judge(chat, prompt, api_key_variable="JUDGE_KEY").build()
    with pytest.raises(ValueError, match=f"answers {status}") as caught:
        scores.score(["x"])
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    # Nothing went where a redirect points.
    assert chat.paths == ["/v1/chat/completions"]


def test_a_server_that_is_down_ends_the_run(prompt: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = Judge(
        "small", prompt, base_url=f"http://127.0.0.1:{port}/v1", backoff=0.0, most_failures=4
    )
    with pytest.raises(ValueError, match=r"failed 4 questions in a row .*run again"):
        config.build().score(["x"] * 10)


def test_failures_that_are_not_in_a_row_do_not(chat: Chat, prompt: str) -> None:
    chat.answer = lambda question: 400 if "xx" in question else "1"
    scores = judge(chat, prompt, most_failures=2, concurrency=1).build()
    assert [bool(s) for s in scores.score(["x", "xx"] * 5)] == [True, False] * 5
    with pytest.raises(ValueError, match="refused"):
        scores.score(["x", "xx", "xx"])


def test_a_slow_server_is_given_up(prompt: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        scores = Judge("small", prompt, base_url=url, tries=1, timeout=0.1).build()
        assert scores.score(["x"]) == [{}]
    assert "no connection" in next(iter(scores.failures))


def test_answers_are_kept_and_not_asked_for_again(chat: Chat, prompt: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    chat.answer = lambda question: length_of(question) if "xxx" not in question else "what?"
    first = judge(chat, prompt, cache=cache).build()
    texts = ["x", "xx", "xxx"]
    given = first.score(texts)
    assert given == [{"score": 1.0}, {"score": 2.0}, {}]
    assert len(chat.asked) == 3
    # An answer without a score is an answer too; another address asks the same model.
    again = dataclasses.replace(
        judge(chat, prompt, cache=cache), base_url="http://0.0.0.0:1"
    ).build()
    assert again.score(texts) == given and again.failures == first.failures
    assert len(chat.asked) == 3
    judge(chat, prompt, cache=cache, seed=1).build().score(texts)
    assert len(chat.asked) == 6


def test_a_torn_or_foreign_answer_is_asked_for_again(
    chat: Chat, prompt: str, tmp_path: Path
) -> None:
    cache = tmp_path / "answers"
    scores = judge(chat, prompt, cache=str(cache)).build()
    scores.score(["x"])
    (path,) = cache.rglob("*.json")
    for i, damaged in enumerate((b"", b'{"te', b"[]", b'{"text": 3}', b"\xff")):
        path.write_bytes(damaged)
        assert scores.score(["x"]) == [{"score": 1.0}]
        assert len(chat.asked) == i + 2
        assert json.loads(path.read_bytes()) == {"text": "Score: 1"}


def test_failures_are_not_kept(chat: Chat, prompt: str, tmp_path: Path) -> None:
    chat.troubles = [500, 400]
    scores = judge(chat, prompt, cache=str(tmp_path / "answers"), tries=1).build()
    assert [scores.score(["x"]) for _ in range(3)] == [[{}], [{}], [{"score": 1.0}]]


def test_the_key_is_sent_and_written_nowhere(
    chat: Chat, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key\n")
    config = judge(chat, prompt, api_key_variable="JUDGE_KEY", cache=str(tmp_path / "answers"))
    config.build().score(["x"])
    assert chat.headers[0]["Authorization"] == "Bearer secret-key"
    kept = [path.read_text() for path in (tmp_path / "answers").rglob("*.json")]
    assert len(kept) == 1 and "secret" not in kept[0] + json.dumps(to_json(config))
    judge(chat, prompt).build().score(["x"])
    assert "Authorization" not in chat.headers[1]


@pytest.mark.parametrize("value", [None, "", "two\nlines", "é"])
def test_a_key_that_cannot_be_sent_is_refused(
    chat: Chat, prompt: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="JUDGE_KEY holds no key"):
        judge(chat, prompt, api_key_variable="JUDGE_KEY").build()


def test_a_long_or_broken_text_is_cut_and_sent(chat: Chat, prompt: str) -> None:
    scores = judge(chat, prompt, max_chars=90).build()
    scores.score(["a" * (16 << 20), "\ud800 x \x00"])
    sizes = sorted(len(asked["messages"][0]["content"]) for asked in chat.asked)
    assert sizes[1] < 90 + 40 and len(chat.asked) == 2


NUMBERS = Judge()
MARKED = Judge(marker="Score:")
LABELS = Judge(labels=("good", "not good", "Bad"))


@pytest.mark.parametrize(
    ("config", "answer", "expected"),
    [
        (NUMBERS, "3", 3.0),
        (NUMBERS, " 4.5.\n", 4.5),
        (NUMBERS, "**2**", 2.0),
        (NUMBERS, "Score: 4/5", 4.0),
        (NUMBERS, "I give it 4 out of 5.", 4.0),
        (NUMBERS, "4. Yes, 4.", 4.0),
        (NUMBERS, "between 3 and 4", None),
        (NUMBERS, "2-3", None),
        (NUMBERS, "6", None),
        (NUMBERS, "-1", None),
        (NUMBERS, "H2O", None),
        (NUMBERS, "1.2.3", None),
        (NUMBERS, "1,000", None),
        (NUMBERS, "four", None),
        (NUMBERS, "", None),
        (NUMBERS, "9" * 100_000, None),
        (NUMBERS, "1." * 100_000, None),
        (MARKED, "It has 2 errors in 9 lines. Score: 3", 3.0),
        (MARKED, "Score: 1? No. Score: 2", 2.0),
        (MARKED, "3", None),
    ],
)
def test_numbers_in_answers(config: Judge, answer: str, expected: float | None) -> None:
    assert config.parse(answer) == ({} if expected is None else {"score": expected})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("good", "good"),
        ("**Good**, clearly good.", "good"),
        ("It is not good.", "not good"),
        ("BAD!", "Bad"),
        ("good or bad", None),
        ("goods", None),
        ("", None),
    ],
)
def test_labels_in_answers(answer: str, expected: str | None) -> None:
    given = LABELS.parse(answer)
    assert given == ({name: float(name == expected) for name in LABELS.labels} if expected else {})


def test_a_judge_goes_through_json_and_only_its_questions_identify_it() -> None:
    config = Judge("m", "p.txt", labels=("a", "b"), extra={"top_p": 0.5, "stop": ["x"]})
    data = json.loads(json.dumps(to_json(config)))
    assert data["use"] == "judge" and from_json(Scorer, data) == config
    moved = dataclasses.replace(config, base_url="http://x", concurrency=1, cache="c")
    assert fingerprint(moved) == fingerprint(config)
    assert fingerprint(dataclasses.replace(config, seed=1)) != fingerprint(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 5.0}, "low"),
        ({"tries": 0}, "tries"),
        ({"labels": ("a",)}, "labels"),
        ({"labels": ("a", "A")}, "labels"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_configs_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge(**wrong)


def test_prompts_are_checked(tmp_path: Path, prompt: str) -> None:
    with pytest.raises(ValueError, match="needs model"):
        Judge().build()
    with pytest.raises(ValueError, match="cannot read the judge's prompt"):
        Judge("m", str(tmp_path / "absent")).build()
    (tmp_path / "plain.txt").write_text("Judge!")
    with pytest.raises(ValueError, match="the place of the text"):
        Judge("m", str(tmp_path / "plain.txt")).build()
    with pytest.raises(ValueError, match="http://"):
        Judge("m", prompt, base_url="file:///etc").build()
