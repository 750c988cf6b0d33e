"""One line says which key is wrong, what was found there and what is allowed."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmsam2_cli.io.strict_json import explain


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    input_size: int = Field(default=64, ge=32, le=2048, multiple_of=32)
    rate: float = Field(default=0.1, gt=0)
    share: float = Field(default=0.5, gt=0, lt=1)
    count: int = Field(default=1, ge=1)
    most: int = Field(default=1, le=9)
    axis: Literal["SI", "AP"] = "SI"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    needed: int


def line(value):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(value)
    return explain(caught.value, Outer)


@pytest.mark.parametrize(
    ("inner", "told"),
    [
        ('"input_size": 100', "inner.input_size: Input should be a multiple of 32 (found 100); allowed: 32 to 2048, multiples of 32"),
        ('"rate": -1.0', "inner.rate: Input should be greater than 0 (found -1.0); allowed: more than 0"),
        ('"share": 2.0', "inner.share: Input should be less than 1 (found 2.0); allowed: more than 0, less than 1"),
        ('"count": 0', "inner.count: Input should be greater than or equal to 1 (found 0); allowed: 1 or more"),
        ('"most": 10', "inner.most: Input should be less than or equal to 9 (found 10); allowed: at most 9"),
        ('"axis": "LR"', "inner.axis: Input should be 'SI' or 'AP' (found 'LR')"),
        ('"input_siz": 96', "inner.input_siz: unknown key (found 96); did you mean input_size?"),
        ('"zebra": 96', "inner.zebra: unknown key (found 96)"),
        ('"input_size": [1]', "inner.input_size: Input should be a valid integer; allowed: 32 to 2048, multiples of 32"),
    ],
)
def test_a_wrong_value_is_explained_with_what_was_found_and_what_is_allowed(inner, told):
    assert line(f'{{"needed": 1, "inner": {{{inner}}}}}') == told


def test_a_wrong_value_in_a_list_is_named_by_its_index():
    told = line('{"needed": 1, "several": [{}, {"count": 0}]}')
    assert told == "several.1.count: Input should be greater than or equal to 1 (found 0); allowed: 1 or more"


def test_all_errors_are_in_one_line():
    assert line('{"inner": {"most": 10}}').split("; ")[::2] == [
        "inner.most: Input should be less than or equal to 9 (found 10)",
        "needed: Field required",
    ]


def test_a_file_that_is_no_object_is_one_error():
    assert line("3").startswith("the whole: Input should be an object")


def test_long_values_are_shortened_and_integer_bounds_shown_as_integers():
    class Large(BaseModel):
        steps: int = Field(default=1, ge=1, le=10_000_000)

    with pytest.raises(ValidationError) as caught:
        Large.model_validate({"steps": "x" * 5000})
    told = explain(caught.value, Large)
    assert len(told) < 250 and told.endswith("allowed: 1 to 10000000")
