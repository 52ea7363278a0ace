"""``GET /``: the page, three files that need no key and fetch nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

PAGE_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Path → file of the package and what it is."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The routes of the page; they are no part of the API, and its schema does not have them."""
    router = APIRouter()
    for path, (name, kind) in PAGE_FILES.items():
        router.add_api_route(path, _file(name, kind), response_class=Response, include_in_schema=False)
    return router


def _file(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (files("randbasis.serve") / "page" / name).read_bytes()
    headers = {**_HEADERS, "Content-Type": kind}

    async def answer() -> Response:
        return Response(content, headers=headers)

    return answer
