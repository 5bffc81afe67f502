"""A reader of HTML pages, as a browser would read them."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "link", "input", "hr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "action"}


class Reader(HTMLParser):
    """The content of a page; fails where tags are not closed in order.

    text     str: all text outside of styles
    tags     set of str
    loads    list of str: every address that the page loads or links to, except places in the page itself
    images   list of (alt, (H, W, 3) uint8): the embedded PNGs
    """

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.loads, self.tags, self._pictures = [], "", [], set(), []
        self.feed(page)
        self.close()
        assert self.open == []

    @property
    def images(self):
        return [
            (alt, np.array(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))
            for alt, data in self._pictures
        ]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in LOADING and not value.startswith("#")]
        found = dict(attributes)
        if tag == "img" and found["src"].startswith("data:image/png"):
            self._pictures.append((found.get("alt"), found["src"].removeprefix("data:image/png;base64,")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
