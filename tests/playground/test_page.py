# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, against a stand-in that does what the live server cannot be made to do."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.playground.stand_in import TOKENS, StandIn, kept_at

if TYPE_CHECKING:
    from tests.playground.browser import Page

pytestmark = pytest.mark.browser

CHAT = "/v1/chat/completions"


def test_key_is_asked_for_and_sent_and_kept_nowhere(page: Page, stand_in: StandIn) -> None:
    stand_in.api_key = "open sesame"
    page.open(stand_in.url)
    assert page.text("#page-error") == "Unauthorized: enter the server's API key at the top of the page."
    page.fill("#key", "open sesame")
    page.find("#key-form button").click()
    page.wait(lambda: page.text("#kept").isdigit())
    assert page.text("#page-error") == ""
    page.ask()
    assert page.requests(CHAT)[-1]["headers"]["Authorization"] == "Bearer open sesame"
    script = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    assert "sesame" not in page.driver.execute_script(script)


def test_prune_layer_gives_the_kv_slider(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    stand_in.prune_layer = 8
    stand_in.policy = {"min_kv_keep": 0.25}
    page.open(stand_in.url)
    assert page.text("#kv-keep-value") == "0.50"  # of the preset `balanced`
    assert "decoder layer 7" in page.text("#kv-hint")
    page.slide("#kv-keep", Keys.HOME)
    page.select("#kv-scope", "visual tokens only")
    page.ask()
    headers = page.requests(CHAT)[-2]["headers"]
    assert (headers["X-VTPrune-KV-Keep"], headers["X-VTPrune-KV-Scope"]) == ("0.25", "vision")
    assert page.requests(CHAT)[-1]["headers"]["X-VTPrune-Preset"] == "off"
    assert page.metrics("pruned")["kv_tokens"] == 10


def test_bands_are_drawn_over_depth(page: Page, stand_in: StandIn) -> None:
    stand_in.prune_layer = 8
    stand_in.model = {"decoder_layers": 32, "prune_layers": [{"layer": 8}, {"layer": 24}]}
    stand_in.counts = {"kv_tokens_kept_by_layer": [10, 4]}
    page.open(stand_in.url)
    assert "prune layers 8, 24" in page.text("#facts")
    assert not page.find("#pruned .depth").is_displayed()
    page.ask()
    depth = page.find("#pruned .depth-steps")
    assert depth.get_attribute("aria-label") == (
        "Prompt tokens by depth: layers 0 to 7: 20 tokens; layers 8 to 23: 10 tokens; "
        "layers 24 to 31: 4 tokens"
    )
    script = """
        const steps = [...document.querySelectorAll("#pruned .depth-steps > span")];
        return steps.map((step) => [step.clientWidth, step.lastChild.clientHeight]);
    """
    drawn = page.driver.execute_script(script)
    widths, heights = zip(*drawn, strict=True)
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)
    assert heights[0] > heights[1] > heights[2] > 0


def test_operator_may_keep_the_controls(page: Page, stand_in: StandIn) -> None:
    stand_in.policy = {"client_controls": False}
    page.open(stand_in.url)
    assert not page.find("#aggressiveness").is_enabled()
    assert page.text("#controls-note").startswith("The operator decides")
    page.ask()
    sent = page.requests(CHAT)[-2]["headers"]
    assert [name for name in sent if name.lower().startswith("x-vtprune-")] == []


def test_cap_bounds_the_slider(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    stand_in.policy = {"max_aggressiveness": 0.6}
    page.open(stand_in.url)
    page.slide("#aggressiveness", Keys.END)
    assert page.kept == kept_at(0.6)
    assert stand_in.explained[-1]["aggressiveness"] == 0.6


def test_another_question_is_explained_anew_where_the_method_reads_it(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    def leave(question: str) -> None:
        page.fill("#question", question)
        page.find("#question").send_keys(Keys.TAB)
        page.settle()

    page.open(stand_in.url)
    page.settle()
    before = len(stand_in.explained)
    leave("Where is it?")
    assert len(stand_in.explained) == before
    page.select("#method", "random")
    page.settle()
    assert stand_in.questions[-1] == "Where is it?"
    leave("What color is it?")
    assert stand_in.questions[-1] == "What color is it?"
    assert stand_in.explained[-1]["method"] == "random"


def test_the_operators_default_method_is_the_one_to_begin_with(page: Page, stand_in: StandIn) -> None:
    stand_in.policy = {"default_method": "random", "default_preset": "auto"}
    page.open(stand_in.url)
    page.settle()
    assert stand_in.explained[-1]["method"] == "random"
    assert stand_in.explained[-1]["preset"] == "balanced"


def test_slow_answers_come_one_at_a_time_and_the_last_one_stays(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(stand_in.url)
    stand_in.explain_seconds = 0.4
    stand_in.explained.clear()
    page.slide("#aggressiveness", Keys.HOME, *[Keys.ARROW_RIGHT] * 25)
    assert page.kept == kept_at(0.25)
    assert stand_in.explained[-1]["aggressiveness"] == 0.25
    assert stand_in.at_once == 1
    assert len(stand_in.explained) <= 6  # 26 presses


def test_answer_about_a_picture_that_is_gone_is_dropped(page: Page, stand_in: StandIn) -> None:
    page.open(stand_in.url)
    stand_in.explain_seconds = 0.6
    page.driver.execute_script(
        """
        window.seen = [];
        const watch = () => seen.push(document.getElementById("overlay").getAttribute("aria-label"));
        new MutationObserver(watch).observe(document.getElementById("kept"), {childList: true});
        const samples = document.querySelectorAll(".sample");
        samples[1].click();
        setTimeout(() => samples[2].click(), 300);
        """
    )
    page.wait(lambda: "Four shapes: " in (page.find("#overlay").get_attribute("aria-label") or ""))
    page.settle()
    rated = [label for label in page.driver.execute_script("return seen") if "patches kept" in label]
    assert rated == [f"Four shapes: {kept_at(0.5)} of {TOKENS} patches kept"]


def test_answers_can_be_stopped(page: Page, stand_in: StandIn) -> None:
    stand_in.word_seconds = 60
    page.open(stand_in.url)
    page.find("#ask-button").click()
    page.wait(lambda: page.text("#pruned .answer-text") == "one")
    page.find("#ask-button").click()
    page.wait(lambda: page.text("#ask-button") == "Ask pruned and full")
    assert page.text("#pruned .error") == page.text("#full .error") == "Stopped."
    assert page.text("#pruned .answer-text") == "one"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_picture_can_be_dropped_and_pasted(page: Page, stand_in: StandIn, way: str) -> None:
    page.open(stand_in.url)
    page.driver.execute_script(
        """
        const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 20});
        canvas.toBlob((blob) => {
          const files = new DataTransfer();
          files.items.add(new File([blob], "mine.png", {type: "image/png"}));
          const event = arguments[0] === "drop"
            ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: files, bubbles: true});
          document.body.dispatchEvent(event);
        });
        """,
        way,
    )
    page.wait(lambda: "mine.png: " in (page.find("#overlay").get_attribute("aria-label") or ""))
    kept = page.kept
    overlay = page.find("#overlay")
    assert overlay.get_attribute("aria-label") == f"mine.png: {kept} of {TOKENS} patches kept"
    assert overlay.size["width"] == pytest.approx(2 * overlay.size["height"], abs=1)


def test_error_inside_a_stream_keeps_what_came_before_it(page: Page, stand_in: StandIn) -> None:
    stand_in.break_stream = True
    page.open(stand_in.url)
    page.ask()
    assert page.text("#pruned .answer-text") == "one"
    assert page.text("#pruned .error") == "The engine is on strike."
    assert page.text("#verdict") == ""


def test_several_runs_are_taken_in_turn_past_the_prefix_cache(page: Page, stand_in: StandIn) -> None:
    page.open(stand_in.url)
    page.select("#runs", "3")
    page.ask()
    sent = page.requests(CHAT)[-6:]
    assert [request["headers"].get("X-VTPrune-Preset") == "off" for request in sent] == [False, True] * 3
    assert len({request["body"]["cache_salt"] for request in sent}) == 6
    assert page.text("#verdict").startswith("The same answer with 75 % fewer vision tokens; first token")
    assert "Median of 3 runs of each" in page.text("#verdict")


def test_a_wrong_key_is_told_apart_from_none(page: Page, stand_in: StandIn) -> None:
    stand_in.api_key = "open sesame"
    page.open(stand_in.url)
    page.fill("#key", "open barley")
    page.find("#key-form button").click()
    page.wait(lambda: "refuses" in page.text("#page-error"))
    assert page.text("#page-error") == (
        "The server refuses this API key: enter another one at the top of the page."
    )


def test_controls_wait_until_they_can_act(page: Page, stand_in: StandIn) -> None:
    stand_in.api_key = "open sesame"
    page.open(stand_in.url)
    controls = ("#aggressiveness", "#kv-keep", "#method", "#ask-button")
    assert [name for name in controls if page.find(name).is_enabled()] == []
    page.fill("#key", "open sesame")
    page.find("#key-form button").click()
    page.wait(lambda: page.text("#kept").isdigit())
    assert page.find("#ask-button").is_enabled() and page.find("#aggressiveness").is_enabled()


@pytest.mark.parametrize("change", ["picture", "slider", "kv slider", "method"])
def test_answers_are_greyed_as_soon_as_they_are_about_something_else(
    page: Page, stand_in: StandIn, change: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    stand_in.prune_layer = 8
    page.open(stand_in.url)
    page.ask()
    assert outdated(page) == [] and "fewer vision tokens" in page.text("#verdict")
    if change == "picture":
        page.choose_sample(1)
    elif change == "method":
        page.select("#method", "random")
    else:
        page.slide("#kv-keep" if change == "kv slider" else "#aggressiveness", Keys.ARROW_LEFT)
    assert outdated(page) == ["pruned", "full"]
    assert page.text("#verdict") == "The picture or the settings changed since these answers: ask again."
    page.ask()
    assert outdated(page) == [] and "fewer vision tokens" in page.text("#verdict")


def outdated(page: Page) -> list[str]:
    """The cards that are greyed."""
    script = """return ["pruned", "full"].filter((name) =>
        Number(getComputedStyle(document.querySelector(`#${name} .answer-text`)).opacity) < 1)"""
    names: list[str] = page.driver.execute_script(script)
    return names


def test_an_answer_to_other_settings_is_greyed_when_it_comes(page: Page, stand_in: StandIn) -> None:
    stand_in.word_seconds = 0.5
    page.open(stand_in.url)
    page.find("#ask-button").click()
    page.wait(lambda: page.text("#pruned .answer-text") == "one")
    page.choose_sample(2)
    page.wait(lambda: {page.state("pruned"), page.state("full")} == {"done"})
    page.wait(lambda: page.text("#ask-button") != "Stop")
    assert outdated(page) == ["pruned", "full"]
    assert page.text("#verdict").startswith("The picture or the settings changed")


def test_what_the_demo_model_knows_is_said(page: Page, stand_in: StandIn, tmp_path: Path) -> None:
    page.open(stand_in.url)
    assert page.text("#model-note") == ""
    stand_in.demo = True
    page.open(stand_in.url)
    assert (
        page.text("#model-note")
        == "The demo model knows drawn shapes, as in these samples, and nothing else."
    )
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "mine.png")
    page.choose_file(tmp_path / "mine.png")
    page.wait(lambda: "means nothing" in page.text("#model-note"))


@pytest.mark.parametrize(
    ("method", "presses", "label", "note"),
    [
        ("inflection", 40, "inflection point: rank 10", ""),
        ("inflection", 75, "cut: rank 4", "Past the knee the count is a share of the knee's 7."),
        ("random", 40, "count: 10", "The curve says how many stay, 10; which ones, random decides"),
        ("own_count", 40, "", "own_count counts by a rule of its own"),
        ("inflection", 0, "", "Aggressiveness 0 keeps everything"),
    ],
)
def test_the_curve_says_what_it_decided(
    page: Page, stand_in: StandIn, method: str, presses: int, label: str, note: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(stand_in.url)
    page.select("#method", method)
    page.slide("#aggressiveness", Keys.HOME, *[Keys.ARROW_RIGHT] * presses)
    page.settle()
    labels = [e.text for e in page.driver.find_elements("css selector", "#curve .curve-cut-label")]
    assert labels == ([label] if label else [])
    assert note in page.text("#curve-note") and bool(note) == bool(page.text("#curve-note"))
    knees = [e.text for e in page.driver.find_elements("css selector", "#curve .curve-knee-label")]
    assert knees == (["inflection point: rank 7"] if presses == 75 else [])


def test_merged_patches_are_not_called_dropped(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(stand_in.url)
    page.select("#method", "merging")
    page.settle()
    assert "Dotted: merged into those and into 1 summary token." in page.text("#legend")
    page.find("#overlay").send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.text("#readout").endswith("merged.")


def test_tiles_are_chosen_and_each_has_its_curve(page: Page, stand_in: StandIn) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(stand_in.url)
    page.settle()
    assert not page.find("#part").is_displayed()
    stand_in.tiles = 2
    page.slide("#aggressiveness", Keys.HOME, *[Keys.ARROW_RIGHT] * 40)
    page.settle()
    assert page.find("#part").text.split("\n") == ["Whole picture", "Tile 1", "Tile 2"]
    whole = page.find("#curve").get_attribute("aria-label")
    for number in (1, 2):
        page.select("#part", f"Tile {number}")
        label = page.find("#curve").get_attribute("aria-label")
        assert f"of 4 patches in falling order, cut at rank {number}; {number} patches kept" in label != whole
        assert "Hatched: outside this part of the picture." in page.text("#legend")
        page.find("#overlay").send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
        assert page.text("#readout").startswith("Patch in row 1, column 2: rank 2")
    # other settings, the same tile; another picture, all of it
    page.slide("#aggressiveness", Keys.ARROW_RIGHT)
    page.settle()
    assert "of 4 patches" in page.find("#curve").get_attribute("aria-label")
    stand_in.tiles = 0
    page.slide("#aggressiveness", Keys.ARROW_RIGHT)
    page.settle()
    assert not page.find("#part").is_displayed() and "of 16 patches" in page.find("#curve").get_attribute(
        "aria-label"
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_page_sends_the_file_it_was_given(
    page: Page, stand_in: StandIn, tmp_path: Path, format: str
) -> None:
    file = tmp_path / f"mine.{format.lower()}"
    Image.effect_noise((1500, 700), 60).convert("RGB").save(file, format)
    page.open(stand_in.url)
    page.choose_file(file)
    page.wait(lambda: f"{file.name}: 8 of" in (page.find("#overlay").get_attribute("aria-label") or ""))
    sent = page.requests("/vtprune/explain")[-1]["body"]["image_url"]
    assert sent == f"data:image/{format.lower()};base64,{base64.b64encode(file.read_bytes()).decode()}"


@pytest.mark.parametrize("width", [320, 390, 768, 1360])
def test_page_fits_the_screen(page: Page, stand_in: StandIn, width: int) -> None:
    stand_in.prune_layer = 8
    stand_in.demo = True
    stand_in.tiles = 2
    page.open(stand_in.url, size=(width, 800))
    page.ask()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.driver.execute_script(_CRAMPED) == []


#: Texts that touch another one, stick out of the screen or are cut off, and bars too short to read.
_CRAMPED = """
    const found = [];
    const kinds = "p, span, label, dt, dd, button, output, option, strong, summary, li, h1, h2, text";
    const words = (e) => e.textContent.trim().slice(0, 30);
    const shown = (e) => e.checkVisibility() && getComputedStyle(e).clipPath === "none"
      && e.tagName !== "OPTION" && !e.closest(".visually-hidden, .drop-hint");
    const boxes = [...document.querySelectorAll(kinds)].filter(shown).flatMap((e) => {
      const range = document.createRange();
      const texts = [...e.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
      return texts.flatMap((n) => {
        range.selectNodeContents(n);
        return [...range.getClientRects()].map((r) => [e, r]);
      });
    });
    for (const [e, r] of boxes) {
      if (r.right > innerWidth + 0.5 || r.left < -0.5) found.push(`off screen: ${words(e)}`);
    }
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [[a, p], [b, q]] = [boxes[i], boxes[j]];
      if (a === b || a.contains(b) || b.contains(a)) continue;
      const gap = a.parentElement === b.parentElement ? 4 : 0; // a space between words of one row
      const beside = p.right + gap <= q.left || q.right + gap <= p.left;
      const above = p.bottom <= q.top + 2 || q.bottom <= p.top + 2;
      if (!beside && !above) found.push(`${words(a)} | ${words(b)}`);
    }
    for (const select of document.querySelectorAll("select")) {
      const width = select.getBoundingClientRect().width;
      if (select.checkVisibility() && width < 60) found.push(`narrow: ${select.id} ${width}`);
    }
    for (const bar of document.querySelectorAll(".bar")) {
      if (bar.getBoundingClientRect().width < 60) found.push("a bar too short to read");
    }
    return found;
"""


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(page: Page, stand_in: StandIn) -> None:
    stand_in.prune_layer = 8
    page.open(stand_in.url)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "slider", "textbox", "combobox", "radio", "spinbutton", "image", "DisclosureTriangle"}
    controls = [n for n in nodes if not n.get("ignored") and n["role"]["value"] in roles]
    assert len(controls) > 15
    assert [n["role"]["value"] for n in controls if not n.get("name", {}).get("value")] == []

    reached = {page.tab() for _ in range(40)}
    assert {"overlay", "file", "aggressiveness", "kv-keep", "method", "question", "ask-button"} <= reached


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(page: Page, stand_in: StandIn, dark: bool) -> None:
    """WCAG 2's contrast of at least 4.5 for text, by the colours the page computes."""
    page.open(stand_in.url, dark=dark)
    page.ask()
    colours = page.driver.execute_script(
        """
        const kinds = "h1 span, h2, p, label, li, dt, dd, small, button, output, summary";
        const opaque = (element) => {
          for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
          }
        };
        const texts = [...document.querySelectorAll(kinds)].filter((e) => e.textContent.trim());
        const shown = texts.filter((e) => e.checkVisibility() && !e.closest(":disabled"));
        return shown.map((e) => [e.textContent.trim().slice(0, 30), getComputedStyle(e).color, opaque(e)]);
        """
    )
    assert len(colours) > 30
    assert [text for text, front, back in colours if _contrast(front, back) < 4.5] == []


def _contrast(front: str, back: str) -> float:
    light, dark = sorted((_luminance(front), _luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
