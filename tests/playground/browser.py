# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium with the playground open: what a user does on the page, and what the page shows."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
_SECONDS = 60
_DESKTOP = (1360, 900)


def missing() -> str | None:
    """Why no browser can be started on this machine; None where one can."""
    if _chromium() is None or shutil.which("chromedriver") is None:
        return "no Chromium with its chromedriver here (on Debian: apt-get install chromium chromium-driver)"
    return None


def _chromium() -> str | None:
    return next((path for name in _CHROMIUM if (path := shutil.which(name))), None)


class Page:
    """The playground in a browser of its own.

    Args:
        profile: an empty folder for the browser's profile.
    """

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = _chromium() or ""
        for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self._requests: list[dict[str, Any]] = []

    def open(self, server: str, size: tuple[int, int] = _DESKTOP, dark: bool = False) -> None:
        """Load the page afresh and wait until the server has rated its first picture."""
        self.resize(size, dark)
        self.driver.get_log("performance")  # of the page before, whose requests cannot be read any more
        self._requests.clear()
        self.driver.get(f"{server}/playground")
        self.wait(lambda: self.text("#kept").isdigit() or self.text("#page-error"))

    def resize(self, size: tuple[int, int], dark: bool = False) -> None:
        """Emulate a screen of `size` CSS pixels and a colour scheme."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def quit(self) -> None:
        """Close the browser."""
        self.driver.quit()

    # ---- what a user does

    def choose_sample(self, number: int) -> None:
        """Click a sample picture, from 0."""
        self.driver.find_elements(By.CSS_SELECTOR, ".sample")[number].click()
        self.settle()

    def choose_file(self, path: Path) -> None:
        """Choose a picture of one's own."""
        self.find("#file").send_keys(str(path))

    def tab(self) -> str:
        """Press the tabulator key; the id of what has the focus now."""
        ActionChains(self.driver).send_keys(Keys.TAB).perform()
        return str(self.driver.execute_script("return document.activeElement.id"))

    def slide(self, slider: str, *keys: str) -> None:
        """Press keys on a slider, one after the other without waiting."""
        self.find(slider).send_keys(*keys)

    def select(self, selector: str, text: str) -> None:
        """Choose an entry of a drop-down list."""
        Select(self.find(selector)).select_by_visible_text(text)

    def fill(self, selector: str, text: str) -> None:
        """Type into a field in place of what it holds."""
        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text)

    def ask(self, question: str | None = None) -> None:
        """Ask, and wait until both answers are there or have failed."""
        if question is not None:
            self.fill("#question", question)
        self.find("#ask-button").click()
        self.wait(lambda: {self.state("pruned"), self.state("full")} <= {"done", "failed"})
        self.wait(lambda: self.text("#ask-button") != "Stop")

    # ---- what the page shows

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Its visible text; empty where it is hidden."""
        return self.find(selector).text

    def state(self, side: str) -> str | None:
        """`data-state` of the card `pruned` or `full`."""
        return self.find(f"#{side}").get_attribute("data-state")

    def metrics(self, side: str) -> dict[str, float]:
        """The numbers of a card, by name."""
        shown = self.driver.find_elements(By.CSS_SELECTOR, f"#{side} dd[data-value]")
        named = [(e.get_attribute("data-metric"), e.get_attribute("data-value")) for e in shown]
        return {str(name): float(value or "nan") for name, value in named}

    @property
    def kept(self) -> int:
        """The vision tokens kept, as the page says once it is up to date."""
        self.settle()
        return int(self.text("#kept"))

    def settle(self) -> None:
        """Wait until the picture shows what the server says of the settings as they are."""
        self.wait(lambda: self.find("#overlay").get_attribute("aria-busy") is None)

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it did not within a minute.
        """
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except StaleElementReferenceException:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"the page did not get there: {self.find('body').text}")

    # ---- what left the browser and what went wrong in it

    def requests(self, path: str = "") -> list[dict[str, Any]]:
        """Every request since the page was opened whose URL ends so: `url`, `headers`, and `body` as JSON."""
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self._requests.append(self._request(event["params"]))
        return [request for request in self._requests if request["url"].endswith(path)]

    def _request(self, event: dict[str, Any]) -> dict[str, Any]:
        request = event["request"]
        body = None
        if request.get("hasPostData"):
            sent = {"requestId": event["requestId"]}
            body = json.loads(self.driver.execute_cdp_cmd("Network.getRequestPostData", sent)["postData"])
        return {"url": request["url"], "headers": request["headers"], "body": body}

    def console_errors(self) -> list[str]:
        """Errors in the console since the last call: scripts', the content policy's, failed loads."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = {"captureBeyondViewport": True, "clip": clip}
        png = self.driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
        path.write_bytes(base64.b64decode(png))
