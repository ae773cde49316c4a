"""What is made of a network's troubles, by a clock that only the test moves on."""

import json
import logging
import time

import httpx2
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import are_progress_bars_disabled

from ahn_mlx import AHNError
from ahn_mlx.hub import fetch
from ahn_mlx.hub.published import MODELS

REQUEST = httpx2.Request("GET", "https://hub.example/file")


def answer(code: int = 200, **headers: object) -> httpx2.Response:
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return httpx2.Response(code, headers=named, request=REQUEST)


def refused(code: int, kind: type = errors.HfHubHTTPError) -> Exception:
    return kind("no", response=answer(code))


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.slept = 1000.0, []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Bar:
    """What a line does to its bar."""

    def __init__(self) -> None:
        self.did = []

    def update(self, size: int) -> None:
        self.did.append(size)

    def clear(self) -> None:
        self.did.append("clear")

    def refresh(self) -> None:
        self.did.append("refresh")


BROKEN = httpx2.ReadError("reset")


def test_pauses_double_up_to_eight_seconds_and_begin_anew_when_something_came(clock, capsys):
    line, tries = fetch.Line(), iter(range(9))

    def act() -> str:
        n = next(tries)
        if n == 6:
            line.came = line.heard = clock.now
        if n == 8:
            return "done"
        raise BROKEN

    assert fetch.persist(line, act) == "done"
    assert clock.slept == [1, 2, 4, 8, 8, 8, 1, 2]
    broke = "the connection broke; trying again"
    assert [line for line in capsys.readouterr().err.splitlines() if line[:3] == "the"] == 8 * [
        broke
    ]


def test_it_is_given_up_two_minutes_after_the_last_part(clock):
    line, failed = fetch.Line(), []

    def act() -> None:
        failed.append(clock.now)
        line.heard = clock.now  # busy, which is an answer
        raise refused(503)

    with pytest.raises(errors.HfHubHTTPError):
        fetch.persist(line, act)
    assert failed[-2] < 1120 <= failed[-1]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 416, 501, 505])
def test_what_will_not_change_is_not_tried_again(clock, code):
    with pytest.raises(errors.HfHubHTTPError):
        fetch.persist(fetch.Line(), lambda: (_ for _ in ()).throw(refused(code)))
    with pytest.raises(OSError, match="disk"):
        fetch.persist(fetch.Line(), lambda: (_ for _ in ()).throw(OSError("disk")))
    assert clock.slept == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_again_without_a_word(clock, capsys, code):
    errors_of = iter([caused(OSError("x"), refused(code)), httpx2.ReadTimeout("slow")])

    def act() -> str:
        if (error := next(errors_of, None)) is None:
            return "done"
        raise error

    assert fetch.persist(fetch.Line(), act) == "done"
    assert clock.slept == [1, 2] and capsys.readouterr().err == ""


def test_silence_is_said_every_twenty_seconds_and_ends_after_two_minutes(clock, capsys):
    line = fetch.Line()
    said = []
    for second in range(120):
        clock.now = 1000.0 + second
        line.check()
        if capsys.readouterr().err:
            said.append(second)
    assert said == [20, 40, 60, 80, 100]
    clock.now = 1120.0
    with pytest.raises(AHNError, match="nothing has come for 120 s; check the network"):
        line.check()
    line.bar = Bar()
    line.gets(7)
    line.check()
    clock.now += 20
    line.check()
    assert line.bar.did == [7, "clear", "refresh"]
    assert "nothing has come from the hub for 20 s; trying until 120 s" in capsys.readouterr().err


def test_requests_wait_no_longer_than_is_said(clock, monkeypatch):
    line = fetch.Line()
    monkeypatch.setattr(fetch, "_line", line)
    for given, waits in (
        ({}, [20.0] * 4),
        ({"connect": 5.0, "read": None, "write": 60.0, "pool": 20.0}, [5.0, 20.0, 20.0, 20.0]),
    ):
        request = httpx2.Request("GET", "https://hub.example", extensions={"timeout": given})
        line.asks(request)
        found = request.extensions["timeout"]
        assert [found[key] for key in ("connect", "read", "write", "pool")] == waits
    clock.now += 200
    with pytest.raises(AHNError, match="nothing has come"):
        line.asks(request)
    other = httpx2.Request("GET", "https://hub.example", extensions={"timeout": {"read": 99.0}})
    fetch.Line().asks(other)
    assert other.extensions["timeout"] == {"read": 99.0}


def test_an_answer_is_no_silence_but_a_busy_one_is_said(clock, capsys, monkeypatch):
    line = fetch.Line()
    monkeypatch.setattr(fetch, "_line", line)
    clock.now += 5
    line.answers(answer(503))
    assert line.heard == 1000.0
    assert capsys.readouterr().err == "the hub answers 503; trying again\n"
    line.bar = Bar()  # of weights the bytes count
    line.answers(answer(200))
    assert line.heard == 1000.0
    line.bar = None
    line.answers(answer(200))
    assert (line.heard, line.came) == (1005.0, 1000.0)
    other = fetch.Line()
    other.answers(answer(503))
    assert capsys.readouterr().err == ""


def test_one_line_listens_at_a_time_and_hooks_once():
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    before = {name: list(found) for name, found in hooks.items()}
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    with fetch.listening() as line:
        assert logger.level == logging.CRITICAL and are_progress_bars_disabled()
        for _ in range(2):
            line.attach()
        assert [hooks[name].count(hook) for name, hook in _hooks(line)] == [1, 1]
        with fetch.listening() as inner:
            assert fetch._line is inner
        assert fetch._line is line
    assert fetch._line is None
    assert logger.level == level and not are_progress_bars_disabled()
    for name, found in before.items():
        hooks[name] = found


def _hooks(line: fetch.Line) -> list[tuple[str, object]]:
    return [("request", line.asks), ("response", line.answers)]


SAID = {
    "needs your consent": refused(403, errors.GatedRepoError),
    "no such repository, or it is private": refused(404, errors.RepositoryNotFoundError),
    "has no revision v2; give a branch": refused(404, errors.RevisionNotFoundError),
    "what we said": AHNError("what we said"),
    "HF_HUB_OFFLINE is set": errors.OfflineModeIsEnabled("off"),
    "the proxy refuses (no)": httpx2.ProxyError("no"),
    "no safe connection (SSL: old)": httpx2.ConnectError("SSL: old"),
    "no safe connection (a CERTIFICATE)": httpx2.ConnectError("a CERTIFICATE"),
    "what answers is not the hub": json.JSONDecodeError("x", "y", 0),
    "the hub does not answer; run the same": httpx2.ReadTimeout("slow"),
    "the hub answers 418; try again later": refused(418),
    "is not in the cache and the hub cannot": httpx2.ConnectError("refused"),
    "the connection broke (reset)": fetch._Broken("reset"),
    "cannot be stored: No space left": OSError(28, "No space left"),
    "some other thing": ValueError("some\n other   thing"),
    "the hub answers 504": caused(errors.LocalEntryNotFoundError("x"), refused(504)),
    "the proxy refuses": caused(ValueError("x"), caused(OSError("y"), httpx2.ProxyError("z"))),
}


@pytest.mark.parametrize("said", SAID)
def test_what_a_user_can_do_is_said_in_one_line(said):
    text = fetch.explain(SAID[said], "v2")
    assert text.startswith(said) or said in text
    assert "\n" not in text
    assert len(fetch.explain(ValueError(500 * "x"))) == 200


@pytest.mark.parametrize(
    ("code", "have", "length", "begin"),
    [
        (206, 40, 60, 40),
        (200, 40, 100, 0),
        (200, 0, 100, 0),
        (206, 40, "", 40),
        (200, 40, "", 0),
    ],
)
def test_a_body_begins_where_the_part_ends_or_anew(code, have, length, begin):
    assert fetch._begin(answer(code, content_length=length), have, 100) == begin
    odd = httpx2.Response(200, headers=[(b"content-length", b"\xb2")], request=REQUEST)
    assert fetch._begin(odd, 0, 100) == 0


@pytest.mark.parametrize(("code", "length"), [(206, 59), (206, 100), (200, 60), (200, 101)])
def test_a_body_of_another_length_is_another_file(code, length):
    response = answer(code, content_length=length, content_type="text/html; charset=x")
    with pytest.raises(AHNError, match=rf"hub.example sends {length} bytes of 'text/html' for"):
        fetch._begin(response, 40, 100)


def test_bases_are_as_they_were_published():
    """Of their config.json, what is no size."""
    said = {
        name: (e.base.config["rms_norm_eps"], e.base.config["tie_word_embeddings"])
        for name, e in MODELS.items()
    }
    for name, found in said.items():
        small = "smollm2" in name
        assert found == (1e-5 if small else 1e-6, small or name.endswith("-3b"))
