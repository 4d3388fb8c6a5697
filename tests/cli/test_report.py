# SPDX-License-Identifier: Apache-2.0
"""`shira report`: what the page says, that nothing can be injected, and how a browser shows it."""

from __future__ import annotations

import importlib.util
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shira import Adapter, SparseDelta, Support
from shira.cli import report
from shira.cli.report.gather import mask_map, side, training_curve
from shira.cli.report.page import ENVIRONMENT
from shira.masks import random_support
from shira.store.compact import COMPACT_NAME
from tests.cli.browser import look, need_browser
from tests.cli.page_checks import FAULTS, WAYS_TO_ZOOM

SHAPES = {f"model.layers.{i}.{kind}.weight": (40, 24) for i in range(3) for kind in ("up", "down")}
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"alert(1)\">'\x00&"


def make(folder, slot=0, metadata=None, rename=lambda name: name):
    deltas = {}
    for name, shape in SHAPES.items():
        support = random_support(shape, 48, seed=5, name=name, slot=slot)
        values = torch.linspace(-1, 1, 48) * 0.1
        values[:5] = 1e-9  # too small for a bfloat16 1.0, as is the least positive of the others
        deltas[rename(name)] = SparseDelta(support, values)
    folder.mkdir()
    metadata = {"mask_type": "random", "random_seed": 5, **(metadata or {})}
    Adapter(deltas, metadata).save(folder / COMPACT_NAME, "compact")
    return folder


@pytest.fixture
def two(tmp_path):
    return [make(tmp_path / name, slot) for slot, name in enumerate(("poems", "code"))]


@pytest.fixture
def base(tmp_path):
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, tmp_path / "base.st")
    return tmp_path / "base.st"


@pytest.fixture
def written(shira, two, base, tmp_path):
    """A page with everything on it."""
    history = [{"step": step, "loss": 2.0 / step} for step in range(1, 9)]
    history.append({"step": 8, "eval_loss": 0.5})
    (two[0] / "metrics.json").write_text(json.dumps({"history": history}))
    answer = shira("report", *two, "--base", base, "-o", tmp_path / "report.html")
    assert (answer.status, answer.err) == (0, "")
    return tmp_path / "report.html"


class Outline(HTMLParser):
    """Elements and attributes of a page, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if not self.tags or self.tags[-1] not in ("script", "style"):
            self.text += data + "\n"


def test_the_page_says_what_inspect_and_overlap_say(written, two):
    page = written.read_text(encoding="utf-8")
    text = Outline(page).text
    assert "288 in 6 weights, density 5.00%" in text
    assert "36 of 288 deltas other than zero (12.5%)" in text
    for words in ("poems", "code", *SHAPES, "Overlap", "AWOM", "From metrics.json."):
        assert words in text
    for question, answer in (
        ("What is it?", "Mask: mask_type random, random_seed 5."),
        ("How large is it?", "288 entries in 6 weights, 5.00% of these weights"),
        ("What does it change?", "on average, at most 0.1, most in model.layers"),
        ("Does it clash?", "Not with code: they share no entry."),
    ):
        assert re.search(f"{re.escape(question)}\\s+.*{re.escape(answer)}", text)
    assert text.index("What is it?") < text.index("Overlap") < text.index("Weights")
    assert page.count("<svg") == 4 + 5  # values, sizes, ranks, lost; and one training curve
    maps = json.loads(re.search(r'id="maps">(.*?)</script>', page)[1])
    assert [made["name"] for made in maps] == [name for path in two for name in Adapter.load(path)]


def test_unlike_heads_are_a_clash(shira, headed, tmp_path):
    folder, _ = headed
    page = tmp_path / "page.html"
    answer = shira(
        "report", folder / "poems", folder / "code", folder / "law", "--fast", "-o", page
    )
    assert answer.status == 0, answer.err
    clashes = re.findall(r"Does it clash\?</th><td>(.*?)</td>", page.read_text(encoding="utf-8"))
    told = "Each replaces &#39;score.weight&#39; by a tensor of its own."
    assert [told in clash for clash in clashes] == [True, False, True, False, False, False]
    assert not any(clash.startswith("Not") and told in clash for clash in clashes)


def test_the_page_loads_nothing(written):
    page = written.read_text(encoding="utf-8")
    outline = Outline(page)
    assert not {"link", "img", "iframe", "base", "object", "embed", "form"} & set(outline.tags)
    assert not {"src", "href", "action", "onclick", "onload"} & {
        key for key, _ in outline.attributes
    }
    assert "://" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src &#x27;none&#x27;" in page


def test_the_same_adapters_give_the_same_page(shira, two, tmp_path):
    for name in ("a.html", "b.html"):
        assert shira("report", *two, "--fast", "-o", tmp_path / name).status == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_fast_leaves_out_ranks_and_interference(shira, two, tmp_path):
    assert shira("report", *two, "--fast", "-o", tmp_path / "fast.html").status == 0
    text = Outline((tmp_path / "fast.html").read_text(encoding="utf-8")).text
    assert "Rank of the deltas" not in text
    assert "jaccard" in text
    assert "needs --base" in text
    assert "Lost to rounding" not in text


def test_one_adapter_has_no_overlap(shira, two, tmp_path):
    assert shira("report", two[0], "-o", tmp_path / "one.html").status == 0
    assert "Overlap" not in Outline((tmp_path / "one.html").read_text(encoding="utf-8")).text


def test_a_log_that_could_be_of_either_adapter_is_of_neither(shira, two, tmp_path):
    page = tmp_path / "page.html"
    for number, path in enumerate(two):
        (path / COMPACT_NAME).rename(tmp_path / f"{number}.safetensors")
    (tmp_path / "metrics.json").write_text('{"history": [{"step": 1, "loss": 1.0}]}')
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for given, drawn in ((files, False), (files[:1], True), (files[:1] * 2, True)):
        assert shira("report", *given, "--fast", "-o", page).status == 0
        assert ("From metrics.json." in page.read_text(encoding="utf-8")) == drawn


def test_mistakes_are_named_and_an_old_page_stays(shira, two, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("old")
    for arguments, words in (
        ((two[0], tmp_path / "gone", "-o", page), "no such file or folder"),
        ((two[0], "-o", tmp_path / "no" / "page.html"), "there is no folder"),
        ((two[0], "-o", tmp_path), "holds"),
    ):
        answer = shira("report", *arguments)
        assert answer.status == 2
        assert words in answer.err
    assert page.read_text() == "old"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_what_is_missing_is_named(shira, two, tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == package else find(name))
    answer = shira("report", two[0], "-o", tmp_path / "page.html")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == f"error: shira report needs {package}: pip install {package}\n"


def hostile_page(shira, tmp_path):
    metadata = {"mask_type": HOSTILE, "base_model_name_or_path": HOSTILE, HOSTILE: HOSTILE}
    one, other = (
        make(
            tmp_path / f"{slot}<b onclick=alert(1)>",
            slot,
            metadata,
            lambda name: HOSTILE[:-3] + name,
        )
        for slot in (0, 1)
    )
    (one / "trainer_state.json").write_text(
        '{"log_history": "</script><img src=x onerror=alert(1)>' + "\\ud800"
    )
    assert shira("report", one, other, "-o", tmp_path / "hostile.html").status == 0
    return tmp_path / "hostile.html"


def test_nothing_that_comes_from_a_file_becomes_markup(shira, tmp_path):
    page = hostile_page(shira, tmp_path).read_text(encoding="utf-8")
    outline = Outline(page)
    assert outline.tags.count("script") == 2  # the maps, and the script
    assert not {"img", "b"} & set(outline.tags)
    assert not {key for key, _ in outline.attributes if key.startswith("on")}
    assert "onerror" in outline.text  # it is there, as text
    assert "Not drawn:" in outline.text


def test_every_text_is_escaped():
    page = ENVIRONMENT.from_string('<p title="{{ text }}">{{ text }}</p>')
    assert page.render(text='a<b>"&') == (
        '<p title="a&lt;b&gt;&#34;&amp;">a&lt;b&gt;&#34;&amp;</p>'
    )
    assert page.render(text="a\x00\u202eb").endswith(r">a\x00\u202eb</p>")
    block = ENVIRONMENT.from_string("{{ value | tojson }}")
    assert "</" not in block.render(value=["</script>", "<!--"])
    assert json.loads(block.render(value=["</script>", "\u2028"])) == ["</script>", "\u2028"]


@pytest.mark.parametrize(
    ("shape", "most"), [((7, 5), 3), ((40, 24), 384), ((1000, 6), 384), ((9,), 4)]
)
def test_maps_hold_every_entry(shape, most):
    support = random_support(shape, 5, seed=1, name="w")
    made = mask_map("w", support, most)
    rows, cols, down, across = (made[key] for key in ("rows", "cols", "down", "across"))
    cells = np.frombuffer(b64decode(made["cells"]), np.uint8).reshape(down, across)
    assert max(down, across) <= most
    wanted = np.zeros((down, across), bool)
    for index in support.indices.tolist():
        row, col = divmod(index, cols)
        wanted[row * down // rows, col * across // cols] = True
    assert np.array_equal(cells > 0, wanted)
    assert cells.max() == 255


def test_maps_of_nothing_and_of_many():
    empty = mask_map("w", Support((4, 4), torch.zeros(0, dtype=torch.int64)), 8)
    assert (empty["top"], b64decode(empty["cells"])) == (0.0, bytes(16))
    assert mask_map("w", Support((0, 4), torch.zeros(0, dtype=torch.int64)), 8)["cells"] == ""
    assert side(1) == 384
    assert side(200) == 102
    assert side(10**6) == 24


LARGEST, TINY = 1.7976931348623157e308, 5e-324


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [0.0, 0.0, 0.5],
        [LARGEST],
        [LARGEST, -LARGEST, 1.0],
        [1e308] * 9,
        [TINY],
        [TINY, -TINY, 0.0],
        [2.3e-308, LARGEST],
    ],
)
def test_adapters_with_hardly_anything_or_extreme_values_are_drawn(shira, tmp_path, values):
    support = Support((4, 4), torch.arange(len(values)))
    delta = SparseDelta(support, torch.tensor(values, dtype=torch.float64))
    Adapter({"w.weight": delta}).save(tmp_path / "a", "compact")
    answer = shira("report", tmp_path / "a", tmp_path / "a", "-o", tmp_path / "page.html")
    assert (answer.status, answer.err) == (0, "")
    page = (tmp_path / "page.html").read_text()
    body = re.sub("<script.*", "", page, flags=re.DOTALL).lower().split("<body>")[1]
    assert "nan" not in body
    drawn = re.findall(r'[ (]([a-z0-9]+)="([^"]*)"', body)
    assert not [(key, value) for key, value in drawn if "inf" in value]
    bars = body.count('class="s0 bar"')
    assert bars == 2 * len(
        {(v > 0) - (v < 0) if abs(v) == abs(max(values, key=abs)) else 0 for v in values}
    )
    for key, value in drawn:
        if key in ("cx", "cy", "x", "y", "width", "height"):
            assert -1 <= float(value) <= 401
    pairs = shira("overlap", tmp_path / "a", tmp_path / "a", "--figure", "awom", "--json", "--rank",
                  "--plot", tmp_path / "a.png")  # fmt: skip
    assert (pairs.status, pairs.err) == (0, "")
    json.loads(pairs.out, parse_constant=pytest.fail)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_either_log(tmp_path):
    assert training_curve(tmp_path) is None
    rows = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": 3},
        {"step": 3, "loss": "x"},
        7,
        {"loss": 1},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    curve = training_curve(tmp_path / "adapter_model.safetensors")  # a file: beside it
    assert (curve.file, curve.series) == (
        "trainer_state.json",
        {"training loss": [(1.0, 3.0), (2.0, 1.0)]},
    )
    (tmp_path / "metrics.json").write_text('{"accuracy": 1}')  # somebody else's
    assert training_curve(tmp_path).file == "trainer_state.json"
    many = [{"step": step, "loss": 1.0} for step in range(2500)]
    (tmp_path / "metrics.json").write_text(json.dumps({"history": many}))
    curve = training_curve(tmp_path)
    assert (curve.file, curve.every, len(curve.series["training loss"])) == ("metrics.json", 3, 834)
    (tmp_path / "metrics.json").write_text("{")
    assert training_curve(tmp_path).file == "trainer_state.json"
    (tmp_path / "trainer_state.json").unlink()
    assert "not valid JSON" in training_curve(tmp_path).problem


LOOKS = """
  const root = page.documentElement, viewer = page.getElementById("viewer");
  page.querySelectorAll("[data-map]")[4].click();
  const large = page.getElementById("large"), box = large.getBoundingClientRect();
  const before = viewer.dataset.zoom;
  const at = {clientX: box.left + 3, clientY: box.top + 3, bubbles: true, cancelable: true};
  large.dispatchEvent(new view.WheelEvent("wheel", {...at, deltaY: -200}));
  const after = viewer.dataset.zoom, told = page.getElementById("readout").textContent;
  const size = viewer.getBoundingClientRect();
  const pixels = [...large.getContext("2d").getImageData(0, 0, large.width, large.height).data];
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) colours.add(pixels.slice(i, i + 4).join());
  page.querySelector('[data-do="on"]').click();
  const next = page.getElementById("name").textContent;
  page.querySelector('[data-do="close"]').click();
  return {drawn: root.dataset.drawn, before, after, told, next, colours: colours.size,
    fits: size.left >= 0 && size.right <= view.innerWidth, open: viewer.open,
    paper: view.getComputedStyle(page.body).backgroundColor, title: page.title};
"""


windows = pytest.mark.parametrize(
    ("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)]
)


@windows
@pytest.mark.parametrize("hostile", [False, True], ids=["ordinary", "hostile"])
def test_the_page_fits_can_be_read_and_asks_for_nothing(
    request, shira, tmp_path, width, dark, hostile
):
    need_browser()
    page = hostile_page(shira, tmp_path) if hostile else request.getfixturevalue("written")
    seen = look(page, tmp_path, FAULTS, width=width, dark=dark)
    assert seen.console == []
    looked = seen.found.pop("looked")
    assert seen.found == {"requests": [], "wide": 0, "faint": []}
    assert looked["text"] > 300
    assert looked["marks"] > 60


@windows
def test_a_browser_shows_it(written, two, tmp_path, width, dark):
    need_browser()
    seen = look(written, tmp_path, LOOKS, width=width, dark=dark)
    assert seen.console == []
    found = seen.found
    assert isinstance(found, dict), found
    assert found["drawn"] == "12"
    assert (found["before"], float(found["after"])) == ("1.00", pytest.approx(1.95, abs=0.01))
    assert re.fullmatch(r"rows 0, columns 0: (none|about 100 %) trained", found["told"])
    assert found["colours"] == 2  # entries of one each: none or all
    assert found["next"] == list(Adapter.load(two[0]))[5]
    assert found["fits"]
    assert not found["open"]
    brightness = sum(map(int, re.findall(r"\d+", found["paper"])[:3]))
    assert brightness < 150 if dark else brightness > 600


def test_a_heat_map_can_be_looked_at_closely(written, two, tmp_path):
    need_browser()
    seen = look(written, tmp_path, WAYS_TO_ZOOM, width=390)
    assert seen.console == []
    assert isinstance(seen.found, dict), seen.found
    zooms = {name: zoom for name, zoom, _ in seen.found["seen"]}
    inks = {name: ink for name, _, ink in seen.found["seen"]}
    assert zooms == {
        "open": 1, "in": 2, "in again": 4, "right": 4, "left": 4, "down": 4, "drag": 4, "let go": 4,
        "out": 2, "whole": 1, "plus": 2, "whole button": 1, "pinch": 2, "as near as it goes": 5,
    }  # fmt: skip
    assert inks["open"] == inks["whole"] == inks["whole button"]
    assert inks["plus"] == inks["in"]
    assert inks["left"] == inks["in again"] != inks["right"]
    assert inks["drag"] == inks["let go"]
    assert len({inks[name] for name in ("open", "in", "in again", "right", "down", "drag")}) == 6
    assert seen.found["name"] == list(Adapter.load(two[1]))[-1]  # before the first stands the last


def test_a_browser_runs_nothing_of_a_hostile_file(shira, tmp_path):
    need_browser()
    script = (
        "page.querySelector('[data-map]').click();"
        "return {title: page.title, images: page.images.length, scripts: page.scripts.length,"
        "drawn: page.documentElement.dataset.drawn, name: page.getElementById('name').textContent}"
    )
    seen = look(hostile_page(shira, tmp_path), tmp_path, script, width=390)
    assert seen.console == []
    assert seen.found["title"].endswith("shira report")
    assert (seen.found["images"], seen.found["scripts"], seen.found["drawn"]) == (0, 2, "12")
    assert seen.found["name"].startswith("</script><script>document.title=")


def test_the_browser_tests_see_what_is_wrong(tmp_path):
    need_browser()
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><script>null.x</script><body style='margin: 0; background: #111'>"
        "<p style='color: #333'>faint</p><p style='color: #999; width: 391px'>wide</p>"
        "<svg class=s0><text style='fill: #444' y=9>faint too</text><rect class=bar width=9 "
        "height=9 style='fill: #222'></rect></svg><img src='http://127.0.0.1:9/picture.png'>"
    )
    seen = look(page, tmp_path, FAULTS, width=390)
    assert "TypeError" in seen.console[0]
    assert seen.found["requests"] == ["http://127.0.0.1:9/picture.png"]
    assert seen.found["wide"] == 1
    assert [fault.partition(":")[0] for fault in seen.found["faint"]] == [
        "faint P.null",
        "faint too text.null",
        " rect.bar",
    ]
