"""Errors that a frontend answers by itself, written as vLLM writes its own."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse


def error_answer(status: HTTPStatus, message: str, param: str | None = None) -> JSONResponse:
    """Return the answer that says what is wrong.

    param: of the request, be it a header, whose fault it is; None if it is no single one's.
    """
    kind = status.phrase.title().replace(" ", "") + "Error"
    error = {"message": message, "type": kind, "param": param, "code": status.value}
    return JSONResponse({"error": error}, status)
