"""The service's own pages: HTML files of this folder that need no other."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

HERE = Path(__file__).resolve().parent


def add_pages(app: FastAPI) -> None:
    """Add the page to try the model, and the one on the paths."""
    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        text = (HERE / file).read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": _policy(text),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        page = HTMLResponse(text, headers=headers)
        app.add_api_route(path, _always(page), include_in_schema=False)


def _always(page: HTMLResponse) -> Callable[[], Awaitable[HTMLResponse]]:
    async def answer() -> HTMLResponse:
        return page

    return answer


def _policy(page: str) -> str:
    """A page may run its own scripts and ask its own host, nothing else."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
