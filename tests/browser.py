"""The browser of the tests, which are skipped where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from scenario import environment

from bench.browser import NoBrowserError, Page, chromium

__all__ = ["Page", "browser", "too_faint"]


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A real Chromium with one page."""
    with contextlib.ExitStack() as stack:
        try:
            page = stack.enter_context(chromium(environment()))
        except NoBrowserError as error:
            pytest.skip(str(error))
        yield page


def too_faint(page: Page) -> list[str]:
    """What of a page can't be told from its ground, in a dark or in a light theme."""
    found = []
    for colours in ("dark", "light"):
        page.prefer(colours)
        found += [f"{colours}: {each}" for each in page.run(_TOO_FAINT)]
    return found


_TOO_FAINT = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (part) => (part /= 255, part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const ground = (element) => {
    const own = parse(getComputedStyle(element).backgroundColor);
    return (own[3] ?? 1) === 1 || !element.parentElement ? own : over(own, ground(element.parentElement));
  };
  const shown = (element) => element.getClientRects().length > 0 && !element.closest(":disabled, [aria-disabled=true]");
  const faint = [];
  document.body.getBoundingClientRect(); // transitions to the theme begin with this, and end here
  for (const each of document.getAnimations()) if (each.effect.getComputedTiming().endTime !== Infinity) each.finish();
  const check = (what, colour, under, least) => {
    const found = contrast(over(colour, under), under);
    if (!(found >= least)) faint.push(`${what}: ${found.toFixed(2)}`);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !shown(element)) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    check(texts.currentNode.textContent.trim(), parse(colour), ground(element), 4.5);
  }
  for (const element of document.querySelectorAll("input, button")) {
    if (shown(element)) check(element.outerHTML, parse(getComputedStyle(element).borderTopColor), ground(element.parentElement), 3);
  }
  for (const element of document.querySelectorAll("[placeholder]")) {
    if (shown(element)) check(element.placeholder, parse(getComputedStyle(element, "::placeholder").color), ground(element), 4.5);
  }
  for (const element of document.querySelectorAll("rect[data-state]")) {
    check(element.dataset.state, parse(getComputedStyle(element).fill), ground(element.ownerSVGElement.parentElement), 3);
  }
  for (const element of document.querySelectorAll(".legend li, td [data-state]")) {
    check(element.dataset.state, parse(getComputedStyle(element, "::before").backgroundColor), ground(element), 3);
  }
  return faint;
})()
"""
"""Texts below a contrast of 4.5, edges of what is typed or pressed and parts of pictures below 3: WCAG 2.2, AA."""
