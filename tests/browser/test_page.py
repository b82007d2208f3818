"""The page of a report in a real browser, driven over Playwright (make browser)."""

import contextlib
import re
import shutil

import pytest
from scipy import stats

from lsrs_jax import report
from lsrs_jax.auditing.table import read_audit
from lsrs_jax.certification.table import read_table
from support import ROOT
from support.random_runs import HOSTILE, noise, write_data, write_run
from test_report import write_log

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120_000  # milliseconds, for machines with other work
PHONE = {"viewport": {"width": 375, "height": 700}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on the PATH (one of {', '.join(NAMES)}): apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        sync_api.expect.set_options(timeout=PATIENCE)
        yield found
        found.close()


@pytest.fixture(scope="module")
def reports(folder):
    """A folder with an audited run, a run without audit and a published log on one page; returns its address."""
    data = write_data(folder / "data.npz", *noise(200))
    write_run(folder / "audited", data, range(200), audited=50)
    write_run(folder / "other", data, range(0, 200, 2), seed=1)
    log = write_log(folder / "peer.tsv", [0.1, 0.2, 0.4, 0.8])
    runs = [f"<i>A</i>&amp;={folder / 'audited'}", f"other={folder / 'other'}", f"peer={log}"]
    report.run([*runs, f"--out={folder / 'out'}", "--images"])
    return folder


def address(folder):
    return f"file://{folder / 'out' / 'report.html'}"


@contextlib.contextmanager
def opened(browser, url, **settings):
    """A page whose charts are drawn; afterwards nothing was logged, and no request had left it."""
    wrong, context = [], browser.new_context(**settings)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.extend([] if asked.url.startswith(("blob:", url)) else [asked.url]))
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    try:
        yield page
        assert page.title() == "Certified accuracy"
    finally:
        context.close()
    assert wrong == []


@pytest.fixture
def page(browser, reports):
    with opened(browser, address(reports)) as page:
        yield page


def shows(locator, text):
    """Waits until an element shows a text."""
    from playwright.sync_api import expect

    expect(locator).to_contain_text(text)


def expect_count(locator, count):
    """Waits until so many elements are there."""
    from playwright.sync_api import expect

    expect(locator).to_have_count(count)


def column(page, number):
    return page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()


def set_radius(page, radius):
    page.fill("#radius", str(radius))
    shows(page.locator("#table th.at"), f"r={radius}")


def test_a_click_or_a_key_on_a_heading_sorts_the_table(page):
    names = column(page, 1)
    heading = page.locator("#table th:nth-child(2)")
    heading.locator("button").click()
    assert column(page, 2) == ["200", "100 of 200", "4"]
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").press("Enter")
    assert column(page, 2) == ["4", "100 of 200", "200"]
    assert heading.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="run", exact=True).press("Space")
    assert column(page, 1) == sorted(names)
    assert heading.get_attribute("aria-sort") == "none"
    # What is not known stands last in both directions.
    for _ in range(2):
        page.get_by_role("button", name="expected invalid").click()
        assert column(page, 1)[-1] == "peer"


def test_the_radius_fills_a_column_and_the_tables_of_the_charts(page, reports):
    tables = [read_table(reports / name / "certify" / "default" / "certificates.tsv") for name in ("audited", "other")]
    tables.append(read_table(reports / "peer.tsv"))
    for radius in (0.2, 0.33):
        set_radius(page, radius)
        assert column(page, 3) == [f"{table.certified_accuracy(radius):.3f}" for table in tables]
        rows = page.locator("#numbers-cost tbody tr").all_text_contents()
        for table, row in zip(tables, rows, strict=False):
            certified = round(table.certified_accuracy(radius) * len(table))
            low, high = stats.binomtest(certified, len(table)).proportion_ci(0.95, "wilson")
            assert f"{certified / len(table):.3f}{low:.3f}–{high:.3f}" in row
    slider = page.locator("#slider")
    slider.focus()
    slider.press("Home")
    shows(page.locator("#table th.at"), re.compile("r=0$"))
    assert column(page, 3) == [f"{table.certified_accuracy(0):.3f}" for table in tables]


def test_a_radius_has_one_column_and_a_wide_table_says_so(page, reports):
    set_radius(page, 0.33)
    headings = page.locator("#table thead th:visible")
    before = headings.count()
    set_radius(page, 0.5)
    expect_count(headings, before - 1)
    expect_count(page.locator("#table tbody tr").first.locator("> :visible"), before - 1)
    table = read_table(reports / "audited" / "certify" / "default" / "certificates.tsv")
    worst, (share, number) = ("cat", "dog", HOSTILE), table.worst_class(0.5)
    assert f"{share:.3f} ({worst[number]})" in page.locator("#table tbody tr").first.inner_text()
    page.set_viewport_size({"width": 400, "height": 800})
    shows(page.locator("#wider:visible"), "scroll it sideways")


def test_the_curves_show_their_numbers_and_take_a_click(page, reports):
    chart = page.locator("#curves")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    place = box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(*place)
    hover = page.locator("#curves .hoverlayer")
    shows(hover, "95 %")
    text = hover.text_content()
    radius = float(re.search(r"r = ([\d.]+?)(?=[^\d.])", text)[1])
    tables = [read_table(reports / name / "certify" / "default" / "certificates.tsv") for name in ("audited", "other")]
    for name, table in zip(("<i>A</i>&amp;", "other"), tables, strict=True):
        share = table.certified_accuracy(radius)
        number = f"{name} {share:.3f} ({round(share * len(table))} of {len(table)} images; 95 %: "
        assert number in text
    assert "n = 100 samples" in text
    audit = read_audit(reports / "audited" / "certify" / "default" / "audit.tsv")
    assert f"<i>A</i>&amp;, under attack {audit.robust_accuracy(radius):.3f} of 50 images" in text
    page.mouse.click(*place)
    shows(page.locator("#table th.at"), f"r={radius:g}")
    assert float(page.input_value("#radius")) == radius
    page.get_by_label("other", exact=False).first.uncheck()
    chart.hover(position={"x": 0.2 * box["width"], "y": 0.5 * box["height"]})
    shows(hover, "95 %")
    assert "other" not in hover.text_content()
    lines = page.locator("#curves .scatterlayer .trace").count()
    page.get_by_label("confidence band").uncheck()
    assert page.locator("#curves .scatterlayer .trace").count() < lines


def test_costs_are_shown_in_samples_and_in_seconds(page):
    assert "Not known, and not drawn: peer." in page.locator("#cost-hint").inner_text()
    assert page.locator("#cost .point").count() == 2
    page.select_option("#cost-kind", "seconds")
    expect_count(page.locator("#cost .point"), 3)
    assert "1.5 s" in page.locator("#numbers-cost").text_content()


def test_the_gallery_filters_orders_and_pages(page, reports):
    table = read_table(reports / "audited" / "certify" / "default" / "certificates.tsv")
    cards, status = page.locator(".card"), page.locator("#gallery [role=status]")
    assert cards.count() == 60
    assert status.inner_text() == "Images 1 to 60 of 200."
    page.get_by_role("button", name="Next").press("Enter")
    assert "#60" in cards.first.inner_text()
    page.get_by_label("page", exact=True).fill("4")
    page.keyboard.press("Tab")
    assert cards.count() == 20
    assert page.get_by_role("button", name="Next").is_disabled()
    wrong = (table.predict >= 0) & ~table.correct
    for kind, found in (("wrong", wrong), ("abstained", table.predict < 0), ("correct", table.correct)):
        page.get_by_label("Answer").select_option(kind)
        assert status.inner_text().endswith(f"of {found.sum()}.")
        assert page.locator(f".card.{kind}").count() == cards.count() == min(60, found.sum())
    page.get_by_label("Radius from").fill("0.3")
    page.get_by_label("Radius to").fill("0.5")
    inside = table.correct & (table.radius >= 0.3) & (table.radius <= 0.5)
    assert status.inner_text().endswith(f"of {inside.sum()}.")
    page.get_by_label("Order").select_option("up")
    first = min(table.radius[inside])
    assert f"radius {int(first * 1000) / 1000:.3f}" in cards.first.inner_text()
    assert cards.locator(".votes").first.get_attribute("aria-label").startswith("of 100 samples: ")
    page.get_by_label("Radius from").fill("99")
    page.get_by_label("Radius to").fill("")
    assert status.inner_text() == "No image fits."
    page.get_by_role("combobox", name="Run", exact=True).select_option("1")
    page.get_by_label("Radius from").fill("")
    page.get_by_label("Answer").select_option("")
    assert status.inner_text() == "Images 1 to 60 of 100."


def test_a_card_shows_image_votes_and_nearest_flip(page):
    texts = page.locator(".card").all_inner_texts()
    assert any("nearest flip at" in text for text in texts)
    assert any("no attack flipped it" in text for text in texts)
    assert any("not attacked" in text for text in texts)
    pair = page.locator(".card", has_text="nearest flip at").first.locator(".picture")
    assert pair.count() == 2
    assert pair.nth(1).get_attribute("aria-label").startswith("its nearest flip, at ")
    left, right = pair.nth(0).bounding_box(), pair.nth(1).bounding_box()
    assert left["x"] + left["width"] < right["x"]
    assert left["width"] == right["width"] == 104
    picture = page.locator(".picture").first
    assert picture.get_attribute("aria-label") == "image 0, cat"
    assert "blob:" in picture.evaluate("node => getComputedStyle(node).backgroundImage")
    assert picture.bounding_box()["width"] == 104


def test_a_hostile_name_of_a_class_stays_text(page):
    page.get_by_label("Label").select_option(label=HOSTILE)
    assert page.locator(".card b").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("i:not(fieldset i, .hint i)").count() == 0
    assert "<i>A</i>&amp;" in page.locator("#table").inner_text()


@pytest.mark.parametrize("settings", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_the_page_is_accessible_and_fits_its_window(browser, reports, settings):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with opened(browser, address(reports), **settings) as page:
        for summary in page.locator("summary").all():
            summary.click()
        violations = axe.Axe().run(page).response["violations"]
        grave = {(one["id"], node["html"][:200]) for one in violations for node in one["nodes"]
                 if one["impact"] in ("serious", "critical")}  # fmt: skip
        assert not grave
        width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert width[0] <= width[1]


def test_colours_follow_the_scheme_while_the_page_is_open(page):
    from playwright.sync_api import expect

    line = page.locator("#curves .scatterlayer .js-line").last
    light = line.evaluate("node => node.style.stroke")
    page.emulate_media(color_scheme="dark")
    expect(line).not_to_have_css("stroke", light)


def test_three_runs_of_a_thousand_images_open(browser, tmp_path):
    data = write_data(tmp_path / "data.npz", *noise(1000, (32, 32, 3)))
    for seed in range(3):
        write_run(tmp_path / f"run{seed}", data, range(1000), seed=seed, audited=100)
    report.run([*(str(tmp_path / f"run{seed}") for seed in range(3)), f"--out={tmp_path / 'out'}", "--images"])
    with opened(browser, address(tmp_path)) as page:
        assert page.locator("#gallery [role=status]").inner_text() == "Images 1 to 60 of 1,000."
        print(f"charts drawn after {page.get_attribute('html', 'data-ready')} ms")


def test_without_plotly_the_tables_stand_in_for_the_charts(browser, tmp_path, monkeypatch):
    from lsrs_jax.reporting import page as made

    monkeypatch.setattr(made, "_plotly", lambda: "")
    report.run([str(ROOT / "lsrs_jax" / "pretrained" / "digits"), f"--out={tmp_path / 'out'}"])
    with opened(browser, address(tmp_path)) as page:
        assert page.locator(".missing").count() == 2
        assert "digits" in page.locator("#numbers-curves").inner_text()
        assert page.locator(".card").count() == 60


def test_a_log_of_one_image_without_a_certificate_opens(browser, tmp_path):
    log = write_log(tmp_path / "a.tsv", [0.0])
    log.write_text(log.read_text().replace("0\t1\t1\t0.0\t1\t0:00:01.5", "0\t1\t-1\t0.0\t0\t0:00:00"))
    report.run([str(log), f"--out={tmp_path / 'out'}"])
    with opened(browser, address(tmp_path)) as page:
        assert column(page, 3) == ["0.000"]
