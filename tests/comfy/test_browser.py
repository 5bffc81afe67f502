"""The front end in a headless Chromium: template browser, Run, pictures, text on nodes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tools.workflows import FOLDER, WORKFLOWS

pytest.importorskip("playwright", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)")

TEMPLATE = "1 Learn a toy without downloads"
# ECHODISTILL_SCREENSHOTS: a folder for screenshots of a full training (one minute), for the README.
SCREENSHOTS = os.environ.get("ECHODISTILL_SCREENSHOTS", "")
ITERATIONS = 200 if SCREENSHOTS else 4
SHOWN = "() => app.graph._nodes.filter(n => n.type == 'PreviewImage').every(n => n.imgs && n.imgs.length)"


@pytest.fixture(scope="module")
def page(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1920, "height": 1080})
        page.set_default_timeout(90_000)
        page.goto(f"http://127.0.0.1:{server.port}")
        page.wait_for_function("() => window.app && window.app.extensionManager")
        page.wait_for_function("() => { try { return !!app.graph } catch { return false } }")
        page.wait_for_timeout(2000)
        yield page
        browser.close()


def screenshot(page, name):
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


def test_the_pack_lists_its_templates_in_their_order(page):
    """The server names them as the disk does."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("ComfyUI-EchoDistill").first.click()
    page.get_by_test_id(f"template-workflow-{TEMPLATE}").wait_for()
    cards = page.locator("[data-testid^='template-workflow-']").all()
    assert [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards] == list(WORKFLOWS)
    page.keyboard.press("Escape")
    page.wait_for_timeout(1000)


@pytest.fixture(scope="module")
def opened(page):
    """The template, opened by hand: template browser, the pack's entry, the card with its thumbnail."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("ComfyUI-EchoDistill").first.click()
    card = page.get_by_test_id(f"template-workflow-{TEMPLATE}")
    card.wait_for()
    page.wait_for_function(
        f"() => [...document.querySelectorAll('[data-testid=\"template-workflow-{TEMPLATE}\"] img')]"
        ".some(i => i.naturalWidth > 100)"
    )
    screenshot(page, "templates")
    card.locator("img").first.click()
    page.wait_for_function("() => app.graph._nodes.some(n => n.type == 'EchoDistillTrain')")
    page.wait_for_timeout(2000)
    return page


def test_every_node_of_the_template_is_known_and_wired(opened):
    """The front end draws unknown nodes red and leaves unknown inputs unconnected."""
    nodes = opened.evaluate(
        "app.graph._nodes.map(n => ({type: n.type, known: !!n.constructor.nodeData || n.type == 'MarkdownNote',"
        " free: (n.inputs || []).filter(i => i.link == null && !i.widget).map(i => i.name)}))"
    )
    assert all(node["known"] for node in nodes), nodes
    # The image input of One-Step Sample is optional.
    free = {(node["type"], name) for node in nodes for name in node["free"]}
    assert free <= {("OneStepSample", "image")}


def test_widgets_have_the_values_that_the_workflow_names(opened):
    values = opened.evaluate(
        "Object.fromEntries(app.graph._nodes.find(n => n.type == 'EchoDistillTrain')"
        ".widgets.map(w => [w.name, w.value]))"
    )
    assert values["iterations"] == 200
    assert values["preview_every"] == 20
    assert values["teacher_lr"] == -1
    assert values["share_text_encoder"] == "auto"


def test_advanced_inputs_are_folded_away_and_saved_all_the_same(opened):
    shown = (
        "() => app.graph._nodes.find(n => n.type == 'EchoDistillTrain').widgets.filter(w => !w.hidden).map(w => w.name)"
    )
    folded = opened.evaluate(shown)
    assert "iterations" in folded
    assert "teacher_lr" not in folded
    saved = "() => app.graph.serialize().nodes.find(n => n.type == 'EchoDistillTrain').widgets_values"
    committed = json.loads((FOLDER / f"{TEMPLATE}.json").read_text(encoding="utf-8"))["nodes"]
    (expected,) = [node["widgets_values"] for node in committed if node["type"] == "EchoDistillTrain"]
    assert opened.evaluate(saved) == expected
    press = "() => app.graph._nodes.find(n => n.type == 'EchoDistillTrain').widgets.at(-1).callback()"
    opened.evaluate(press)
    assert "teacher_lr" in opened.evaluate(shown)
    assert opened.evaluate(saved) == expected
    opened.evaluate(press)
    assert opened.evaluate(shown) == folded


def set_widget(page, node, widget, value):
    page.evaluate(
        "([n, k, v]) => app.graph._nodes.find(m => m.type == n).widgets.find(w => w.name == k).value = v",
        [node, widget, value],
    )


def run(page):
    page.get_by_role("button", name="Run", exact=True).first.click()


TEXT = """type => (app.graph._nodes.find(n => n.type == type).widgets
    .find(w => w.name == '$$node-text-preview') || {value: null}).value"""
HEIGHT = "type => app.graph._nodes.find(n => n.type == type).size[1]"


@pytest.mark.parametrize(
    ("widget", "value", "right", "words"),
    [
        ("folder", "gone", "none", "input folder"),  # refused before anything runs
        ("placeholder", "dog", "<new1>", "placeholder"),  # by the node itself
    ],
)
def test_an_error_is_shown_on_the_node_which_grows_for_it(opened, widget, value, right, words):
    node = "LoadReferenceImages"
    committed = json.loads((FOLDER / f"{TEMPLATE}.json").read_text(encoding="utf-8"))["nodes"]
    (without_text,) = [n["size"][1] for n in committed if n["type"] == node]
    set_widget(opened, node, widget, value)
    run(opened)
    opened.wait_for_function(f"type => (({TEXT})(type) || '').includes(`{words}`)", arg=node)
    opened.wait_for_timeout(500)
    assert opened.evaluate(HEIGHT, node) > without_text
    opened.keyboard.press("Escape")  # the older front end's dialog
    opened.wait_for_timeout(500)
    set_widget(opened, node, widget, right)


def test_run_trains_and_shows_pictures(opened):
    opened.evaluate(
        "n => app.graph._nodes.find(m => m.type == 'EchoDistillTrain').widgets"
        ".find(w => w.name == 'iterations').value = n",
        ITERATIONS,
    )
    opened.evaluate(
        "() => app.graph._nodes.find(m => m.type == 'EchoDistillTrain').widgets"
        ".find(w => w.name == 'preview_every').value = 2"
        if not SCREENSHOTS
        else "() => 0"
    )
    run(opened)
    if SCREENSHOTS:
        opened.wait_for_timeout(25_000)
        opened.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        opened.wait_for_timeout(1000)
        screenshot(opened, "training")
    opened.wait_for_function(SHOWN, timeout=600_000)
    opened.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    opened.wait_for_timeout(3000)
    screenshot(opened, "graph")
    text = opened.evaluate(
        "app.graph._nodes.find(n => n.type == 'EchoDistillTrain').widgets.map(w => String(w.value)).join('\\n')"
    )
    assert f"{ITERATIONS} iterations" in text
    # The error texts of the test before are cleared.
    assert "5 photographs of a" in opened.evaluate(TEXT, "LoadReferenceImages")
    errors = opened.evaluate("app.lastNodeErrors ? Object.keys(app.lastNodeErrors).length : 0")
    assert errors == 0


def test_a_reminder_does_not_shrink_the_prompt_and_is_cleared(opened):
    """Regression: it shrank the prompt to one line and stayed after a run without a reminder."""
    node = "OneStepSample"
    before = opened.evaluate(HEIGHT, node)
    rows = "() => [...document.querySelectorAll('textarea')].find(t => t.value.startsWith('photo')).clientHeight"
    prompt_height = opened.evaluate(rows)
    set_widget(opened, node, "prompt", "photo of a mug in the snow")
    run(opened)
    opened.wait_for_function(f"type => (({TEXT})(type) || '').includes('no learned subject')", arg=node)
    opened.wait_for_timeout(1000)
    assert opened.evaluate(HEIGHT, node) > before
    assert opened.evaluate(rows) >= prompt_height
    set_widget(opened, node, "prompt", "photo of a <new1> mug in the snow")
    run(opened)
    opened.wait_for_function(f"type => ({TEXT})(type) === null", arg=node)
    assert opened.evaluate(HEIGHT, node) == before
