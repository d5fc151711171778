"""The service's own pages: HTML files of this folder that need no other."""

import base64
import hashlib
import re
from pathlib import Path

from tools.serve.asgi import Response

HERE = Path(__file__).resolve().parent


def _page(file: str) -> Response:
    text = (HERE / file).read_text(encoding="utf-8")
    headers = (
        (b"content-security-policy", _policy(text).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )
    return Response(text.encode(), b"text/html; charset=utf-8", headers=headers)


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


# The one to try the model, and the one on the paths.
PAGES = {"/": _page("page.html"), "/docs": _page("docs.html")}
