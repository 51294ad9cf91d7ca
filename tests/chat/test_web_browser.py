"""The page in a browser: clicks, streaming, two visitors, scripts that must not run."""

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("gradio", reason="the page needs: pip install gradio")
pytest.importorskip("selenium", reason="the browser tests need: pip install selenium")

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.chat.seeing import save_seeing
from tests.chat.web_pages import Parrot, served
from xtuner_lite.chat.load import load_for_chat
from xtuner_lite.chat.session import ChatSession
from xtuner_lite.chat.web.answerer import Answerer
from xtuner_lite.models.sampling import Sampling

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BROWSER or not DRIVER,
        reason="the browser tests need Chromium and its driver: apt install chromium-driver",
    ),
]

#: A message with what would run a script, and a picture of another host ({other}).
HOSTILE = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> "
    "<a href=\"javascript:document.title='run'\">link</a> <svg onload=\"document.title='run'\">"
    "</svg> <think>shown</think> ![remote]({other}/pixel.png) <img src={other}/tag.png> end"
)


class Visitor:
    """A browser window on the page."""

    def __init__(self, url, *, language="en-US", mobile=False, is_guarded=False):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{word}")
        options.add_argument(f"--lang={language}")
        options.add_argument("--window-size=1200,900")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        if mobile:
            screen = {"width": 390, "height": 844, "pixelRatio": 2.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.url = url
        self.driver.get(url)
        first = "input[type=password]" if is_guarded else "#question textarea"
        self.until(lambda: self.find(first).is_displayed())

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, is_so, seconds=30):
        """Waits; what is_so returned."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := is_so():
                    return found
            except (NoSuchElementException, StaleElementReferenceException):
                pass  # the page is being drawn
            time.sleep(0.03)
        raise AssertionError(f"not in {seconds} s; the page says: {self.find('body').text}")

    def click(self, selector):
        self.until(lambda: self.find(selector).is_enabled())
        self.find(selector).click()

    def texts(self, column="#chat"):
        """The messages that a column shows."""
        selector = f"{column} [data-testid=user], {column} [data-testid=bot]"
        return [one.text.strip() for one in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def ask(self, text, *, wait=True):
        num_before = len(self.texts())
        self.find("#question textarea").send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.texts()) == num_before + 2)
        if wait:
            self.until(self.is_done)

    def upload(self, path):
        self.find("#question input[type=file]").send_keys(str(path))
        self.until(lambda: self.find("#question .thumbnail-item, #question img"))

    def is_done(self):
        return self.find("#send").is_displayed() and self.find("#retry").is_enabled()

    def hosts(self):
        """Addresses that were asked for and are not the page's."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert any(url.startswith(self.url) for url in urls)
        return [u for u in urls if not u.startswith((self.url, "data:", "blob:", "chrome"))]


@pytest.fixture(scope="module")
def page():
    with served(Parrot(pause_s=0.05), max_characters=1000) as (url, _):
        yield url


@pytest.fixture
def visit(page):
    visitors = []

    def open_page(url=page, **options):
        visitors.append(Visitor(url, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.driver.quit()


def test_a_conversation(visit):
    visitor = visit()
    assert visitor.driver.title == "Parrot"
    assert visitor.find("#send").text == "Send"
    words = [f"word{number}" for number in range(40)]
    visitor.ask(" ".join(words), wait=False)
    lengths = set()

    def grows():
        lengths.add(len(visitor.texts()[-1]))
        return visitor.is_done()

    visitor.until(grows)
    assert len(lengths) >= 4, "the answer did not come piece by piece"
    assert visitor.texts() == [" ".join(words), f"1: {' '.join(words)}"]
    assert visitor.find("#question textarea").get_attribute("value") == ""

    visitor.click("#retry")
    visitor.until(lambda: visitor.find("#stop").is_displayed())
    visitor.until(visitor.is_done)
    assert visitor.texts() == [" ".join(words), f"1: {' '.join(words)}"]
    visitor.ask("again")
    assert visitor.texts()[2:] == ["again", "2: again"]

    visitor.ask(" ".join(words), wait=False)
    visitor.find("#question textarea").send_keys("too early", Keys.ENTER)
    visitor.until(lambda: "still being written" in visitor.find("#notice").text)
    visitor.until(lambda: "word3" in visitor.texts()[-1])
    visitor.click("#stop")
    visitor.until(visitor.is_done)
    assert visitor.find("#question textarea").get_attribute("value") == "too early"
    visitor.find("#question textarea").clear()
    assert visitor.texts()[-1].startswith("3: word0 word1 word2 word3")
    assert "word39" not in visitor.texts()[-1]

    visitor.click("#clear")
    visitor.until(lambda: visitor.texts() == [])
    visitor.ask("new")
    assert visitor.texts() == ["new", "1: new"]
    assert visitor.hosts() == []


def test_errors_are_read_in_the_page_which_lives_on(visit):
    visitor = visit()
    visitor.find("#question textarea").send_keys("fail please", Keys.ENTER)
    visitor.until(lambda: "No answer: the conversation has 900" in visitor.find("#notice").text)
    assert visitor.find("#question textarea").get_attribute("value") == "fail please"
    box = visitor.find("#question textarea")
    visitor.until(visitor.is_done)
    box.clear()
    visitor.driver.execute_script(
        "const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;"
        "set.call(arguments[0], 'x'.repeat(1500));"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        box,
    )
    box.send_keys(Keys.ENTER)
    visitor.until(lambda: "1500 characters; at most 1000" in visitor.find("#notice").text)
    box.clear()
    visitor.ask("fine")
    assert visitor.texts() == ["fine", "1: fine"]
    assert visitor.find("#notice").text == ""


def test_two_visitors_and_two_languages(visit):
    english, chinese = visit(), visit(language="zh-CN")
    assert chinese.find("#send").text == "发送"
    assert chinese.find("#question textarea").get_attribute("placeholder") == "请输入问题"
    english.ask("one two three four five six seven eight", wait=False)
    chinese.ask("一 二 三 四 五 六 七 八", wait=False)
    for visitor in (english, chinese):
        visitor.until(visitor.is_done)
    assert english.texts()[-1] == "1: one two three four five six seven eight"
    assert chinese.texts()[-1] == "1: 一 二 三 四 五 六 七 八"
    assert len(english.texts()) == len(chinese.texts()) == 2
    chinese.find("#question textarea").send_keys("fail", Keys.ENTER)
    chinese.until(lambda: "没有得到回答" in chinese.find("#notice").text)


def test_side_by_side(visit):
    visitor = visit()
    assert not visitor.driver.find_elements(By.CSS_SELECTOR, "#base-chat")
    visitor.click("#compare input")
    visitor.until(lambda: visitor.find("#base-chat").is_displayed())
    visitor.ask("hello")
    assert visitor.texts() == ["hello", "1: hello"]
    assert visitor.texts("#base-chat") == ["hello", "base 1: hello"]


@contextmanager
def other_host():
    """(address, paths that were asked for) of a server that is not the page's."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_html_in_messages_runs_nothing_and_fetches_nothing(visit):
    visitor = visit()
    with other_host() as (other, asked):
        visitor.ask(HOSTILE.format(other=other))
        assert visitor.texts()[-1].endswith("end")
        for link in visitor.driver.find_elements(By.CSS_SELECTOR, "#chat a"):
            visitor.driver.execute_script("arguments[0].click()", link)
        time.sleep(0.3)  # what would run has run
        assert asked == []
    assert visitor.driver.title == "Parrot"
    assert "<think>shown</think>" in visitor.texts()[-1]
    assert visitor.driver.find_elements(By.CSS_SELECTOR, "#chat [data-testid] script") == []


def test_a_phone_shows_all_of_it(visit):
    visitor = visit(mobile=True)
    visitor.ask("a rather long question that does not fit into one line of a telephone")
    width = visitor.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
    assert visitor.find("#send").rect["width"] >= 60


def test_the_password_is_typed_in_the_page(visit):
    with served(Parrot(), password="sesame") as (url, _):
        visitor = visit(url, is_guarded=True)
        assert "the password is the one set by" in visitor.find("body").text
        name, password = visitor.driver.find_elements(By.CSS_SELECTOR, "input")
        name.send_keys("anyone")
        password.send_keys("sesame", Keys.ENTER)
        visitor.until(lambda: visitor.find("#question textarea").is_displayed())
        visitor.ask("hello")
        assert visitor.texts() == ["hello", "1: hello"]


def test_a_picture_is_uploaded_seen_and_asked_about_again(visit, tmp_path):
    root = tmp_path / "see"
    root.mkdir()
    files = save_seeing(root)
    loaded = load_for_chat(files["whole"])
    session = ChatSession(*loaded, sampling=Sampling(max_new_tokens=8))
    start = Sampling(max_new_tokens=8)
    with served(Answerer(*loaded), sampling=start) as (url, _):
        visitor = visit(url)
        assert "pictures can be" in visitor.find("#question textarea").get_attribute("placeholder")
        visitor.upload(files["red"])
        visitor.find("#question textarea").send_keys("What?", Keys.ENTER)
        visitor.until(lambda: visitor.texts() and visitor.is_done())
        assert visitor.texts()[-1] == session.reply("What?", [files["red"]]).strip()
        (picture,) = visitor.driver.find_elements(By.CSS_SELECTOR, "#chat img[src*='red.png']")
        visitor.until(lambda: int(picture.get_attribute("naturalWidth")) == 40)
        (share,) = visitor.driver.find_elements(By.CSS_SELECTOR, "#chat [aria-label=Share]")
        assert not share.is_displayed()
        assert not visitor.driver.find_elements(By.CSS_SELECTOR, "#question img")
        if folder := os.environ.get("SCREENSHOTS"):
            visitor.driver.save_screenshot(f"{folder}/picture.png")

        visitor.upload(files["damaged"])
        visitor.find("#question textarea").send_keys("And this?", Keys.ENTER)
        visitor.until(lambda: "damaged.png is no image" in visitor.find("#notice").text)
        assert visitor.find("#question textarea").get_attribute("value") == "And this?"
        if folder:
            visitor.driver.save_screenshot(f"{folder}/damaged.png")
        assert visitor.hosts() == []
