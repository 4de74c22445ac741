import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from ctsft.errors import CTError, needs, wrong_fields


class Part(BaseModel):
    size: int = Field(ge=1)


class Whole(BaseModel):
    k: int | dict[str, int] = 1
    parts: list[Part] = []

    @model_validator(mode="after")
    def even(self):
        if self.k == 13:
            raise ValueError("13 is unlucky")
        return self


def refused(**values):
    with pytest.raises(ValidationError) as caught:
        Whole(**values)
    return caught.value


def test_a_clause_a_place():
    told = wrong_fields(refused(parts=[{"size": 1}, {"size": 0}, {}]))
    assert told == "parts.1.size: Input should be greater than or equal to 1; parts.2.size: Field required"
    assert wrong_fields(refused(k=13)) == "all: Value error, 13 is unlucky"
    assert wrong_fields(refused(k=13), whole="arm") == "arm: Value error, 13 is unlucky"


def test_a_clause_a_field_with_its_value():
    values = {"k": "many", "parts": [{"size": 0}, {"size": -1}]}
    k, parts = wrong_fields(refused(**values), values).split("; ")
    assert k.startswith("k='many' (Input should be a valid integer") and ", or: Input should be a valid dict" in k
    assert parts.startswith("parts=[{'size': 0}, {'size': -1}] (Input should be greater") and parts.count("or: ") == 1
    assert wrong_fields(refused(k=13), {"k": 13}) == "all: Value error, 13 is unlucky"


def test_what_is_long_is_cut_and_stays_on_one_line():
    k = {f"{i}\n" * 400: "x" * 10_000 for i in range(500)}
    told = wrong_fields(refused(k=k))
    assert told.endswith("; and 493 more") and len(told) < 3_000 and told.isprintable()  # k is no int, either
    assert wrong_fields(refused(k=k), {"k": k}).startswith("k={'0\\n0\\n") and len(wrong_fields(refused(k=k))) < 3_000


def test_a_missing_extra_is_one_sentence():
    with (
        pytest.raises(CTError, match=r"^no-such-package is needed here .*: pip install 'ctsft\[tune\]'\.$"),
        needs("tune"),
    ):
        import no_such_package.part  # noqa: F401


def test_a_file_of_our_own_that_is_missing_is_no_extra():
    with pytest.raises(ModuleNotFoundError), needs("tune"):
        import ctsft.no_such_file  # noqa: F401
