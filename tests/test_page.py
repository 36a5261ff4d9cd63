"""The chat page in a real browser (headless Chromium), against a real server."""

import os
import re
import shutil

import pytest

from dev.parrot import ANSWERS

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(CHROMIUM), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page with nothing kept; temperature 0, so that the model says what it has learnt."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(server)
    page.evaluate("localStorage.setItem('nanochat.settings', JSON.stringify({temperature: 0}))")
    page.reload()
    page.problems = problems
    yield page
    context.close()
    assert not problems


def say(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page, text: str) -> None:
    sync_api.expect(page.locator(".assistant .body").last).to_contain_text(text, timeout=15000)
    sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=15000)


def slow_network(page) -> None:
    """The tiny model answers faster than anyone could stop it, or a busy machine could draw it: 40 bytes every 100 ms then."""
    page.evaluate("""() => {
        const fast = fetch, slow = {async transform(chunk, to) {
            for (let i = 0; i < chunk.length; i += 40) {
                await new Promise(r => setTimeout(r, 100));
                to.enqueue(chunk.slice(i, i + 40));
            }
        }};
        window.fetch = async (...asked) => {
            const response = await fast(...asked);
            return new Response(response.body.pipeThrough(new TransformStream(slow)), response);
        };
        window.back_to_fast = () => { window.fetch = fast; };
    }""")


def shot(page, name: str) -> None:
    """A picture for people, where NANOCHAT_SCREENSHOTS names a folder."""
    if folder := os.environ.get("NANOCHAT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_send_and_stream(page):
    sync_api.expect(page.locator("#model")).to_have_text("nanochat-parrot")
    shot(page, "empty")
    slow_network(page)
    lengths = []
    page.expose_function("grew", lambda length: lengths.append(length))
    page.evaluate("""new MutationObserver(() => grew(document.querySelector('.assistant .body')?.textContent.length ?? 0))
                     .observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true})""")
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    growing = sorted({length for length in lengths if length})
    assert len(growing) > 5 and growing[0] < len(ANSWERS["Hello"]) / 2  # it came bit by bit
    page.evaluate("back_to_fast()")
    assert "tok/s" in page.locator("#speed").inner_text() and "tokens" in page.locator(".note").inner_text()
    say(page, "Accents")
    answered(page, ANSWERS["Accents"])
    shot(page, "conversation")


def test_stop_and_regenerate(page, server):
    slow_network(page)
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        say(page, "Count")
        sync_api.expect(page.locator(".assistant .body").last).to_have_text(re.compile(".{10,}", re.DOTALL), timeout=15000)
        stop()
        sync_api.expect(page.locator(".note").last).to_have_text("stopped")
        page.get_by_role("button", name="New chat").click()
    page.evaluate("back_to_fast()")
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    page.get_by_role("button", name="Answer again").click()
    answered(page, ANSWERS["Hello"])
    assert page.locator(".assistant").count() == 1
    sync_api.expect(page.locator("#chats li")).to_have_count(3)
    running = page.request.get(server + "/stats").json()["running"]
    assert running == 0


def test_edit(page):
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    say(page, "Count")
    answered(page, "60")
    page.get_by_label("Message", exact=True).press("ArrowUp")
    page.get_by_label("Edit message").fill("Accents")
    page.keyboard.press("Escape")
    answered(page, "60")
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Edit message").fill("Accents")
    page.keyboard.press("Enter")
    answered(page, ANSWERS["Accents"])
    assert page.locator(".user").count() == 1 and page.locator(".assistant").count() == 1


def test_reload_keeps_chats(page):
    for question in ("Hello", "Accents"):
        page.keyboard.press("Control+Shift+O")
        say(page, question)
        answered(page, ANSWERS[question])
    page.reload()
    sync_api.expect(page.locator(".assistant .body")).to_have_text(ANSWERS["Accents"])
    sync_api.expect(page.locator("#chats li")).to_have_count(2)
    page.locator("#chats .open", has_text="Hello").click()
    sync_api.expect(page.locator(".assistant .body")).to_have_text(ANSWERS["Hello"])
    page.get_by_role("button", name="Delete chat: Hello").click()
    page.reload()
    sync_api.expect(page.locator("#chats li")).to_have_count(1)


def test_hostile_output_does_nothing(page):
    say(page, "Hack")
    answered(page, "<script>")
    body = page.locator(".assistant .body")
    for part in ('<script>document.title = "hacked"</script>', '<img src=x onerror=', "click"):
        sync_api.expect(body).to_contain_text(part)  # as text
    assert body.locator("script, img, iframe, object, a[href^='javascript']").count() == 0
    page.wait_for_timeout(300)
    assert page.title() != "hacked"
    shot(page, "hostile")
    assert page.evaluate("""async () => {  // and if it did become markup, the page's policy would stop it
        document.title = 'clean';
        document.addEventListener('securitypolicyviolation', () => { window.stopped = true; });
        const element = document.createElement('script');
        element.textContent = "document.title = 'hacked'";
        document.body.append(element);
        await new Promise(done => setTimeout(done, 100));
        return [document.title, window.stopped];
    }""") == ["clean", True]
    assert len(page.problems) == 1 and "Content Security Policy" in page.problems.pop()


def test_markdown_and_tools(page):
    say(page, "Rich")
    answered(page, "Title")
    body = page.locator(".assistant .body")
    for selector, text in (("h3", "Title"), ("strong", "bold"), ("em", "slanted"), ("p code", "code < 1"), ("ol li >> nth=1", "two"),
                           ("pre code", "if a < b:\n    print(a & b)"), ("td >> nth=1", "2")):
        assert body.locator(selector).text_content() == text
    shot(page, "markdown")
    say(page, "Sum")
    answered(page, "is the product.")
    call = page.locator(".call")
    assert call.locator("code").inner_text() == "12 * 37" and call.locator("samp").inner_text() == "444"
    sync_api.expect(page.locator(".assistant .body").last).to_have_text("Let me see: calculator12 * 37= 444 is the product.")
    shot(page, "tool")


def test_markdown_cases(page):
    def html(text):
        return page.evaluate("text => { const box = document.createElement('div'); box.append(...blocks(text.split('\\n'))); return box.innerHTML; }", text)

    assert html("a *b* **c** `d*e*`") == "<p>a <em>b</em> <strong>c</strong> <code>d*e*</code></p>"
    assert html("2 * 3 * 4 and snake_case_name") == "<p>2 * 3 * 4 and snake_case_name</p>"
    assert html("- a\n  - b\n- c") == "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"
    assert html("3. x\n4. y") == '<ol start="3"><li>x</li><li>y</li></ol>'
    assert html("> q\n> r") == "<blockquote><p>q<br>r</p></blockquote>"
    assert html("<b>x</b> &amp;") == "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"
    assert 'href="https://a.b/c"' in html("[x](https://a.b/c)") and "<a" not in html("[x](javascript:alert(1))")
    assert "<a" not in html("[x](data:text/html,hi)") and "<img" not in html("![x](https://a.b/c.png)")
    assert html("1. Do:\n   ```python\n   if x:\n       y\n   ```\n2. done").count("<code>if x:\n    y</code>") == 1
    assert html("a:\n|x|y|\n|-|-|\n|1|2|").count("<td>") == 2 and html("    a\n      b").count("<code>a\n  b</code>") == 1
    assert html("born in\n1987. It") == "<p>born in<br>1987. It</p>" and html("2*3*4 = 24") == "<p>2*3*4 = 24</p>"
    assert html("***x***") == "<p><strong><em>x</em></strong></p>" and html("#### 3") == "<h6>3</h6>"
    assert html("- a\n\n1. b") == '<ul><li>a</li></ul><ol start="1"><li>b</li></ol>'
    assert html("```\nunfinished").count("<code>unfinished</code>") == 1
    for text in ("**", "`", "[](", "|", "|\n|-", "-", "1.", "#", ">" * 50, "*" * 500, "# a" + " " * 20000 + "b", "a|b\n" + " " * 20000 + "x", "- " * 300, "_*" * 200, "[" * 500):
        html(text)  # comes back


def test_two_tabs_keep_each_others_chats(page, server):
    other = page.context.new_page()
    other.goto(server)
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    say(other, "Accents")
    answered(other, ANSWERS["Accents"])
    page.keyboard.press("Control+Shift+O")
    say(page, "Count")
    answered(page, ANSWERS["Count"])
    for tab in (page, other):
        sync_api.expect(tab.locator("#chats li")).to_have_count(3)
        tab.reload()
        sync_api.expect(tab.locator("#chats li")).to_have_count(3)
    assert page.evaluate("settings.temperature") == other.evaluate("settings.temperature") == 0


def test_what_is_refused_does_not_block_the_chat(page):
    say(page, "What is <|bos|>?")
    sync_api.expect(page.get_by_role("alert").first).to_contain_text("reserved")
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    assert page.evaluate("""() => {  // far over the limits of messages, and of characters
        const long = [...Array(300)].flatMap((_, i) => [{role: "user", content: "x".repeat(i)}, {role: "assistant", parts: [{type: "text", text: "y".repeat(9000)}]}]);
        const sent = toSend([...long, {role: "user", content: "now"}]);
        const sizes = sent.map(m => typeof m.content === "string" ? m.content.length : m.content[0].text.length);
        return [sent.length <= 500, sent[0].role, sent.at(-1).content, Math.max(...sizes), sizes.reduce((a, b) => a + b) <= 32000];
    }""") == [True, "user", "now", 8000, True]
    page.problems.clear()  # the browser notes the refusal


def test_reload_during_an_answer_and_damaged_storage(page):
    slow_network(page)
    say(page, "Count")
    sync_api.expect(page.locator(".assistant .body")).to_have_text(re.compile(".{10,}", re.DOTALL), timeout=15000)
    page.reload()
    sync_api.expect(page.locator(".assistant .body")).to_contain_text("1 2 3")
    sync_api.expect(page.locator(".note")).to_have_text("interrupted")
    page.evaluate("""["{}", "5", '{"id": "b", "title": "x", "messages": [{}]}', "{"].forEach((text, i) => localStorage.setItem("nanochat.chat." + i, text))""")
    page.evaluate("localStorage.setItem('nanochat.settings', '5')")
    page.reload()
    sync_api.expect(page.locator("#chats li")).to_have_count(1)


def test_phone_and_dark(browser, server):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark", has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server)
    sync_api.expect(page.locator("#side")).to_be_hidden()
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="Send").tap()
    sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=15000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 26, 25)"
    shot(page, "phone")
    page.get_by_role("button", name="Chats").tap()
    sync_api.expect(page.locator("#side")).to_be_visible()
    shot(page, "phone-chats")
    page.get_by_role("button", name="New chat").tap()
    sync_api.expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    page.get_by_label("Temperature").fill("0.5")
    shot(page, "phone-settings")
    page.get_by_role("button", name="Done").tap()
    page.wait_for_timeout(200)
    assert page.evaluate("JSON.parse(localStorage.getItem('nanochat.settings')).temperature") == 0.5
    context.close()


def test_everything_has_a_name(page):
    say(page, "Hello")
    answered(page, ANSWERS["Hello"])
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, textarea, select')].filter(e => e.getClientRects().length &&
        !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title)).map(e => e.outerHTML)""")
    assert nameless == []
    assert page.locator("[role=log][aria-busy=false]").count() == 1
    sync_api.expect(page.locator("[role=status]")).to_have_text("nanochat said: " + ANSWERS["Hello"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_server_away(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server)
    context.set_offline(True)
    say(page, "Hello")
    sync_api.expect(page.get_by_role("alert")).to_have_text("the server cannot be reached")
    context.set_offline(False)
    page.evaluate("settings.temperature = 0")
    page.get_by_role("button", name="Try again").click()
    answered(page, ANSWERS["Hello"])
    context.close()
