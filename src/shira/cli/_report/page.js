// SPDX-License-Identifier: Apache-2.0
// Draws the heat maps, and lets one be looked at closely. Names only ever become text.
"use strict";
(() => {
  const maps = JSON.parse(document.getElementById("maps").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const viewer = document.getElementById("viewer");
  const large = document.getElementById("large");
  const readout = document.getElementById("readout");
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // 256 colours of a byte: none, then from low to high
  function palette() {
    const style = getComputedStyle(document.documentElement);
    const [none, low, high] = ["none", "low", "high"].map((name) => {
      const hex = style.getPropertyValue(`--map-${name}`).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    });
    return Array.from({ length: 256 }, (_, byte) =>
      byte ? low.map((value, i) => Math.round(value + (high[i] - value) * byte / 255)) : none);
  }

  function cells(map) {
    map.bytes ??= Uint8Array.from(atob(map.cells), (c) => c.charCodeAt(0));
    return map.bytes;
  }

  // the map in its own resolution: a pixel for each part of the weight
  function paint(canvas, map, colours) {
    canvas.width = Math.max(map.across, 1);
    canvas.height = Math.max(map.down, 1);
    if (!map.across || !map.down) return;
    const context = canvas.getContext("2d");
    const image = context.createImageData(map.across, map.down);
    cells(map).forEach((byte, at) => image.data.set([...colours[byte], 255], 4 * at));
    context.putImageData(image, 0, 0);
  }

  // what is seen of the map: its left top corner and size, all as shares of the map
  let shown = 0, source = document.createElement("canvas");
  let view = { x: 0, y: 0, size: 1 };
  const closest = (map) => Math.min(1, 8 / Math.max(map.across, map.down, 1));

  function draw() {
    const map = maps[shown];
    const box = large.getBoundingClientRect();
    const scale = devicePixelRatio || 1;
    large.width = Math.max(1, Math.round(box.width * scale));
    large.height = Math.max(1, Math.round(box.height * scale));
    view.size = clamp(view.size, closest(map), 1);
    view.x = clamp(view.x, 0, 1 - view.size);
    view.y = clamp(view.y, 0, 1 - view.size);
    const context = large.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(source, view.x * source.width, view.y * source.height,
      view.size * source.width, view.size * source.height, 0, 0, large.width, large.height);
    viewer.dataset.zoom = (1 / view.size).toFixed(2);
  }

  function zoom(factor, atX = 0.5, atY = 0.5) {
    const size = clamp(view.size / factor, closest(maps[shown]), 1);
    view.x += atX * (view.size - size);
    view.y += atY * (view.size - size);
    view.size = size;
    draw();
  }

  function move(x, y) {
    view.x += x * view.size;
    view.y += y * view.size;
    draw();
  }

  const percent = (share) => `${(100 * share).toPrecision(3).replace(/\.?0+$/, "")} %`;
  const range = (part, parts, size) => {
    const first = Math.ceil(part * size / parts), last = Math.ceil((part + 1) * size / parts) - 1;
    return first === last ? `${first}` : `${first} to ${last}`;
  };

  function tell(x, y) {
    const map = maps[shown];
    if (!map.across || !map.down) return;
    const col = clamp(Math.floor((view.x + x * view.size) * map.across), 0, map.across - 1);
    const row = clamp(Math.floor((view.y + y * view.size) * map.down), 0, map.down - 1);
    const share = cells(map)[row * map.across + col] / 255 * map.top;
    readout.textContent = `rows ${range(row, map.down, map.rows)}, columns ` +
      `${range(col, map.across, map.cols)}: ${share ? "about " + percent(share) : "none"} trained`;
  }

  function show(number) {
    shown = (number + maps.length) % maps.length;
    const map = maps[shown];
    view = { x: 0, y: 0, size: 1 };
    document.getElementById("name").textContent = map.name;
    readout.textContent =
      `${map.rows} x ${map.cols}, at most ${percent(map.top)} of a part are trained`;
    large.style.aspectRatio = clamp(map.cols / Math.max(map.rows, 1), 0.8, 2.5);
    paint(source, map, palette());
    if (!viewer.open) viewer.showModal();
    draw();
  }

  const doing = {
    back: () => show(shown - 1), on: () => show(shown + 1),
    in: () => zoom(2), out: () => zoom(0.5), whole: () => zoom(0), close: () => viewer.close(),
  };
  const keys = {
    "+": doing.in, "=": doing.in, "-": doing.out, 0: doing.whole,
    ArrowLeft: () => move(-0.2, 0), ArrowRight: () => move(0.2, 0),
    ArrowUp: () => move(0, -0.2), ArrowDown: () => move(0, 0.2),
  };
  for (const button of document.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => doing[button.dataset.do]());
  }
  viewer.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });

  // pointers that are down: one moves the map, two zoom it
  const down = new Map();
  const place = (event) => {
    const box = large.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const apart = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  large.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, place(event));
    if (event.isTrusted) large.setPointerCapture(event.pointerId);
    tell(...place(event));
  });
  large.addEventListener("pointermove", (event) => {
    const now = place(event), before = down.get(event.pointerId);
    if (before && down.size === 1) move(before[0] - now[0], before[1] - now[1]);
    const width = down.size === 2 ? apart([...down.values()]) : 0;
    if (before) down.set(event.pointerId, now);
    if (width) {
      const [a, b] = [...down.values()];
      zoom(apart([a, b]) / width || 1, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    } else {
      tell(...now);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    large.addEventListener(end, (event) => down.delete(event.pointerId));
  }
  large.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-clamp(event.deltaY, -200, 200) / 300), ...place(event));
    tell(...place(event));
  }, { passive: false });

  function drawAll() {
    const colours = palette();
    const buttons = document.querySelectorAll("[data-map]");
    for (const button of buttons) {
      paint(button.querySelector("canvas"), maps[button.dataset.map], colours);
    }
    if (viewer.open) {
      paint(source, maps[shown], colours);
      draw();
    }
    document.documentElement.dataset.drawn = buttons.length;
  }
  for (const button of document.querySelectorAll("[data-map]")) {
    button.addEventListener("click", () => show(Number(button.dataset.map)));
  }
  dark.addEventListener("change", drawAll);
  addEventListener("resize", () => viewer.open && draw());
  drawAll();
})();
