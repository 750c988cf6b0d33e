"""plan.html: complete without scripts, no external resources, all text escaped, reproducible."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report.planning import case_of, dataset, plan_of
from report.test_render import EVIL, build_policy, hash_of, read

from slmsam2_cli.errors import OutputError
from slmsam2_cli.planning.plan import ChannelIntensity
from slmsam2_cli.report import contact_sheet
from slmsam2_cli.report.plan_page import PAGE_BEGINS, PlanNotes, shown_cases, write_plan_page
from slmsam2_cli.report.schema import Table

BY = "\N{MULTIPLICATION SIGN}"
NOTES = PlanNotes(
    settings=(("geometry.slice_axis", "SI", "the coarsest axis"),),
    warnings=("case a: is tilted",),
    advice=(("more cases", "annotate two more"),),
    estimates=(("slmsam2 finetune", "1.8 GB"),),
    measured=(Table("Dataset", ("property", "median"), (("slices along SI", "8"),), "of 2 cases"),),
)


@pytest.fixture
def data(tmp_path):
    return dataset(tmp_path, case_of("a"), case_of("b"))


def page(tmp_path, data, notes=NOTES, **plan):
    dataset, fingerprint = data
    path = tmp_path / "work" / "plan.html"
    write_plan_page(path, dataset, fingerprint, plan_of(fingerprint).model_copy(update=plan), notes)
    return path.read_text(encoding="utf-8")


def text_of(html):
    return " ".join("".join(read(html).text).split())


def test_settings_warnings_advice_estimates_and_measurements_are_on_the_page(tmp_path, data):
    text = text_of(page(tmp_path, data))
    for part in ("geometry.slice_axis", "the coarsest axis", "is tilted", "annotate two more", "1.8 GB", "of 2 cases"):
        assert part in text


def test_warnings_come_first(tmp_path, data):
    html = page(tmp_path, data)
    assert html.index("case a: is tilted") < html.index("the coarsest axis") < html.index('id="cases"')


def test_without_notes_there_are_no_empty_tables(tmp_path, data):
    html = page(tmp_path, data, PlanNotes())
    assert "table" not in {tag for tag, _ in read(html).tags}
    assert 'class="notices"' not in html


def test_each_case_is_shown_with_its_name_slice_and_sizes(tmp_path, data):
    html = page(tmp_path, data)
    pictures = [attrs for tag, attrs in read(html).tags if tag == "img"]
    assert [attrs["alt"] for attrs in pictures] == ["a, MRI, slice 4 along SI", "b, MRI, slice 4 along SI"]
    text = text_of(html).replace(BY, "x")
    assert "slice 4: organ" in text and "24 x 20 x 8 voxels" in text and "1 x 1 x 3 mm" in text


def test_the_ends_of_the_window_are_printed(tmp_path, data):
    assert "window 100 to 300" in text_of(page(tmp_path, data))
    ct = ChannelIntensity(name="CT", scheme="ct", lower=-160.0, upper=240.0)
    shown = text_of(page(tmp_path, data, intensity=(ct,)))
    assert "-160 to 240 HU" in shown and "window 100" not in shown


def test_a_case_that_cannot_be_read_is_named_at_the_top_and_leaves_a_gap(tmp_path, data):
    (tmp_path / "imagesTr" / "b.nii.gz").write_bytes(b"nonsense")
    html = page(tmp_path, data)
    notices = html[html.index('class="notices"') : html.index('class="headline"')]
    assert "1 of 2 cases could not be shown" in notices and "b: imagesTr/b.nii.gz" in notices
    assert html.count("<img") == 1 and html.count('class="hole"') == 1


def test_a_page_without_readable_cases_is_still_written(tmp_path, data):
    for image in (tmp_path / "imagesTr").iterdir():
        image.unlink()
    html = page(tmp_path, data)
    assert "2 of 2 cases could not be shown" in html and 'id="intensities"' not in html and 'id="sizes"' in html


def test_many_cases_are_not_all_shown_and_the_page_says_so(tmp_path, data, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_THUMBNAILS", 1)
    html = page(tmp_path, data)
    assert "1 of 2 training cases, evenly spaced" in html and html.count("<img") == 1


def test_progress_has_as_many_steps_as_cases_shown(tmp_path, data):
    advanced = []
    write_plan_page(tmp_path / "p.html", *data, plan_of(data[1]), NOTES, lambda steps, note: advanced.append(note))
    assert advanced == ["a", "b"] and shown_cases(data[0]) == 2


def test_the_same_data_give_the_same_bytes(tmp_path, data):
    assert page(tmp_path, data) == page(tmp_path, data)


def test_text_is_escaped_everywhere(tmp_path):
    row = (EVIL, EVIL, EVIL)
    notes = PlanNotes((row,), (EVIL,), ((EVIL, EVIL),), (row,), (Table(EVIL, (EVIL,), ((EVIL,),), EVIL),))
    given, fingerprint = dataset(tmp_path, case_of("a"), label="<b>organ</b>")
    reader = read(page(tmp_path, (replace(given, name=EVIL), fingerprint), notes, dataset_name=EVIL, modality=EVIL))
    tags = [tag for tag, _ in reader.tags]
    assert (tags.count("script"), tags.count("img"), tags.count("b")) == (0, 1, 1)  # the case's picture and its name
    assert not [attrs for _, attrs in reader.tags if any(name.startswith("on") for name in attrs)]
    assert "<b>organ</b>" in "".join(reader.text)


def test_the_page_has_no_scripts_and_no_external_resources(tmp_path, data):
    html = page(tmp_path, data)
    reader = read(html)
    ((_, style),) = reader.inside["style"]
    policy = build_policy(reader)
    assert reader.inside["script"] == [] and not [attrs for _, attrs in reader.tags if "style" in attrs]
    assert (policy["default-src"], policy["style-src"], policy["img-src"]) == (["'none'"], [hash_of(style)], ["data:"])
    links = [attrs[name] for _, attrs in reader.tags for name in ("src", "href") if name in attrs]
    assert links and all(re.match(r"#\w+$|data:", link) for link in links)
    assert "http" not in re.sub(r"http-equiv|data:[^\"]*", "", html)


def test_links_lead_to_existing_sections(tmp_path, data):
    for notes in (NOTES, PlanNotes()):
        reader = read(page(tmp_path, data, notes))
        ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["href"][1:] for tag, attrs in reader.tags if tag == "a"} <= set(ids)


def test_a_file_of_another_program_is_not_overwritten(tmp_path, data):
    theirs = tmp_path / "plan.html"
    theirs.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="was not written by slmsam2"):
        write_plan_page(theirs, *data, plan_of(data[1]), NOTES)
    assert theirs.read_text() == "<p>mine</p>"


def test_the_page_begins_with_its_mark(tmp_path, data):
    assert page(tmp_path, data).encode().startswith(PAGE_BEGINS)
