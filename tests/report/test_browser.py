"""The report and the served page in a real browser: what is seen, by keyboard and screen reader too, and what is not loaded."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from launch import cli
from supervisor.edge.journal import encode
from tests.report import stories
from tests.report.stories import HOSTILE, Story, evidence, job_directory, life

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60_000.0  # milliseconds: the machine may be busy
pytestmark = pytest.mark.xdist_group("chromium")
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    job = job_directory(folder / "gpt", life(attempts=130, total=13_000, every=20, pace=0.5, seed=1))
    evidence(job, 1, text=HOSTILE)
    assert cli.call(["report", "--dir", str(job), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


@contextlib.contextmanager
def opened(
    browser: Browser, url: str, *, scheme: Any = "light", width: int = 1280, complaint: str = "\0"
) -> Iterator[Page]:
    """A page that is drawn; afterwards, that it had nothing else to complain of and asked for nothing elsewhere."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    yield page
    place = urlsplit(url)
    assert [line for line in said if complaint not in line] == []
    assert {(urlsplit(each).scheme, urlsplit(each).netloc) for each in asked} == {
        (place.scheme, place.netloc)
    }
    context.close()


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_what_a_report_shows(browser: Browser, report: Path) -> None:
    with opened(browser, report.as_uri(), complaint="example.com") as page:
        assert page.title() == "gpt: completed"
        expect(page.locator("#attempts tbody tr")).to_have_count(100)
        page.get_by_role("button", name="Show all 130").click()
        expect(page.locator("#attempts tbody tr")).to_have_count(130)
        page.locator("#failures").get_by_role("button", name="Show all").click()
        failure = page.locator("#failures details", has_text="Attempt 1: crash")
        expect(failure.locator("summary").first).to_contain_text(HOSTILE)
        failure.locator("summary").first.click()
        expect(failure.locator("pre").first).to_contain_text("Traceback (most recent call last):")
        failure.get_by_text("rank 0", exact=True).click()
        expect(failure.locator("pre").last).to_contain_text("train_step")
        assert page.locator("img").count() == 0
        assert page.title() == "gpt: completed"
        page.get_by_role("button", name="hang", exact=False).first.click()
        expect(page.locator("#failures summary b").first).to_contain_text("hang")
        asked = page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'refused')")
        assert asked == "refused"  # by the page's own policy, before any connection


def test_tables_sort_by_keyboard_and_say_so(browser: Browser, report: Path) -> None:
    with opened(browser, report.as_uri()) as page:
        head = page.locator("#attempts th", has_text="Attempt").first
        cell = page.locator("#attempts tbody tr").first.locator("td").first
        assert head.get_attribute("aria-sort") == "descending"
        expect(cell).to_have_text("129")
        head.locator("button").focus()
        page.keyboard.press("Enter")
        expect(head).to_have_attribute("aria-sort", "ascending")
        expect(cell).to_have_text("0")
        assert page.evaluate("document.activeElement.textContent") == "Attempt"  # the focus stays
        page.locator("#attempts th button", has_text="Done again").click()
        shown = page.locator("#attempts tbody tr td:nth-child(6)").all_inner_texts()
        lost = [int(text.replace(",", "") or 0) for text in shown]
        assert lost == sorted(lost, reverse=True)
        assert lost[0] > 0


def test_charts_are_read_and_zoomed_by_keyboard(browser: Browser, report: Path) -> None:
    with opened(browser, report.as_uri()) as page:
        chart = page.locator("#metrics .chart")
        readout = page.locator("#metrics .readout")
        chart.focus()
        page.keyboard.press("End")
        expect(readout).to_contain_text("attempt 129")
        page.keyboard.press("Home")
        expect(readout).to_contain_text("attempt 0")
        assert readout.get_attribute("aria-live") == "polite"
        everything = page.locator("#metrics button", has_text="Show all")
        assert everything.is_disabled()
        page.keyboard.press("+")
        assert everything.is_enabled()
        page.keyboard.press("End")
        expect(readout).not_to_contain_text("attempt 129")
        page.keyboard.press("0")
        assert everything.is_disabled()
        page.locator("#time .chart").focus()
        page.keyboard.press("End")
        expect(page.locator("#time .readout")).to_contain_text("attempt 129")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_until_told_otherwise(browser: Browser, report: Path, scheme: str) -> None:
    other = {"light": "dark", "dark": "light"}[scheme]
    with opened(browser, report.as_uri(), scheme=scheme) as page:
        before = background(page)
        page.get_by_label("Theme").select_option(other)
        after = background(page)
        assert before != after
        page.emulate_media(color_scheme=other)  # type: ignore[arg-type]
        assert background(page) == after
        page.get_by_label("Theme").select_option("auto")
        assert background(page) == after
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_on_a_phone_nothing_runs_over_the_edge(browser: Browser, report: Path) -> None:
    with opened(browser, report.as_uri(), width=360) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator("#time svg").bounding_box()["width"] <= 360  # type: ignore[index]


def test_five_hundred_attempts_and_a_hundred_thousand_steps(browser: Browser, tmp_path: Path) -> None:
    """Every number of them is read; what is drawn is bounded, and says what it stands for."""
    job = job_directory(tmp_path / "big", life(attempts=500, total=100_000, every=4, pace=1.3))
    file = tmp_path / "big.html"
    assert cli.call(["report", "--dir", str(job), "-o", str(file)]) == 0
    assert file.stat().st_size < 4_000_000
    with opened(browser, file.as_uri()) as page:
        expect(page.locator("#attempts caption")).to_contain_text("500 attempts")
        expect(page.locator("#metrics .tools")).to_contain_text("values drawn by")
        assert page.evaluate("document.getElementsByTagName('*').length") < 12_000


# --------------------------------------------------------------------------- served


class Served:
    """A running ``everstep serve``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()
        place = urlsplit(self.url)
        assert place.hostname == "127.0.0.1"
        assert place.port is not None
        self.port: int = place.port
        self.token = place.query.removeprefix("token=")

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            method, path, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


@pytest.fixture
def jobs(tmp_path: Path) -> list[Path]:
    story = Story()
    story.run(1)
    story.attempt(0, 0, 40, 100, every=10, pace=1.0)
    return [
        job_directory(tmp_path / "one", story.facts),
        job_directory(tmp_path / "two", life(attempts=3, total=300, every=10, pace=0.5)),
    ]


@pytest.fixture
def served(jobs: list[Path]) -> Iterator[Served]:
    argv = [sys.executable, "-m", "launch.cli", "serve", "--port", "0"]
    for job in jobs:
        argv += ["--dir", str(job)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Served(process)
        finally:
            process.terminate()


def test_nothing_is_served_without_the_token(served: Served, jobs: list[Path]) -> None:
    for path in ("/", "/job/0/", "/job/0/data.json", "/job/0/events", "/?token=wrong", "/x", "/?token="):
        for headers in ({}, {"Cookie": f"everstep-{served.port}=wrong"}, {"Authorization": "Bearer wrong"}):
            status, _, text = served.ask(path, **headers)
            assert status == 401
            assert "token" in text
            assert "gpt" not in text
    status, headers, _ = served.ask(f"/job/1/?token={served.token}")
    assert (status, headers["Location"]) == (303, "/job/1/")
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    status, headers, _ = served.ask(f"//elsewhere.example/?token={served.token}")
    assert status == 303
    assert not headers["Location"].startswith("//")
    bearer = {"Authorization": f"Bearer {served.token}"}
    assert served.ask("/job/1/data.json", **bearer)[0] == 200
    for path in ("/job/2/", "/job/-1/", "/job/1/../../etc/passwd", "/job/1/x", "/job//", "/job/²/"):
        assert served.ask(path.replace("²", "%C2%B2"), **bearer)[0] == 404
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert served.ask("/job/0/", method, **bearer)[0] == 405


def test_serving_writes_nothing(served: Served, jobs: list[Path]) -> None:
    def all_of(job: Path) -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in job.rglob("*")}

    before = [all_of(job) for job in jobs]
    for path in ("/job/0/", "/job/1/data.json"):
        assert served.ask(path, Authorization=f"Bearer {served.token}")[0] == 200
    assert [all_of(job) for job in jobs] == before


def test_a_taken_port_is_said(served: Served, jobs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["serve", "--dir", str(jobs[0]), "--port", str(served.port)]) == 64
    assert "Address already in use" in capsys.readouterr().err


def test_the_page_follows_its_job(browser: Browser, served: Served, jobs: list[Path]) -> None:
    with opened(browser, served.url) as page:
        assert page.url == f"http://127.0.0.1:{served.port}/job/0/"
        expect(page.locator("#live")).to_have_text("live")
        expect(page.locator("#attempts tbody tr")).to_have_count(1)
        more = Story()
        more.time = stories.BEGAN + 5000
        more.fail(0, 45, "a rank was killed")
        more.attempt(1, 40, 70, 100, every=10, pace=1.0)
        with (jobs[0] / "journal" / "node.jsonl").open("ab") as file:
            file.writelines(map(encode, more.facts))
        expect(page.locator("#attempts tbody tr")).to_have_count(2)
        expect(page.locator("#failures")).to_contain_text("a rank was killed")
        page.get_by_label("Job").select_option(label="two")
        page.wait_for_url("**/job/1/")
        page.wait_for_selector("body[data-ready]")
        assert page.title() == "two: completed"


def test_a_job_that_is_gone_is_said_on_the_page(browser: Browser, served: Served, jobs: list[Path]) -> None:
    url = f"http://127.0.0.1:{served.port}/job/0/?token={served.token}"
    with opened(browser, url, complaint="ERR_") as page:
        expect(page.locator("#live")).to_have_text("live")
        (jobs[0] / "job.json").write_text(json.dumps({"format": 99}))
        expect(page.locator("#live")).to_contain_text("newer everstep")
        served.process.send_signal(2)
        expect(page.locator("#live")).to_contain_text("connection lost")


def test_a_token_of_ones_own(jobs: list[Path]) -> None:
    argv = [sys.executable, "-m", "launch.cli", "serve", "--port", "0", "--dir", str(jobs[0])]
    for token, code in (("short", 78), ("with spaces in it, long", 78)):
        result = subprocess.run(
            argv, cwd=ROOT, env={**os.environ, "EVERSTEP_SERVE_TOKEN": token}, capture_output=True, text=True, timeout=60, check=False
        )  # fmt: skip
        assert result.returncode == code
        assert "16 or more" in result.stderr


def test_a_reader_that_hangs_up_harms_nobody(served: Served) -> None:
    request = f"GET /job/0/events HTTP/1.1\r\nAuthorization: Bearer {served.token}\r\n\r\n".encode()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.ask("/job/0/", Authorization=f"Bearer {served.token}")[0] == 200
    served.process.send_signal(2)
    assert served.process.wait(60) == 130
    assert served.process.stderr is not None
    assert "Traceback" not in served.process.stderr.read()
