"""How report.html, bench.html, compare.html and bench.png look: colours that stand out, letters that can be read.

In a browser where there is one, by scripts/screenshots.py.
"""

import contextlib
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.text
import pytest

from fasttune import metrics, plots, report
from fasttune.bench import files
from fasttune.bench.stats import Limit
from fasttune.tools import compare_page
from tests.test_bench_page import make_arm, make_bench
from tests.test_compare import example
from tests.test_report import make_result, make_steps

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "screenshots.py"
TEMPLATES = ROOT / "fasttune" / "templates"
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0  # WCAG 2.2, AA: 1.4.3 and 1.4.11, https://www.w3.org/TR/WCAG22/
PHONE_PX = 390


# colours


def luminance(colour: str) -> float:
    """Of #rrggbb, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def schemes() -> dict[str, dict[str, str]]:
    """The variables of the page's CSS, in the light and the dark scheme."""
    css = (TEMPLATES / "page.css.j2").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    found = {name: dict(re.findall(r"--(\w+): (#\w{6});", text)) for name, text in (("light", light), ("dark", dark))}
    assert len(re.findall("#[0-9a-f]{3,}", css)) == sum(map(len, found.values())), "a colour that is no variable"
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(scheme: str) -> None:
    colours = schemes()[scheme]
    for name in ("ink", "soft", "good", "bad", "warn"):
        for ground in ("paper", "note"):
            assert contrast(colours[name], colours[ground]) >= TEXT_CONTRAST, (name, ground)
    for name in ("accent", "pale", "bad", "warn", "soft", "ink"):
        assert contrast(colours[name], colours["paper"]) >= LINE_CONTRAST, name


def test_pictures_have_the_colours_of_the_page_and_no_others(pages: dict[str, Path]) -> None:
    assert {name: colour for colour, name in plots.VARIABLES.items()}.items() <= schemes()["light"].items()
    assert set(re.findall(r"color: var\(--(\w+)\)", css := read(TEMPLATES))) <= {"ink", "soft", "good", "bad"}, css
    for page in pages.values():
        for picture in re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'"[^"]*url.*?"|(id|href)="[^"]*"', "", picture))


def read(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.j2")))


# pictures


def wild_bench(*speeds: list[float], limit: float | None = 400.0, **changes: Any) -> Any:
    names = ("fasttune", "vanilla", "hf-tuned", "unsloth-notebook")
    arms = [make_arm(name, *of_arm, **changes) for name, of_arm in zip(names, speeds, strict=False)]
    return make_bench(*arms, limit=Limit(0.4, 1e9, limit, metrics.FLOPS_FORMULA, {}) if limit else None)


WILD = {
    "one repeat far above": wild_bench([150, 153, 180, 181, 5000], [86, 87, 90, 118, 119]),
    "bars short, dots far": wild_bench([1, 1, 1, 1, 1e6], [1, 1, 1, 1, 9e5], [1, 1, 1, 1, 1e6], limit=None),
    "from one end to the other": wild_bench([1e-3, 100, 1e7], [1e-3, 1e7, 1e7], limit=3e6),
    "all alike": wild_bench([777_777.0] * 5, [777_777.0] * 5, limit=777_777.0),
    "limit far away": wild_bench([9.0] * 5, [8.0] * 5, limit=123_456_789.0),
    "long words": make_bench(
        make_arm("fasttune", failure="CUDA out of memory. Tried to allocate 20.00 GiB. " * 9),
        make_arm("an-arm-with-a-very-long-name-" * 6, 1, 2, 3000),
        make_arm("vanilla", 1),
        model="Some-Company/" + "A-Model-With-A-Very-Long-Name-" * 4,
    ),
    "many arms": make_bench(*[make_arm(f"{2**n} processes", 10.0 * n + 1, 300) for n in range(9)], limit=None),
}


@pytest.mark.parametrize("bench", WILD.values(), ids=WILD)
def test_no_label_leaves_a_picture_of_a_benchmark(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, draw, pictures = list[Any](), matplotlib.text.Text.draw, 0

    def recorded(text: Any, renderer: Any) -> None:
        if text.get_text() and text.get_visible():
            texts.append(text)
        draw(text, renderer)

    def checked(drawn: Any) -> Any:
        def check(figure: Any) -> Any:
            nonlocal pictures
            pictures, made = pictures + 1, drawn(figure)
            check_labels(figure, {text: text.get_window_extent() for text in texts if text.figure is figure})
            return made

        return check

    monkeypatch.setattr(matplotlib.text.Text, "draw", recorded)
    for name in ("png", "svg"):
        monkeypatch.setattr(plots, name, checked(getattr(plots, name)))
    files.write(bench, tmp_path)
    assert pictures >= 3 and len(texts) >= 3 * len(bench.arms)


def check_labels(figure: Any, boxes: dict[Any, Any]) -> None:
    """All inside of the picture, none on another."""
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text} outside"
    for (one, box), (other, beside) in itertools.combinations(boxes.items(), 2):
        apart = box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
        assert apart, f"{one} on {other}"


def test_differences_of_losses_are_those_that_parity_is_about() -> None:
    base = {"losses": [2.0, 1.0, 0.5, 0.25]}
    arms = [make_arm("fasttune", 9, 9), make_arm("vanilla", 5, 5, **base), make_arm("hf-tuned", 6, **base)]
    for repeat, last in zip(arms[0].repeats, (0.2501, 0.24995), strict=True):
        repeat.losses[:] = [2.0, 1.0005, 0.5, last]
    bench = make_bench(*arms)
    apart = files.loss_differences(bench)
    assert apart == {"fasttune": pytest.approx([0, 5e-4, 0, 4e-4]), "hf-tuned": [0.0] * 4}
    assert max(apart["fasttune"]) == bench.over_baseline["fasttune"].largest_loss_difference
    plot = files.losses(bench)
    assert plot is not None and "no point where nothing differs; equal to the last bit: hf-tuned" in plot.note
    assert plot.spoken == "Difference from vanilla: fasttune at most 0.05 %, at step 2; hf-tuned none in any step"
    for svg in (plot.narrow, plot.wide):
        assert ">fasttune<" in svg and ">tolerance 0.1 %<" in svg and ">0.01 %<" in svg


def test_learning_rates_are_written_alike_on_their_axis() -> None:
    drawn = plots.line_plot([1, 2, 3], [[1e-4, 5e-5, 1e-5]], from_zero=True)
    assert ">5e-5<" in drawn and ">1e-4<" in drawn and ">0<" in drawn and "0.0001" not in drawn
    assert ">1,500<" in plots.line_plot([1, 2], [[0.0, 1500.0]])


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0, float("nan")], [1.0] * 3])
def test_losses_that_cannot_be_compared_are_not_drawn(losses: list[float]) -> None:
    arms = [make_arm("fasttune", 9, losses=losses), make_arm("vanilla", 5)]
    assert files.losses(make_bench(*arms)) is None


def make_pages(folder: Path) -> list[Path]:
    steps = make_steps(56)
    warnings, sample = ["mind this"], metrics.Sample("p" * 300, "reference", "before " * 30, "after")
    report.write_html(folder / "report.html", make_result(folder, steps, warnings=warnings, samples=[sample]), steps)
    files.write(WILD["one repeat far above"], folder)
    compare_page.write(example(folder, one="a-run-with-a-name-as-long-as-they-are-20261120-101500"), folder)
    return [folder / name for name in ("report.html", "bench.html", "compare.html")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.stem: path for path in make_pages(tmp_path_factory.mktemp("pages"))}


# in a browser


@pytest.fixture(scope="module")
def screenshots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(screenshots: ModuleType) -> Iterator[Any]:
    path = screenshots.find()
    if path is None:
        pytest.skip(screenshots.MISSING)
    try:
        opened = screenshots.Browser(path)
    except EOFError as error:
        pytest.skip(f"{path}: {error}")
    with contextlib.closing(opened):
        yield opened


LETTERS = """
[...document.querySelectorAll("svg text")].filter(text => text.getBoundingClientRect().width).map(text => {
  const box = text.getBoundingClientRect(), around = text.ownerSVGElement.getBoundingClientRect();
  const inside = box.left >= around.left - 1 && box.right <= around.right + 1;
  return [text.textContent, parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a, inside];
})"""
TOO_WIDE = """
[...document.querySelectorAll("*")].filter(each => each.clientWidth && each.scrollWidth > each.clientWidth + 1
  && !each.closest("svg")).map(each => each.tagName + "." + each.className)"""
COLOURS = """
(() => {
  const ground = each => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (colour != "rgba(0, 0, 0, 0)") return colour;
    }
  };
  const found = {text: {}, line: {}}, rule = getComputedStyle(document.body).getPropertyValue("--rule").trim();
  const seen = [...document.querySelectorAll("body *")].filter(each => each.getBoundingClientRect().width);
  for (const each of seen) {
    const style = getComputedStyle(each), drawn = each.ownerSVGElement;
    if ([...each.childNodes].some(node => node.nodeType == 3 && node.textContent.trim()))
      found.text[[drawn ? style.fill : style.color, ground(each)]] = each.textContent.trim().slice(0, 40);
    if (each.tagName == "path" && !each.getAttribute("style").includes("--rule") && style.stroke != "none")
      found.line[[style.stroke, ground(each)]] = each.getAttribute("style");
  }
  return found;
})()"""


def hexadecimal(colours: str) -> list[str]:
    """rgb(1, 2, 3),rgb(4, 5, 6) → two of #rrggbb."""
    numbers = [int(number) for number in re.findall(r"\d+", colours)]
    assert len(numbers) == 6, colours
    return ["#" + bytes(numbers[at : at + 3]).hex() for at in (0, 3)]


@pytest.mark.parametrize("width_px", [PHONE_PX, 360])
@pytest.mark.parametrize("name", ["report", "bench", "compare"])
def test_a_phone_shows_every_letter_and_scrolls_only_down(
    name: str, width_px: int, browser: Any, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width_px, "light")
    assert browser.value("innerWidth") == width_px
    assert browser.value("document.documentElement.scrollWidth") <= width_px
    assert browser.value(TOO_WIDE) == []
    letters = browser.value(LETTERS)
    assert len(letters) > 5
    assert [each for each in letters if each[1] < 11 or not each[2]] == []
    stacked = "[...document.querySelectorAll('tr')].filter(row => getComputedStyle(row).display == 'table-row').length"
    assert browser.value(stacked) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "bench", "compare"])
def test_what_a_browser_shows_stands_out(name: str, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    browser.open(pages[name], 1280, scheme)
    found = browser.value(COLOURS)
    assert len(found["text"]) >= 3 and found["line"]
    for kind, least in (("text", TEXT_CONTRAST), ("line", LINE_CONTRAST)):
        for colours, what in found[kind].items():
            assert contrast(*hexadecimal(colours)) >= least, (kind, what, colours)
    assert [each for each in browser.value(LETTERS) if each[1] < 11 or not each[2]] == []


def test_the_script_takes_pictures_of_the_whole_page(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<meta name=viewport content='width=device-width'><body style='margin: 0; height: 2000px'>")
    command = [sys.executable, str(SCRIPT), str(page), "--out", str(tmp_path / "new")]
    subprocess.run(command, check=True, capture_output=True)
    sizes = {}
    for path in (tmp_path / "new").iterdir():
        image = path.read_bytes()
        sizes[path.name] = (int.from_bytes(image[16:20]), int.from_bytes(image[20:24]))
    schemes = ("light", "dark")
    assert sizes == {f"page-{width}-{scheme}.png": (width, 2000) for width in (1280, PHONE_PX) for scheme in schemes}


def test_the_script_says_where_there_is_no_browser(tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "page.html"), "--out", str(tmp_path / "new")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("skipped: no browser on the path (chromium, ") and not (tmp_path / "new").exists()
