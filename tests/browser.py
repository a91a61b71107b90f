"""The browser of the tests, which are skipped where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from scenario import environment

from bench.browser import NoBrowserError, Page, chromium

__all__ = ["Page", "browser"]


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A real Chromium with one page."""
    with contextlib.ExitStack() as stack:
        try:
            page = stack.enter_context(chromium(environment()))
        except NoBrowserError as error:
            pytest.skip(str(error))
        yield page
