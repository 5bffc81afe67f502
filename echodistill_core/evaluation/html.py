"""Self-contained HTML pages from Jinja templates: no scripts, no network access, light and dark colour schemes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"  # base.html.j2 and style.css, which all pages share


def render(template: Path, **context: Any) -> str:
    """The page of a template file, which may extend base.html.j2 and include files of its folder.

    context: the template's variables. Strings are escaped, except for `markupsafe.Markup`.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**context)


def data_uri(picture: Image.Image, kind: str) -> str:
    """The picture as a data URI. kind: "png", which is lossless, or "webp", which is a tenth of its size."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
