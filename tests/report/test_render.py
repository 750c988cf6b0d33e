"""The page as text: well-formed, escaped, without external resources, small, and complete without its scripts."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest
from report import example

from slmsam2_cli.report.render import NIIVUE, PAGE_BEGINS, render, script_json, volumes_script
from slmsam2_cli.report.schema import CaseReport, Report, Structure, Table

VOID = {"meta", "link", "img", "input", "br", "hr"}
EVIL = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>&amp;\u2028\x85"


class Reader(HTMLParser):
    """Collect tags, inline scripts and styles, text and links; fail on tags that do not match."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[tuple[dict[str, str | None], str]]] = {"script": [], "style": []}
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self.inside[tag].append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            attrs, before = self.inside[self.open[-1]][-1]
            self.inside[self.open[-1]][-1] = (attrs, before + data)
        else:
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def build_policy(reader: Reader) -> dict[str, list[str]]:
    content = next(attrs["content"] for tag, attrs in reader.tags if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy")
    parts = [part.split() for part in (content or "").split(";")]
    return {name: values for name, *values in parts}


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture(scope="module")
def rich() -> str:
    return render(example.report())


def evil_report() -> Report:
    plain = example.report()
    cases = tuple(evil_case(case, f"{EVIL}{i}") for i, case in enumerate(plain.cases))
    return replace(
        plain,
        title=EVIL,
        cases=cases,
        worst=cases[0].pictures,
        structures={"1": EVIL, "2": EVIL},
        columns=(("Dice", EVIL, 2, "high"),),
        headline=((EVIL, EVIL, EVIL),),
        tables=(Table(EVIL, (EVIL,), ((EVIL,),), EVIL),),
        facts=((EVIL, EVIL),),
        definitions=(("HD95" + EVIL, EVIL),),
        warnings=(EVIL,),
    )


def evil_case(case: CaseReport, name: str) -> CaseReport:
    return replace(
        case,
        id=name,
        problem=EVIL,
        flags=(EVIL,),
        structures=tuple(replace(structure, name=EVIL) for structure in case.structures),
        pictures=tuple(replace(picture, case=name, caption=EVIL) for picture in case.pictures),
    )


def test_the_script_has_the_very_numbers_that_the_page_shows():
    report = example.report()
    key = report.columns[0][0]
    first = report.cases[0]
    structure = replace(first.structures[0], measures={key: 1234.5678}, unprompted={key: 1234.5678})
    page = render(replace(report, cases=(replace(first, structures=(structure,)),)))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [data["cases"][0]["structures"][0][part][0] for part in ("all", "unprompted")] == [1234.5678] * 2


def test_a_page_begins_with_the_bytes_that_identify_it(rich: str) -> None:
    assert rich.encode().startswith(PAGE_BEGINS)


def test_tags_are_balanced_and_ids_are_unique(rich: str) -> None:
    reader = read(rich)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in reader.tags].count("main") == 1


def test_names_are_escaped_everywhere() -> None:
    reader = read(render(evil_report()))
    assert not [attrs for tag, attrs in reader.tags if tag == "img" and not (attrs["src"] or "").startswith("data:image/")]
    assert not [attrs for _, attrs in reader.tags if any(name.startswith("on") for name in attrs)]
    assert len(reader.inside["script"]) == len(read(render(example.report())).inside["script"])
    data = json.loads(next(text for attrs, text in reader.inside["script"] if attrs.get("id") == "data"))
    assert data["cases"][0]["structures"] == [] and data["cases"][1]["id"].startswith(EVIL)
    assert EVIL.split("\u2028")[0] in "".join(reader.text)


def test_cases_with_special_characters_can_be_linked() -> None:
    reader = read(render(evil_report()))
    ids = {attrs["id"] for tag, attrs in reader.tags if tag == "article"}
    links = {(attrs["href"] or "")[1:] for tag, attrs in reader.tags if tag == "a" and (attrs.get("href") or "").startswith("#case=")}
    assert links and links <= ids
    assert all(re.fullmatch(r"case=[\w.~%-]+", one or "", re.ASCII) for one in ids)


def test_json_cannot_close_its_script_element() -> None:
    text = script_json(EVIL)
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == EVIL


def test_the_policy_allows_exactly_the_scripts_and_styles_of_the_page(rich: str) -> None:
    reader = read(rich)
    policy = build_policy(reader)
    run = [text for attrs, text in reader.inside["script"] if "type" not in attrs]
    library = gzip.decompress(
        base64.b64decode(next(text for attrs, text in reader.inside["script"] if attrs.get("id") == "viewer-library"))
    )
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == [hash_of(text) for text in (*run, library.decode())]
    assert policy["style-src"] == [hash_of(text) for _, text in reader.inside["style"]]
    assert not [attrs for _, attrs in reader.tags if "style" in attrs]


def test_no_external_resource_is_loaded(rich: str) -> None:
    reader = read(rich)
    for tag, attrs in reader.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), f"<{tag} {name}={value[:60]}>"
    shown = re.sub(r'<script type="text/plain".*?</script>', "", rich, flags=re.DOTALL)
    assert set(re.findall(r"https?://[^\s'\"<]+", shown)) <= {"http://www.w3.org/2000/svg"}


def test_without_volumes_there_is_no_viewer() -> None:
    html = render(example.report(rich=False))
    assert not {"viewer-library", "viewer-template"} & {attrs.get("id") for _, attrs in read(html).tags}
    assert len(build_policy(read(html))["script-src"]) == 2


def test_the_policy_allows_files_only_with_volumes_next_to_the_page() -> None:
    plain = example.report()
    beside = tuple(replace(case, volumes=None, volumes_file="volumes/a b.js" if case.volumes else None) for case in plain.cases)
    html = render(replace(plain, cases=beside))
    assert build_policy(read(html))["script-src"][-2:] == ["'self'", "file:"]
    assert '"file":"volumes/a b.js"' in html
    assert "'self'" not in build_policy(read(render(plain)))["script-src"]


def test_a_volumes_file_contains_its_case_unchanged() -> None:
    text = volumes_script(EVIL, example.volumes())
    case_id, value = json.loads("[" + text[text.index(".set(") + 5 : text.rindex(")")] + "]")
    assert case_id == EVIL and value["axis"] == 2 and gzip.decompress(base64.b64decode(value["reference"]))[344:347] == b"n+1"
    assert text.isascii() and "<" not in text


def test_failed_and_missing_cases_come_first(rich: str) -> None:
    rows = re.findall(r'<tr data-at="[^"]*"><th scope="row"><a [^>]*>([^<]*)', rich)
    assert rows[:4] == ["prostate_odd", "prostate_lost", "prostate_lost", "prostate_00"]


def test_a_missing_value_is_a_dash_with_the_reason(rich: str) -> None:
    row = re.search(r'<tr data-at="1\.0">.*?</tr>', rich, re.DOTALL)
    assert row and '<td class="v" title="no prediction">\N{EN DASH}</td>' in row.group()


def test_nan_never_reaches_the_page() -> None:
    case = CaseReport("a", "held_out", "ok", (Structure("1", "Liver", "ok", {"Dice": 0.5, "HD95": float("nan")}),))
    html = render(Report("evaluation", "t", (), (case,), {"1": "Liver"}, example.COLUMNS))
    assert "NaN" not in html.split('id="data"')[1].split("</script>")[0] and ">nan<" not in html


def test_names_that_are_not_valid_text_are_rendered() -> None:
    html = render(Report("evaluation", "t", (), (CaseReport("broken\udcff", "held_out", "failed"),), {"1": "Liver"}, example.COLUMNS))
    assert html.encode("utf-8")


def test_a_prediction_shows_nothing_that_needs_a_reference() -> None:
    html = render(example.report(kind="prediction"))
    read(html)
    assert 'class="outline reference"' not in html and 'id="distance"' not in html and 'id="part"' not in html
    assert 'class="confidence"' in html and 'class="disagreement"' in html


def test_an_empty_report_is_rendered() -> None:
    read(render(Report("evaluation", "nothing", (), (), {}, ())))


def test_thirty_five_cases_take_less_than_a_megabyte() -> None:
    assert len(render(example.report(35, 40, rich=False))) < 1_000_000


def test_five_hundred_cases_are_rendered_within_seconds() -> None:
    report = example.report(500, 40, rich=False)
    start = time.perf_counter()
    html = render(report)
    assert time.perf_counter() - start < 10  # about 2 s on a laptop
    assert len(html) < 8_000_000


def test_the_viewer_library_matches_the_digest_in_its_readme() -> None:
    folder = resources.files("slmsam2_cli").joinpath("assets", "niivue")
    text = gzip.decompress(folder.joinpath(NIIVUE).read_bytes())
    assert hashlib.sha256(text).hexdigest() in folder.joinpath("README.md").read_text(encoding="utf-8")
    assert b"AGFzbQE" not in text
    assert "Niivue" in folder.joinpath("LICENSE").read_text(encoding="utf-8")
