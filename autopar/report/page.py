"""A document as one page of HTML that loads nothing: scripts, styles and libraries are inside.

The document is JSON in the page; its scripts make text of it, never HTML. A content security policy with the hashes of
the scripts lets no other script run, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from string import Template

from autopar.report.bundled import libraries
from autopar.report.document import Document

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("dom.js", "view.js", "mesh.js", "modules.js", "block.js", "charts.js", "text.js", "page.js")
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}  # in the JSON of a script element


def page_of(document: Document) -> str:
    """The page, as the text of an HTML file."""
    models = " and ".join(dict.fromkeys(report.model for report in document.reports))
    meshes = " against ".join(report.mesh for report in document.reports)
    own = "(() => {\n" + "\n".join(_read(name) for name in SCRIPTS) + "})();\n"
    scripts = [*(library.text() for library in libraries()), own]
    return Template(_read("page.html")).substitute(
        title=escape(f"{models} on {meshes}"),
        hashes=" ".join(_hash(script) for script in scripts),
        style=_read("style.css"),
        footer="Written by autopar report. Bytes are counted from the graphs that ranks run; nothing was run.",
        licences=escape("\n\n".join(library.licence_text() for library in libraries())),
        document=json.dumps(document.to_json(), separators=(",", ":")).translate(UNSAFE),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The source of a content security policy that allows this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
