"""The page at /: people's buttons and keys in a real browser, against a real server."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import chromium, faults, opened
from playwright.sync_api import Page, expect
from serving import Site, serving, wait_until
from test_serve_chat import force

from ahn_mlx.serve.pages import DIRECTORY, FILES

TEXT = b"Call me Ishmael. Some years ago, never mind how long precisely. " * 20
EVIL = "<img src=x onerror=window.hurt=1>"
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("memories")) as site:
        yield site


@pytest.fixture
def site(started: Site):
    """Idle and empty again after each test."""
    yield started
    started.idle()
    for kind in ("memory_jobs", "memories", "files"):
        for thing in started.ok(f"/v1/{kind}")["data"]:
            assert started.client.delete(f"/v1/{kind}/{thing['id']}").status_code == 200


@pytest.fixture
def page(browser, site: Site):
    with opened(browser, site.url) as page:
        yield page


class Brake:
    """A reader that takes its time and never ends: one step of others takes as long."""

    cancelled = False

    def advance(self) -> bool:
        time.sleep(0.1)
        return False

    def fail(self, error: BaseException) -> None:
        raise error

    def end(self) -> None: ...


@contextmanager
def slowly(site: Site):
    brake = Brake()
    site.service.engine.add(brake)
    try:
        yield
    finally:
        brake.cancelled = True
        site.service.engine.wake()


def give(page: Page, text: bytes, name: str = "book.txt") -> None:
    page.set_input_files("#files", [{"name": name, "mimeType": "text/plain", "buffer": text}])


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def answered(page: Page, n: int = 1) -> None:
    """n answers have come to their end."""
    expect(page.locator("article.theirs[aria-busy=false]")).to_have_count(n)
    expect(page.locator("#send")).to_be_visible()


def button(page: Page, name: str):
    return page.get_by_role("button", name=name, exact=True)


# Without a browser


def test_files_of_fixed_names_with_a_strict_policy(site: Site):
    assert {"/", "/page/main.js", "/page/style.css", "/page/icon.svg"} <= set(FILES)
    for path, file in FILES.items():
        found = site.client.get(path)
        assert found.status_code == 200 and found.content == file.read_bytes()
        policy = dict(p.split(" ", 1) for p in found.headers["content-security-policy"].split("; "))
        assert policy.pop("require-trusted-types-for") == "'script'"
        own = {f"{kind}-src": "'self'" for kind in ("script", "style", "connect", "img")}
        none = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
        assert policy == own | dict.fromkeys(none, "'none'")
        assert found.headers["x-content-type-options"] == "nosniff"
        tag = found.headers["etag"]
        for known in (tag, f"W/{tag}", f'"x", W/{tag}'):  # what lies between may weaken it
            again = site.client.get(path, headers={"if-none-match": known})
            assert again.status_code == 304 and again.headers["etag"] == tag
        assert site.client.get(path, headers={"if-none-match": '"x"'}).status_code == 200
        assert site.client.post(path).status_code == 405
        assert site.client.get(path, headers={"host": "evil.example"}).status_code == 403
    for path in ("/page/", "/page/app.py", "/page/..%2fapp.py", "/page/%2fetc%2fpasswd", "/x"):
        assert site.client.get(path).status_code == 404


def test_what_the_page_is_made_of():
    sources = {p.name: p.read_text() for p in DIRECTORY.iterdir()}
    for name, text in sources.items():
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?:|innerHTML|outerHTML|insertAdjacent|eval\(|\bimport\(", text
        ), name
        assert len(text.splitlines()) < 400, name
    assert not re.search(r"<style|style=|\son\w+=|javascript:", sources["index.html"])
    assert re.findall(r"<script[^>]*>", sources["index.html"]) == [
        '<script type="module" src="/page/main.js">'
    ]


def test_only_the_page_comes_without_the_key(tmp_path):
    with serving(tmp_path, key=KEY) as site:
        del site.client.headers["authorization"]
        for path in FILES:
            assert site.client.get(path).status_code == 200
        others = ("/health", "/metrics", "/v1/models", "/page/", "/page/main.js/")
        for path in others:
            assert site.client.get(path).status_code == 401, path
        evil = {"host": "evil.example"}
        assert site.client.get("/", headers={"origin": "http://evil.example"}).status_code == 403
        assert site.client.get("/", headers=evil).status_code == 403


# Documents


def test_a_document_is_read_cancelled_resumed_and_deleted(page: Page, site: Site):
    with slowly(site):
        give(page, TEXT, "Moby Dick (Ünabridged).txt")
        job = page.locator("#jobs li")
        expect(job).to_contain_text("Moby-Dick-Unabridged")
        expect(job).to_contain_text(
            re.compile(r"[1-9]\d* of 1,2\d\d tokens · .* tokens/s · .* left")
        )
        assert 0 < job.locator("progress").evaluate("bar => bar.value") < 1
        button(page, "Cancel Moby-Dick-Unabridged").click()
        expect(job).to_contain_text("cancelled; what was read is kept")
        expect(job).not_to_contain_text("left")
        page.reload()
        expect(job).to_contain_text("cancelled; what was read is kept")
        (known,) = site.ok("/v1/memory_jobs")["data"]
        assert 0 < known["tokens_read"] < known["tokens"]
        button(page, "Resume Moby-Dick-Unabridged").press("Enter")
        expect(button(page, "Cancel Moby-Dick-Unabridged")).to_be_focused()
    memory = page.locator("#memories li")
    (facts,) = wait_for_memories(site, 1)
    expect(memory).to_contain_text(f"{facts['tokens']:,} tokens · {facts['bytes'] / 1e3:.1f} kB")
    expect(job).to_have_count(0)
    drop = button(page, "Delete Moby-Dick-Unabridged")
    drop.click()
    button(page, "Cancel").click()
    assert site.ok("/v1/memories")["data"]
    drop.click()
    expect(button(page, "Cancel")).to_be_focused()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(memory).to_have_count(0)
    for kind in ("memories", "memory_jobs", "files"):
        assert site.ok(f"/v1/{kind}")["data"] == []


def wait_for_memories(site: Site, n: int) -> list[dict]:
    wait_until(lambda: len(site.ok("/v1/memories")["data"]) == n)
    return site.ok("/v1/memories")["data"]


@pytest.mark.slow
def test_a_job_goes_on_after_the_server_has_ended(browser, tmp_path):
    with serving(tmp_path) as site, opened(browser, site.url) as page:
        site.service.engine.add(Brake())
        give(page, TEXT)
        expect(page.locator("#jobs li")).to_contain_text(re.compile("[1-9].* of 1,2"))
    with serving(tmp_path) as site, opened(browser, site.url) as page:
        expect(page.locator("#jobs li")).to_contain_text("stopped with the server")
        button(page, "Resume book").click()
        expect(button(page, "Ask book")).to_be_visible()
        assert wait_for_memories(site, 1)[0]["tokens"] > len(TEXT)


def test_files_are_dropped_and_memories_come_and_go_as_files(page: Page, site: Site, tmp_path):
    dropped = page.evaluate_handle("""() => {
        const data = new DataTransfer();
        for (const name of ["a b.txt", "a?b.md"]) data.items.add(new File(["Once more. "], name));
        return data;
    }""")
    page.dispatch_event("main", "drop", {"dataTransfer": dropped})
    expect(button(page, "Ask a-b")).to_be_visible()
    expect(button(page, "Ask a-b-2")).to_be_visible()
    with page.expect_download() as download:
        button(page, "Download a-b.ahn").click()
    assert download.value.suggested_filename == "a-b.ahn"
    file = tmp_path / "other.ahn"
    download.value.save_as(file)
    page.set_input_files("#files", file)
    expect(button(page, "Ask other")).to_be_visible()
    assert site.client.get("/v1/memories/other/content").content == file.read_bytes()
    for name in ("a-b", "a-b-2", "other"):
        button(page, f"Delete {name}").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(button(page, f"Delete {name}")).to_have_count(0)


def test_what_goes_wrong_is_said_in_words(browser, site: Site):
    expected = ("status of (400|409|429)", "ERR_INTERNET_DISCONNECTED")
    with opened(browser, site.url, *expected) as page:
        give(page, b"", "empty.txt")
        expect(page.locator("#jobs li")).to_contain_text("empty")
        expect(page.locator("#jobs .bad")).to_contain_text("empty.txt")
        button(page, "Remove empty").click()
        page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        expect(page.locator("#jobs li")).to_have_count(0)
        assert site.ok("/v1/files")["data"] == []
        give(page, b"no memory", "x.ahn")
        expect(page.get_by_role("alert")).to_contain_text("x.ahn: ")
        button(page, "Close this message").click()
        expect(page.locator("#alert p")).to_have_count(0)
        site.service.engine.reserve(3)
        ask(page, "Hi")
        expect(page.locator(".foot")).to_contain_text("all rows are busy")
        site.service.engine.release(3)
        answered(page)
        page.context.set_offline(True)
        ask(page, "Are you there?")
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        expect(page.get_by_label("Your question")).to_have_value("Are you there?")
        page.context.set_offline(False)


# Conversations


def test_answers_are_stopped_forked_saved_and_gone_on_with(browser, site: Site):
    with opened(browser, site.url, "status of 404") as page:
        converse(page, site)


def converse(page: Page, site: Site) -> None:
    bodies: list[dict] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if "/responses" in r.url else None)
    with slowly(site):
        ask(page, "One")
        words = page.locator(".theirs .words")
        expect(words).not_to_be_empty()
        before = words.inner_text()
        expect(words).not_to_have_text(before, use_inner_text=True)
        expect(page.locator(".foot")).to_contain_text("tokens/s")
        page.keyboard.press("Escape")
        answered(page)
        expect(page.locator(".foot")).to_contain_text("stopped")
        site.idle()
    button(page, "Save…").click()
    expect(page.get_by_role("alert")).to_contain_text("Ask once more")
    said = words.evaluate("x => x.textContent")
    undo = force(site, "Two is after one.")
    ask(page, "Two")
    answered(page, 2)
    undo()
    assert bodies[-1]["input"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Two"},
    ]
    expect(words.nth(1)).to_have_text("Two is after one.")
    page.get_by_role("button", name=re.compile("^Fork")).click()
    expect(page.locator("#conversations li")).to_have_count(2)
    expect(page.locator("article")).to_have_count(4)
    short(page, site, "Three", 3)
    assert bodies[-1]["input"] == [{"role": "user", "content": "Three"}]
    forked = bodies[-1]["previous_response_id"]
    page.reload()
    expect(page.locator("article")).to_have_count(6)
    page.locator("#conversations .opens").nth(1).click()
    expect(page.locator("article")).to_have_count(4)
    short(page, site, "Four", 3)
    assert bodies[-1]["previous_response_id"] == forked
    button(page, "Save…").click()
    page.get_by_label("Name", exact=True).fill("talk")
    page.keyboard.press("Enter")
    expect(page.locator("#memories li")).to_contain_text("conversation · ")
    site.service.shelf.clear()
    short(page, site, "Five", 4)
    assert [m["role"] for m in bodies[-1]["input"]] == ["user", "assistant"] * 3 + ["user"]
    button(page, "Ask talk").click()
    short(page, site, "Six", 1)
    assert bodies[-1]["model"] == "tiny@talk"
    button(page, "Close Six").click()
    page.get_by_role("dialog").get_by_role("button", name="Close it").click()
    expect(page.locator("#conversations")).not_to_contain_text("Six")


def short(page: Page, site: Site, question: str, n: int) -> None:
    undo = force(site, "Yes.")
    ask(page, question)
    answered(page, n)
    undo()


def test_the_bar_says_what_is_word_for_word(page: Page, site: Site):
    expect(page.locator("#legend")).to_have_text("64 tokens free")
    short(page, site, "Hello", 1)
    total = last_total(site)
    assert total < 64
    legend = page.locator("#legend")
    expect(legend).to_contain_text(f"last {total - 4} tokens word for word")
    expect(legend).to_contain_text(f"{64 - total} tokens free")
    short(page, site, "x" * 100, 2)
    expect(legend).to_contain_text("first 4 tokens word for word")
    expect(legend).to_contain_text(f"{last_total(site) - 64} tokens in outline")
    expect(legend).to_contain_text("last 60 tokens word for word")
    facts = site.ok("/health")
    size = facts["row_bytes"]
    expect(page.locator("#rows-sum")).to_contain_text(
        f"3 rows \u00d7 {size / 1e3:.1f} kB = {3 * size / 1e3:.1f} kB"
    )
    assert facts["active_bytes"] > size and facts["memories"] is True


def last_total(site: Site) -> int:
    return next(reversed(site.service.shelf._kept.values()))[0].tokens


def test_it_is_used_with_keys_alone(page: Page, site: Site):
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.locator("#question").focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    undo = force(site, "Yes.")
    page.keyboard.press("Enter")
    answered(page)
    undo()
    expect(page.locator(".mine .words")).to_have_text("One\nTwo", use_inner_text=True)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Enter")  # nothing is asked
    expect(page.locator("article")).to_have_count(2)
    with page.expect_file_chooser():
        page.locator("#pick").press("Enter")


# Nobody else


def test_words_are_never_markup(browser, site: Site):
    expected = ("status of 4(00|09)", "TrustedHTML", "policy: require-trusted-types-for")
    with opened(browser, site.url, *expected) as page:
        give(page, TEXT[:50], f"{EVIL}.txt")
        give(page, b"\0\1\2", f"{EVIL}.bin")
        expect(page.locator("#jobs .bad")).to_contain_text("<img")
        give(page, b"x", f"{EVIL}\"'.ahn")
        expect(page.get_by_role("alert")).to_contain_text(EVIL)
        expect(page.locator("#memories li")).to_contain_text("img-src-x-onerror-window.hurt-1")
        undo = force(site, f"{EVIL}</div><script>window.hurt=1</script>&amp;")
        ask(page, EVIL)
        answered(page)
        undo()
        expect(page.locator(".theirs .words")).to_contain_text(
            "<script>window.hurt=1</script>&amp;"
        )
        expect(page.locator("#title")).to_have_text(EVIL)
        page.reload()
        expect(page.locator(".mine .words")).to_have_text(EVIL)
        button(page, "Save…").click()
        page.get_by_label("Name", exact=True).fill("\"><b>'")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("letters, digits")
        assert page.locator("img, b b, main script").count() == 0
        assert page.evaluate("window.hurt") is None
        made = "document.body.innerHTML = '<p>'"  # the policy takes no markup at all
        assert (
            page.evaluate(f"() => {{ try {{ {made} }} catch (e) {{ return e.name }} }}")
            == "TypeError"
        )


def test_the_key_is_asked_for_once(browser, tmp_path):
    expected = "status of 401"
    with serving(tmp_path, key=KEY) as site, opened(browser, site.url, expected) as page:
        key = page.get_by_label("Key", exact=True)
        for wrong in ("wrong", "ключ"):
            key.fill(wrong)
            page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("does not take that key")
        page.keyboard.press("Escape")
        key.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.get_by_role("dialog")).to_have_count(0)
        give(page, TEXT[:100])
        with page.expect_download() as download:
            button(page, "Download book.ahn").click()
        assert Path(download.value.path()).read_bytes().startswith(b"")
        assert KEY not in page.url and KEY not in page.content()


def test_without_a_directory_of_memories_it_only_talks(browser):
    with serving() as site, opened(browser, site.url) as page:
        expect(page.locator("#drop")).to_contain_text("--memories")
        expect(page.locator("#save")).to_be_hidden()
        short(page, site, "Hello", 1)
        expect(page.locator(".words").nth(1)).to_have_text("Yes.")


@pytest.mark.parametrize(
    "scheme, width",
    [
        ("dark", 390),
        ("light", 1400),
        pytest.param("light", 390, marks=pytest.mark.slow),
        pytest.param("dark", 1400, marks=pytest.mark.slow),
    ],
)
def test_it_fits_and_is_read_by_everybody(browser, site: Site, scheme, width):
    options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    with opened(browser, site.url, reduced_motion="reduce", **options) as page:
        dark = sum(
            map(
                int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).background"))
            )
        )
        assert (dark < 200) == (scheme == "dark")
        short(page, site, "Hello " + "long" * 60, 1)
        assert faults(page) == []
        assert fits(page)
        button(page, "Save…").click()
        assert faults(page) == []
        page.keyboard.press("Escape")
        if width == 390:
            button(page, "Menu").click()
            expect(page.get_by_role("button", name="Menu")).to_have_attribute(
                "aria-expanded", "true"
            )
        expect(button(page, "Choose files…")).to_be_visible()
        assert faults(page) == []
        assert fits(page)
        page.keyboard.press("Escape")
        assert button(page, "Choose files…").is_visible() == (width == 1400)


def fits(page: Page) -> bool:
    """Nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
