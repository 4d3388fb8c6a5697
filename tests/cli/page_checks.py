# SPDX-License-Identifier: Apache-2.0
"""Scripts for `tests.cli.browser.look`: what is wrong with a page, whatever it shows."""

from __future__ import annotations

# Contrasts as WCAG 2 defines them (success criteria 1.4.3 and 1.4.11): 4.5 for text, 3 for what
# else has to be seen. A canvas draws one pixel to turn any CSS colour into bytes.
FAULTS = """
  const dot = page.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const bytes = (colours) => {
    dot.clearRect(0, 0, 1, 1);
    for (const colour of colours) { dot.fillStyle = colour; dot.fillRect(0, 0, 1, 1); }
    return [...dot.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.unshift(view.getComputedStyle(at).backgroundColor);
    }
    return layers;
  };
  const light = (pixel) => pixel.slice(0, 3)
    .map((byte) => byte / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (element, colour) => {
    const under = behind(element), [a, b] = [light(bytes(under)), light(bytes([...under, colour]))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const faint = [], looked = {text: 0, marks: 0};
  for (const element of page.body.querySelectorAll("*")) {
    if (!element.getClientRects().length || element.closest("script, style")) continue;
    const style = view.getComputedStyle(element), drawn = element.closest("svg");
    const words = [...element.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
    const told = (what) => `${what} ${element.tagName}.${element.getAttribute("class")}`;
    if (words.length && element.tagName !== "title") {
      const found = contrast(element, drawn ? style.fill : style.color);
      looked.text += 1;
      if (found < 4.5) faint.push(`${told(words[0].data)}: ${found.toFixed(2)}`);
    } else if (element.matches(".bar, .line, .point, .key")) {
      const inside = style.stroke === "none" ? style.fill : style.stroke;
      const found = contrast(element.parentElement, drawn ? inside : style.borderColor);
      looked.marks += 1;
      if (found < 3) faint.push(`${told("")}: ${found.toFixed(2)}`);
    }
  }
  const root = page.documentElement;
  return {
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    wide: Math.max(root.scrollWidth, page.body.scrollWidth) - view.innerWidth,
    faint, looked,
  };
"""
"""Requests that the page made; CSS pixels by which it is wider than the window; what is too faint
on its ground, and how many texts and marks were looked at."""

WAYS_TO_ZOOM = """
  const viewer = page.getElementById("viewer"), large = page.getElementById("large");
  const press = (name) => page.querySelector(`[data-do="${name}"]`).click();
  const key = (name) => viewer.dispatchEvent(new view.KeyboardEvent("keydown", {key: name}));
  const copy = page.createElement("canvas");
  const ink = () => {
    Object.assign(copy, {width: large.width, height: large.height});
    const context = copy.getContext("2d", {willReadFrequently: true});
    context.drawImage(large, 0, 0);
    return context.getImageData(0, 0, copy.width, copy.height).data
      .reduce((sum, byte, at) => (31 * sum + byte * (at % 251)) % 1000003, 0);
  };
  const point = (kind, id, x, y) => {
    const box = large.getBoundingClientRect();
    large.dispatchEvent(new view.PointerEvent(kind, {pointerId: id, bubbles: true,
      clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
  };
  const seen = [], note = (name) => seen.push([name, Number(viewer.dataset.zoom), ink()]);
  page.querySelector("[data-map]").click(); note("open");
  press("in"); note("in");
  press("in"); note("in again");
  key("ArrowRight"); note("right");
  key("ArrowLeft"); note("left");
  key("ArrowDown"); note("down");
  point("pointerdown", 1, 0.6, 0.6); point("pointermove", 1, 0.3, 0.5); note("drag");
  point("pointerup", 1, 0.3, 0.5); point("pointermove", 1, 0.9, 0.9); note("let go");
  press("out"); note("out");
  key("0"); note("whole");
  key("+"); note("plus");
  press("whole"); note("whole button");
  point("pointerdown", 1, 0.4, 0.5); point("pointerdown", 2, 0.6, 0.5);
  point("pointermove", 2, 0.8, 0.5); note("pinch");
  point("pointerup", 1, 0.4, 0.5); point("pointerup", 2, 0.8, 0.5);
  for (let i = 0; i < 40; i++) press("in");
  note("as near as it goes");
  press("back");
  return {seen, name: page.getElementById("name").textContent, size: [large.width, large.height]};
"""
"""What each way to move in a heat map leaves: its name, the zoom, and a checksum of the pixels."""
