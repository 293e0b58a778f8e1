"""Reports: complete, self-contained, and the same figures everywhere."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.charts import coefficients_chart
from evaluation.compare import compare_groups
from evaluation.comparison import Entry
from evaluation.contenders import Contender, Group
from evaluation.report import write_report
from evaluation.svg import Chart, Series, color_class, heat_map
from solvers.named import named_solver
from tests.evaluation.helpers import Mixture, compare_args, group, spaces

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one = group(Mixture(), ["ddim:3", "unipc:3", "unipc:6", "ddpm:5"])
    two = Group(
        Contender("ddim:12", one.reference.table, one.reference.denoiser, 2.0),
        tuple(Contender(c.name, c.table, c.denoiser, 2.0) for c in one.contenders[:2]),
    )
    rows = compare_groups([one, two], compare_args(folder, num_samples=16), spaces())
    return folder / "out", rows


class Page(HTMLParser):
    """Checks that tags are balanced; collects rows, images and links to elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.count, self.outside = [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(report):
    text = (report[0] / "report.html").read_text()
    page = Page(text)
    assert page.outside == []
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    assert page.count["tr"] == 1 + len(report[1])
    assert page.count["img"] == len(report[1])
    assert page.count["details"] == 5
    # Two Pareto charts and a trajectory chart per guidance scale, two pictures per solver.
    assert page.count["svg"] == 2 * 3 + 2 * 5
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_the_page_and_the_markdown_hold_the_figures(report):
    folder, rows = report
    text, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for row in rows:
        assert f'data-value="{row["fd"]}"' in text
        assert f"{row['fd']:.4g}" in markdown
    assert markdown.count("\n| ") == 1 + len(rows)
    best = min((row for row in rows if not row["is_reference"] and row["guidance"] == 1), key=lambda row: row["rmse"])
    assert f"losest to ddim:12 is <b>{best['solver']}</b>" in text


def test_the_picture_has_a_row_per_solver_and_shows_the_images(report):
    folder, rows = report
    picture = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    height = picture.shape[0] / len(rows)
    assert height == int(height)
    # At guidance 1 and 2 the same solvers ran on the same network: their images are the same, other solvers' not.
    right = picture[:, -200:].reshape(len(rows), int(height), 200, 3)
    assert np.array_equal(right[0], right[5])
    assert not np.array_equal(right[0], right[1])


def test_charts_place_points_where_their_values_are():
    series = Series("a", [0, 10], [1, 100], labels=["low", "high"])
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', Chart([series], "x", "y", log_y=True).svg())
    (x0, y0), (x1, y1) = [(float(x), float(y)) for x, y in places]
    assert (x0 < x1, y0 > y1) == (True, True)
    middle = Series("b", [5], [10])
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', Chart([series, middle], "x", "y", log_y=True).svg())
    assert float(places[2][0]) == pytest.approx((x0 + x1) / 2, abs=0.2)
    assert float(places[2][1]) == pytest.approx((y0 + y1) / 2, abs=0.2)
    assert Chart([Series("empty", [], [])], "x", "y").svg() == ""


def test_charts_hold_values_of_any_size():
    for values in ([999.0, 1e308], [-1e308, 1e308], [1e-308, 0.0]):
        assert "<svg" in Chart([Series("a", [0, 1], values)], "x", "y").svg()


def report_of(folder, rows, called=None, notes=()):
    """The page of made-up rows on a real group; `called` renames solvers."""
    one = group(Mixture(), [row["solver"] for row in rows[1:]])
    renamed = [row | {"solver": (called or {}).get(row["solver"], row["solver"])} for row in rows]
    entries = [
        Entry(
            contender,
            row,
            torch.zeros(2, 3, 8, 8),
            None if row["is_reference"] else torch.zeros(contender.table.nfe + 1),
        )
        for contender, row in zip((one.reference, *one.contenders), renamed)
    ]
    common = {"seed": 0, "num_samples": 9, "precision": "float32", "spaces": []}
    write_report(folder, entries, common, notes)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def made_up(solver, nfe, fd, is_reference=False):
    values = {"solver": solver, "method": "baseline", "nfe": nfe, "guidance": 1.0, "num_images": 9, "fd": fd}
    values |= {"fd_low": 0.9 * fd, "fd_high": 1.1 * fd, "kid": fd / 1000, "kid_low": 0.0009 * fd, "kid_high": 0.002}
    values |= {"rmse": fd / 10, "rmse_low": 0.09 * fd, "rmse_high": 0.11 * fd, "psnr": 20.0, "end_noise_level": 0.0}
    return values | {"seconds": 1.0, "unused_evaluations": 0, "stochastic": False, "is_reference": is_reference}


def test_the_markdown_shows_names_as_they_are(tmp_path):
    """Names and notes come from the command line and from files: none makes a cell, a link or markup."""
    rows = [made_up("ddim:3", 3, 1.0, True), made_up("unipc:3", 3, 2.0)]
    wicked = "a|b`<script>x</script>[y](http://z)_*\n# c"
    notes = ["left out: fid, because <b>no|data</b>\n| a row |"]
    markdown = report_of(tmp_path, rows, {"unipc:3": wicked}, notes)[1]
    assert markdown.count("\n| ") == 3
    (row,) = (line for line in markdown.splitlines() if "script" in line)
    heading = next(line for line in markdown.splitlines() if line.startswith("| solver"))
    bars = [line.replace("\\|", "").count("|") for line in (row, heading)]
    assert bars[0] == bars[1]
    for mark in "<>[]`*":
        assert not re.search(rf"(?<!\\){re.escape(mark)}", row + markdown.splitlines()[-1]), mark
    assert "\\<b\\>no\\|data" in markdown


def test_far_solvers_are_named_below_the_chart_and_the_frontier_goes_down(tmp_path):
    rows = [made_up("ddim:12", 12, 2.0, True), made_up("ddim:2", 2, 90.0), made_up("ddim:3", 3, 5.0)]
    rows += [made_up("unipc:3", 3, 4.0), made_up("ddim:6", 6, 4.5), made_up("unipc:6", 6, 3.0)]
    page, markdown = report_of(tmp_path, rows)
    assert "Above 3 times the reference: ddim:2 (90)" in page
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert "ddim: 3, 5" in chart
    assert "ddim: 2, 90" not in chart
    frontier = re.search(r'<polyline points="([^"]*)"[^>]*><title>best so far', chart)[1]
    heights = [re.search(f'cy="([^"]*)"[^>]*><title>{name}<', chart)[1] for name in ("unipc: 3, 4", "unipc: 6, 3")]
    assert [point.split(",")[1] for point in frontier.split()] == heights
    assert "| 4 (3.6 to 2) |" in markdown  # KID, times 1000


def test_names_and_notes_are_text_whatever_they_hold(tmp_path):
    rows = [made_up("ddim:12", 12, 2.0, True), made_up("ddim:3", 3, 5.0), made_up("unipc:3", 3, 4.0)]
    hostile = '<em title="a">&'
    called = {row["solver"]: f"{hostile}{k}" for k, row in enumerate(rows)}
    page, _ = report_of(tmp_path, rows, called, [f"left out: {hostile}"])
    assert "em" not in Page(page).count
    assert "&lt;em title=&#34;a&#34;&gt;&amp;2" in page
    assert "left out: &lt;em title" in page


def test_colours_of_many_families_differ():
    classes = [color_class(index) for index in range(16)]
    assert len(set(classes)) == 16


def test_labels_stay_inside_the_chart():
    series = [Series(str(k), [3], [1 + 1e-4 * k], labels=[f"solver {k}"]) for k in range(14)]
    chart = Chart([*series, Series("far", [3], [5])], "x", "y", width=460, height=300)
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*class="name"', chart.svg())]
    assert max(heights) <= 300 - 40
    assert min(b - a for a, b in pairwise(sorted(heights))) >= 12.9


def test_labels_of_close_points_do_not_overlap():
    series = [Series(str(k), [3], [1 + 1e-4 * k], labels=[f"solver {k}"]) for k in range(6)]
    drawn = Chart([*series, Series("far", [3], [5])], "x", "y").svg()
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*class="name"', drawn))
    assert len(heights) == 6
    assert min(b - a for a, b in pairwise(heights)) >= 12


def test_heat_maps_colour_signs_and_sizes():
    drawn = heat_map([[1.0], [-0.5, 0.25]], ["1", "2"], ["0", "1"])
    assert drawn.count('class="pos"') == 2
    assert drawn.count('class="neg"') == 1
    assert re.search(r'class="neg" opacity="0.500"', drawn)


def test_the_coefficients_of_a_table_with_calls_are_named_by_row_and_branch():
    drawn = coefficients_chart(named_solver("ddim:3", Mixture.schedule).guided(2.0, rows=[1]))
    assert re.findall(r"<title>state (\d), output (\w+):", drawn) == [
        ("1", "0"),
        *(("2", name) for name in ("0", "1", "1u")),
        *(("3", name) for name in ("0", "1", "1u", "2")),
    ]


def test_wandb_gets_table_and_pictures(monkeypatch, tmp_path):
    import wandb

    logged = {}
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(wandb.Run, "log", lambda self, values: logged.update(values))
    one = group(Mixture(), ["ddim:3"])
    compare_groups([one], compare_args(tmp_path, num_samples=4, wandb=True))
    assert set(logged) == {"comparison", "pictures", "report"}
    table = logged["comparison"]
    assert [row[table.columns.index("solver")] for row in table.data] == ["ddim:12", "ddim:3"]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_browser_draws_the_page(report, tmp_path, width, dark):
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("no Chromium here: install it from the distribution (apt-get install chromium)")
    shutil.copy(report[0] / "report.html", tmp_path / "page.html")
    # A frame of the phone's width, because headless windows are at least 500 pixels wide.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:2000px">')
    picture = tmp_path / "picture.png"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/user",
    ]
    options += [f"--window-size={max(width, 500)},2000", "--allow-file-access-from-files"]
    options += ["--blink-settings=preferredColorScheme=0"] * dark
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", frame.as_uri()], check=True, capture_output=True, timeout=120
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))[:, :width]
    assert (pixels[3, 3].mean() < 60) == dark
    assert pixels.std() > 10
    # Nothing but the page's background at the right edge: no content is wider than the window.
    assert (pixels[:, -3] == pixels[3, 3]).all()
