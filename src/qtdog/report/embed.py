"""Putting data, scripts and pictures into one HTML file, safely."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

# in JSON these stand in strings only, and in HTML they could end the element that holds the JSON
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def asset(name: str) -> str:
    """Return the text of a file of `report/assets`."""
    return (resources.files("qtdog") / "report" / "assets" / name).read_text()


def json_for_html(value: Any) -> Markup:
    r"""Return JSON that can stand in a `<script type="application/json">`: no string in it can end the element.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.

    Example:
        >>> print(json_for_html({"name": "</script><img src=x>"}))
        {"name":"\u003c/script\u003e\u003cimg src=x\u003e"}
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup("".join(ESCAPES.get(character, character) for character in text))


def csp_hash(text: str) -> Markup:
    """Return the source expression by which a content security policy allows just this script or style.

    Example:
        >>> csp_hash("")
        Markup("'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='")
    """
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")


def data_uri(png: Path) -> str:
    """Return a PNG as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def link(path: Path, page: Path) -> str:
    """Return the relative address of a file from the page that names it; no name in it can be read as anything else.

    Example:
        >>> link(Path("runs/a b/result.json"), Path("runs/report.html"))
        'a%20b/result.json'
        >>> link(Path("javascript:x"), Path("report.html"))
        'javascript%3Ax'
    """
    return quote(os.path.relpath(path, page.parent))
