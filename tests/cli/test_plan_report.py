"""``--report``: the page as a file, and in a browser."""

import dataclasses
import json
import re

import pytest
from browser import CHROMIUM, Browser
from plan_examples import GIB, make_cluster, make_profile

from lightning_mics.cli.plan.report import to_html
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Training

HOSTILE = "</script><script>window.hurt = 1</script><b>&amp;"
NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def find(num_nodes=2, *, layers=4, limit=None, name="stack", **choices):
    profile = dataclasses.replace(make_profile(layers, saved=1e6), name=name)
    choices = Choices(batches=[(1, 4), (2, 2)], memory_limit=limit, **choices)
    return search(profile, make_cluster(num_nodes), Training(optimizer="AdamW"), choices)


def page_of(planning, **options):
    return to_html(planning, lambda **fixed: " ".join(["mics plan", *map(str, fixed.values())]), **options)


def content(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)


# The file.


def test_the_page_is_alone():
    page = page_of(find())
    assert "$" not in page.partition("<script")[0]  # nothing is left to fill in
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert set(re.findall(r"https?://[^\"'\s<)]+", page.partition('id="data"')[0])) == set()
    assert "default-src 'none'" in page and "<!doctype html>" in page.splitlines()[0]


def test_names_cannot_end_the_data():
    page = page_of(find(name=HOSTILE))
    assert page.count("</script>") == 2 and "window.hurt = 1<" not in page
    assert content(page)["facts"][0][1].startswith(HOSTILE)


def test_the_page_has_what_the_planner_found():
    planning = find(2, layers=16, limit=4 * GIB)
    found = content(page_of(planning, top=3))
    rows = [row for row in found["rows"] if row["scheme"] == "mics"]
    assert [row["rank"] for row in rows[:3]] == [1, 2, 3]
    assert {row["shard_size"] for row in rows} == {plan.candidate.shard_size for plan in planning.plans}
    for row in rows:
        plan = planning.plans[row["rank"] - 1]
        assert row["seconds"] == plan.time.seconds and row["total"] == plan.memory.total
        assert row["seconds"] <= row["by_rate"]["0.5"] * 1.001 and row["seconds"] <= row["without_overlap"] * 1.001
        here = found["scaled_nodes"].index(2)
        assert row["scaling"][here] == pytest.approx(plan.samples_per_second / 8)
        assert f"shard_size={plan.candidate.shard_size}" in row["commands"][0][1]
        assert all(
            0 <= start <= end <= found["ticks"] for lane in row["timeline"]["lanes"].values() for _, start, end in lane
        )
    assert [row["label"] for row in found["rows"] if row["scheme"] != "mics"] == ["full sharding", "2-D mesh", "DDP"]
    assert found["misfits"] and found["assumptions"][0][0] == "test"


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def shown(browser, tmp_path):
    """Shows the page of a plan; what the browser complains of fails the test."""

    def show(planning, width=1200):
        file = tmp_path / "plan.html"
        file.write_text(page_of(planning), encoding="utf-8")
        browser.complaints.clear()
        browser.requests.clear()
        browser.shape(width)
        browser.open(file)
        return browser

    yield show
    assert browser.complaints == []
    assert all(request.startswith("file://") for request in browser.requests)


ROWS = "[...document.querySelectorAll('#ranking tbody:first-of-type tr')]"
DRAWN = "['timeline', 'memory', 'scaling', 'sensitivity'].map(id => document.querySelector(`#${id} svg`).outerHTML)"


def column(browser, key):
    place = f"[...document.querySelectorAll('#ranking th')].findIndex(head => head.dataset.key === '{key}')"
    return browser.run(f"{ROWS}.map(row => Number(row.cells[{place}].textContent.replace(',', '')))")


@NEEDS_BROWSER
def test_a_click_on_a_row_changes_figures_and_commands(shown):
    browser = shown(find(name=HOSTILE))
    assert browser.run("document.querySelector('h1').textContent").startswith(HOSTILE)
    assert browser.run("window.hurt") is None
    before, chosen = browser.run(DRAWN), browser.run("document.querySelector('#chosen').textContent")
    commands = browser.run("document.querySelector('#commands').textContent")
    assert chosen.startswith("The best plan: p=")
    row = browser.run(f"{ROWS}.findIndex(row => row.cells[1].textContent.startsWith('p=8')) + 1")
    browser.click(f"#ranking tbody tr:nth-child({row})")
    after = browser.run(DRAWN)
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert browser.run("document.querySelector('#chosen').textContent").startswith("p=8")
    assert browser.run("document.querySelector('#commands').textContent") != commands
    assert browser.run(f"{ROWS}.filter(row => row.ariaSelected === 'true').length") == 1
    browser.click("#ranking .others tr")
    assert "For comparison only" in browser.run("document.querySelector('#commands').textContent")
    browser.run(f"{ROWS}[0].focus()")
    browser.press("Enter", 13)
    assert browser.run(DRAWN) == before


@NEEDS_BROWSER
def test_a_click_on_a_name_sorts(shown):
    browser = shown(find())
    for key in ("memory", "speed", "rank"):
        browser.click(f"#ranking th[data-key={key}] button")
        values = column(browser, key)
        descending = browser.run(f"document.querySelector('#ranking th[data-key={key}]').ariaSort") == "descending"
        assert values == sorted(values, reverse=descending) and len(values) > 3
        browser.click(f"#ranking th[data-key={key}] button")
        assert column(browser, key) == sorted(values, reverse=not descending)


@NEEDS_BROWSER
def test_values_follow_the_pointer(shown):
    browser = shown(find())
    legend = "document.querySelector('#sensitivity .legend').textContent"
    before = browser.run(legend)
    browser.click("#sensitivity circle:nth-of-type(5)")
    assert "at 25% of the rate" in browser.run(legend) and browser.run(legend) != before


@NEEDS_BROWSER
@pytest.mark.parametrize(("width", "paper"), [(1200, False), (360, False), (700, True)], ids=["wide", "phone", "paper"])
def test_everything_has_room(shown, width, paper):
    browser = shown(find(2, layers=16, limit=4 * GIB), width)
    browser.shape(width, paper=paper)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.querySelectorAll('.scroll')].every(box => box.scrollWidth <= box.clientWidth)")
    assert browser.run("getComputedStyle(document.querySelector('.copy')).display !== 'none'") is not paper


@NEEDS_BROWSER
def test_dark_is_dark_and_paper_is_light(shown):
    browser = shown(find())
    colours = []
    for look in ({"dark": False}, {"dark": True}, {"dark": True, "paper": True}):
        browser.shape(1200, **look)
        colours.append(browser.run("getComputedStyle(document.querySelector('.panel')).backgroundColor"))
    assert colours[0] == colours[2] == "rgb(255, 255, 255)" != colours[1]


@NEEDS_BROWSER
def test_a_page_of_one_node_has_no_links_between_nodes(shown):
    browser = shown(find(1))
    heads = browser.run("document.querySelector('#ranking thead').textContent")
    assert "links" not in heads and "over" in heads
    assert browser.run("document.querySelectorAll('#sensitivity circle').length") > 0


@NEEDS_BROWSER
def test_where_nothing_fits_the_page_says_what_is_missing(shown):
    browser = shown(find(limit=0.2 * GIB))
    assert browser.run("document.querySelector('#advice').textContent").strip().startswith("Nothing fits")
    assert "too much" in browser.run("document.querySelector('#misfits').textContent")
    assert "What would make it fit: " in browser.run("document.querySelector('#advice').textContent")
    assert browser.run("document.querySelector('#figures').hidden")
