"""The HTTP interface as a FastAPI application: routes, their description in OpenAPI, and the pages for a browser."""

import sys
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from .uploads import Refused, check_fields

_VERSION = sys.modules[__package__.rpartition(".")[0]].__version__
RETRY_S = 1  # Retry-After of a 503
_PAGES = Path(__file__).with_name("page")
# the pages may run their own script and ask this service; nothing else is loaded from anywhere
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "Accept",
}
_ABOUT = """
Image classification with one backbone and any number of adapters. Requests for different adapters that arrive together
share a forward of the model. A request that is answered with 408, 500, 502, 503 or 504 may be sent again.
Where the service has API keys, requests bring one in the header Authorization: Bearer KEY.
"""


class Score(BaseModel):
    label: str = Field(description="name of the class, or its index if it has no name")
    index: int
    score: float = Field(description="probability, from 0 to 1")


class Answer(Score):
    adapter: str | None
    scores: list[Score] = Field(description="the best classes, the best first")


class Description(BaseModel):
    model: str
    classes: int = Field(description="classes of the model without an adapter; 0 if it has none")
    adapters: list[str] = Field(description="names of the adapters that can be asked for")
    loaded: dict[str, int] = Field(description="adapters in the memory of the replica that answered, and their bytes")
    in_use: dict[str, int] = Field(description="adapters and requests that this replica works on")
    limits: dict[str, int]


class Problem(BaseModel):
    error: str = Field(description="what was expected, and what came")


def _problems(**statuses: str) -> dict:
    return {int(name[1:]): {"model": Problem, "description": text} for name, text in statuses.items()}


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PARAMETERS = {
    "adapter": {"type": "string", "description": "name of an adapter; without it the model answers without one"},
    "top": {"type": "integer", "minimum": 1, "maximum": 100_000, "default": 5, "description": "number of scores"},
}
_UPLOAD = {
    "parameters": [
        {"name": n, "in": "query", "schema": s} | {"description": s["description"]} for n, s in _PARAMETERS.items()
    ],
    "requestBody": {
        "required": True,
        "description": "a JPEG, PNG or WebP file, as the body or as the field image of a form",
        "content": {
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": _BINARY["schema"]} | _PARAMETERS,
                }
            },
        },
    },
}


def build(service: Callable) -> FastAPI:
    """The application. ``service()`` is the replica that answers a request, with the methods classify, describe and
    check_key of app.EFFTClassifier.
    """
    api = FastAPI(title="EFFT adapters", version=_VERSION, description=_ABOUT, docs_url=None, redoc_url=None)
    api.add_middleware(_WithSlash)
    api.add_exception_handler(Refused, lambda _, error: refusal(error.status, str(error)))
    api.add_exception_handler(HTTPException, lambda _, error: refusal(error.status_code, error.detail))

    @api.post(
        "/",
        summary="Classify an image",
        response_description="the best classes",
        response_model=Answer,
        openapi_extra=_UPLOAD,
        responses=_problems(
            _400="a field is missing, unknown or malformed",
            _401="no API key, or an unknown one",
            _404="no such adapter",
            _408="the image did not arrive in time",
            _413="too many bytes or pixels",
            _415="not a JPEG, PNG or WebP file",
            _422="the image, or the adapter's file, cannot be used",
            _503="too many requests, or the service is stopping",
        ),
    )
    async def classify(request: Request):
        return JSONResponse(await service().classify(request))

    @api.get(
        "/",
        summary="Describe the service",
        response_model=Description,
        response_description="JSON, or for a browser the page that classifies images",
        responses={200: {"content": {"text/html": {}}}}
        | _problems(_400="a parameter: it has none", _401="no API key, or an unknown one"),
    )
    async def describe(request: Request):
        if "text/html" in request.headers.get("accept", ""):
            return _page("index.html")
        service().check_key(request)
        check_fields(request.query_params, ())
        return JSONResponse(service().describe(), headers={"vary": "Accept"})

    @api.get(
        "/health",
        summary="Whether the service takes requests",
        response_description="it does",
        responses=_problems(_503="it is stopping"),
    )
    async def health():
        if service().stopping:
            raise Refused(503, "the service is stopping")
        return {"status": "serving"}

    @api.get("/docs", include_in_schema=False)
    async def docs():
        return _page("docs.html")

    return api


def _page(name: str) -> HTMLResponse:
    """A file of the folder page/."""
    return HTMLResponse((_PAGES / name).read_text(encoding="utf-8"), headers=_HEADERS)


def refusal(status: int, sentence: str) -> JSONResponse:
    """The answer to a request that is refused."""
    headers = {503: {"retry-after": str(RETRY_S)}, 405: {"allow": "GET, POST"}, 401: {"www-authenticate": "Bearer"}}
    return JSONResponse({"error": sentence}, status, headers.get(status))


class _WithSlash:
    """Answers at /NAME as at /NAME/: a redirect would lose the body of a POST for many clients."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ("", scope.get("root_path", "")):
            scope = scope | {"path": scope["path"] + "/"}
        await self.app(scope, receive, send)
