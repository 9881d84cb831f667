"""The result page in headless Chromium: clicks, keys, filters, escaping, dark mode, phone, and 10,000 queries."""

import base64
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import NASTY, content, picture_list

from patchnetvlad.ground_truth import GroundTruth
from patchnetvlad.report.content import DrawnMatches, ReportContent
from patchnetvlad.report.page import write_report

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in SWITCHES:
        options.add_argument(switch)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")

    def matches(row: int, index: int) -> tuple[DrawnMatches, ...]:
        positions = np.array([[50, 60, 70, 80], [100, 60, 120, 80], [10, 10, 200, 200]], dtype=np.uint8)
        return (DrawnMatches(2, 0.5, 3, 2, positions), DrawnMatches(5, 0.25, 3, 1, positions))

    write_report(folder / "report.html", replace(content(folder), matches=matches))
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    show(browser, page)
    return browser


def show(browser: Any, page: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())
    wait(browser, lambda: found(browser, "article"))


def found(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def wait(browser: Any, condition: Callable[[], object]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def names(browser: Any) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('article')].map((card) => card.ariaLabel)")


def press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("rescued", [1]), ("lost", [2]), ("worst", [2, 3]), ("none", [4]), ("right", [0, 1])],
)
def test_filters(opened, key, expected):
    (button,) = found(opened, f"[data-filter={key}]")
    assert button.find_element("css selector", "span").text == str(len(expected))
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert sorted(names(opened)) == [f"query/{NASTY}{number}.png" for number in expected]


def test_worst_errors_start_with_the_farthest(opened):
    found(opened, "[data-filter=worst]")[0].click()
    # the lost query's answer lies 200 away, the wrong one's 100
    assert names(opened) == [f"query/{NASTY}{number}.png" for number in (2, 3)]


def test_search_and_right_and_wrong_frames(opened):
    found(opened, "#search")[0].send_keys(f"{NASTY}1.png")
    wait(opened, lambda: "of 5 queries" in found(opened, "#count")[0].text)
    # query 1 by its own name, the others by a candidate's
    assert f"query/{NASTY}1.png" in names(opened)
    found(opened, "#search")[0].clear()
    found(opened, "#search")[0].send_keys("query/" + NASTY.upper() + "1")
    wait(opened, lambda: len(names(opened)) == 1)
    rows = [
        [shot.get_attribute("class").split()[1] for shot in row.find_elements("css selector", ".shot")]
        for row in found(opened, ".row")
    ]
    assert rows == [["wrong", "right", "wrong"], ["right", "wrong", "wrong"]]
    assert found(opened, ".row .under")[0].text == "100 units of the ground truth"


def test_keys_and_the_figure_of_a_pair(opened):
    from selenium.webdriver.common.keys import Keys

    press(opened, "j")
    press(opened, "j")
    assert opened.switch_to.active_element.get_attribute("data-query") == "1"
    press(opened, "k")
    assert opened.switch_to.active_element.get_attribute("data-query") == "0"
    press(opened, Keys.ENTER)
    (dialog,) = found(opened, "#pair")
    assert dialog.get_attribute("open") is not None
    assert found(opened, "#pair-title")[0].text.startswith(f"query/{NASTY}0.png ↔ database/{NASTY}0.png ✓")
    assert len(found(opened, "#pair-figure circle")) == 6  # both ends of three inliers
    assert len(found(opened, "#pair-figure image")) == 2
    press(opened, "o")
    assert not any(path.get_attribute("d") for path in found(opened, "#pair-figure .outlier"))
    found(opened, "#pair-scales button")[0].click()
    assert len(found(opened, "#pair-figure circle")) == 2
    press(opened, Keys.ARROW_RIGHT)
    assert f"database/{NASTY}2.png ✗" in found(opened, "#pair-title")[0].text
    press(opened, Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    press(opened, "2")
    assert names(opened) == [f"query/{NASTY}1.png"]
    press(opened, "/")
    assert opened.switch_to.active_element.get_attribute("id") == "search"


def test_clicking_a_candidate_shows_its_pair(opened):
    found(opened, "article:nth-of-type(4) .row:last-child .shot")[1].click()
    assert found(opened, "#pair-title")[0].text.startswith(f"query/{NASTY}3.png ↔ database/{NASTY}1.png ✗")
    assert "5×5: 1 inlier of 3 matches, score 0.25" in found(opened, "#pair-scales")[0].text
    found(opened, "#pair .close")[0].click()
    assert found(opened, "#pair")[0].get_attribute("open") is None


def test_map_leads_to_a_query(opened):
    found(opened, "#map")[0].click()  # its middle is nearest to no query
    opened.execute_script(
        "const map = document.getElementById('map'), box = map.getBoundingClientRect();"
        "for (let x = box.right; x > box.left + box.width / 2; x -= 2) map.dispatchEvent("
        "new MouseEvent('click', {clientX: x, clientY: box.top + box.height * 0.47}));"
    )
    assert found(opened, "#search")[0].get_attribute("value").startswith("query/")


def test_page_runs_no_code_of_names_and_asks_for_nothing(opened):
    opened.get_log("browser")
    opened.get_log("performance")
    opened.refresh()
    wait(opened, lambda: found(opened, "article"))
    assert opened.get_log("browser") == []  # no error, no blocked request
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        opened.switch_to.alert.dismiss()
    assert len(opened.execute_script("return document.querySelectorAll('script')")) == 3
    addresses = {
        line.split('"url":"')[1].split('"')[0]
        for line in (entry["message"] for entry in opened.get_log("performance"))
        if "Network.requestWillBeSent" in line and '"url":"' in line
    }
    assert {address.split(":")[0] for address in addresses} <= {"file", "data"}


def test_script_in_exif_text_does_not_run(browser, tmp_path):
    harm = "<script>document.title = 'harm'</script><img src=x onerror=\"document.title = 'harm'\">"
    exif = Image.Exif()
    for tag in (
        0x010E,
        0x010F,
        0x0110,
        0x0131,
        0x013B,
        0x8298,
    ):  # description, make, model, software, artist, copyright
        exif[tag] = harm
    report = content(tmp_path)
    for path in (*report.queries.paths, *report.database.paths):
        Image.new("RGB", (40, 30), (90, 90, 60)).save(path, "JPEG", exif=exif, comment=harm.encode())
    write_report(tmp_path / "report.html", report)
    show(browser, tmp_path / "report.html")
    assert "harm" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = browser.execute_script("return [...document.querySelectorAll('img')].map((image) => image.src)")
    assert pictures and all(b"harm" not in base64.b64decode(source.partition(",")[2]) for source in pictures)
    assert browser.title != "harm"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_the_screen_in_both_schemes(browser, page, tmp_path, width, dark):
    show(browser, page, width, 800, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.save_screenshot(str(tmp_path / "screen.png"))
    brightness = np.asarray(Image.open(tmp_path / "screen.png").convert("L"))
    background = np.median(brightness)
    assert background < 60 if dark else background > 200
    assert np.abs(brightness - background).max() > 120  # text that stands out


def test_ten_thousand_queries_stay_light(browser, tmp_path):
    count = 10_000
    few = picture_list(tmp_path, "query", 5)
    numbers = np.arange(count)
    many = replace(
        few,
        names=tuple(f"query/{number:05d}.png" for number in numbers),
        paths=tuple(few.paths[number % 5] for number in numbers),
        feature_names=tuple(f"{number:05d}" for number in numbers),
    )
    places = np.stack([numbers * 10.0, np.zeros(count)], axis=1)
    ranking = np.stack([(numbers + shift) % count for shift in range(5)], axis=1)
    ranking[::3, :2] = ranking[::3, 1::-1]
    scores = np.zeros(ranking.shape)
    stages = {"NetVLAD": ranking, "PatchNetVLAD": ranking}
    big = ReportContent(many, many, stages, dict.fromkeys(stages, scores), {}, GroundTruth(places, places, 5.0))
    write_report(tmp_path / "report.html", big)
    show(browser, tmp_path / "report.html")
    assert found(browser, "#count")[0].text == "10,000 queries"
    assert len(found(browser, "article")) <= 60
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait(browser, lambda: len(found(browser, "article")) > 20)
    assert len(found(browser, "article")) <= 200
    browser.find_element("css selector", "#search").send_keys("/09999")
    wait(browser, lambda: f"query/{count - 1:05d}.png" in names(browser))
    assert len(names(browser)) == 5  # itself, and those it is a candidate of
