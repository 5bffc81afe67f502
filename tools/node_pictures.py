"""Takes a screenshot of every node from a running ComfyUI, as web/docs/img/<node>.png.

    python -m tools.node_pictures http://127.0.0.1:8188

Requires playwright and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from .comfyui import get
from .locales import CATEGORY

FOLDER = Path(__file__).parents[1] / "web" / "docs" / "img"
MARGIN = 12

ADD = """name => {
    app.graph.clear();
    const node = LiteGraph.createNode(name);
    node.pos = [120, 120];
    app.graph.add(node);
    app.canvas.ds.offset = [0, 0];
    app.canvas.ds.scale = 1;
    node.setSize([Math.max(360, node.size[0]), node.computeSize()[1]]);
    app.canvas.setDirty(true, true);
    return [node.size[0], node.size[1]];
}"""


def main() -> None:
    """Take the screenshots."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="of a running ComfyUI with this pack, http://127.0.0.1:8188")
    server = parser.parse_args().server
    names = [name for name, node in get(server, "object_info").items() if node["category"] == CATEGORY]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 2200})
        page.goto(server)
        page.wait_for_function("() => { try { return !!app.graph && !!app.extensionManager } catch { return false } }")
        page.wait_for_timeout(4000)
        page.keyboard.press("Escape")
        for name in names:
            width, height = page.evaluate(ADD, name)
            page.wait_for_timeout(1500)
            box = page.locator("canvas#graph-canvas").bounding_box()
            assert box is not None
            page.screenshot(
                path=FOLDER / f"{name}.png",
                clip={
                    "x": box["x"] + 120 - MARGIN,
                    "y": box["y"] + 120 - 30 - MARGIN,
                    "width": width + 2 * MARGIN,
                    "height": height + 30 + 2 * MARGIN,
                },
            )
        browser.close()


if __name__ == "__main__":
    main()
