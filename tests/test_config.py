"""Dataclasses from TOML, JSON and nested values, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from glide_fast.config import from_dict, from_json, load_toml, to_dict, to_json


@dataclass(frozen=True, kw_only=True)
class Engine:
    power: float
    fuel: Literal["petrol", "none"] = "petrol"


@dataclass(frozen=True, kw_only=True)
class Car:
    name: str
    doors: int = 4
    gears: tuple[float, ...] = (1.0, 2.0)
    engine: Engine = field(default_factory=lambda: Engine(power=1.0))
    trailer: Engine | None = None

    def __post_init__(self) -> None:
        if self.doors < 1:
            raise ValueError(f"doors {self.doors} must be at least 1")


def refusal(values: Any) -> list[str]:
    """The lines of the error that the values cause."""
    with pytest.raises(ValueError, match="the garage does not describe a Car") as caught:
        from_dict(Car, values, "the garage")
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_nested_values_become_dataclasses_and_defaults_fill_the_rest() -> None:
    car = from_dict(Car, {"name": "beetle", "gears": [3, 1], "trailer": {"power": 0}}, "the garage")
    assert car == Car(name="beetle", gears=(3.0, 1.0), trailer=Engine(power=0.0))
    assert isinstance(car.trailer, Engine)


def test_json_and_back_is_the_same_config() -> None:
    car = Car(name="ö", doors=2, engine=Engine(power=0.1, fuel="none"))
    assert from_json(Car, to_json(car), "text") == car
    assert to_dict(car)["gears"] == [1.0, 2.0]
    assert to_dict(car)["trailer"] is None


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    assert refusal({"name": "a", "wheels": 3}) == [
        "wheels: no such field; the fields are name, doors, gears, engine, trailer"
    ]


@pytest.mark.parametrize("nest", ["engine", "trailer"])
def test_an_unknown_nested_field_is_named_with_its_path(nest: str) -> None:
    lines = refusal({"name": "a", nest: {"power": 1, "colour": "red"}})
    assert lines == [f"{nest}.colour: no such field; the fields are power, fuel"]


def test_a_missing_field_is_named_and_the_rest_is_not_repeated() -> None:
    assert refusal({"doors": 3, "engine": {}}) == ["name: is missing", "engine.power: is missing"]


def test_a_wrong_type_is_named_with_the_value() -> None:
    (line,) = refusal({"name": "a", "doors": "many"})
    assert line.startswith("doors: ")
    assert "integer" in line
    assert line.endswith("(got 'many')")


def test_a_choice_lists_what_can_be_chosen() -> None:
    (line,) = refusal({"name": "a", "engine": {"power": 1, "fuel": "hay"}})
    assert line == "engine.fuel: Input should be 'petrol' or 'none' (got 'hay')"


def test_a_rule_of_the_dataclass_speaks_for_itself() -> None:
    assert refusal({"name": "a", "doors": 0}) == ["doors 0 must be at least 1"]


def test_every_problem_is_told_at_once() -> None:
    lines = refusal({"doors": None, "wheels": 3, "engine": {"power": "x", "colour": "red"}})
    assert [line.split(":")[0] for line in lines] == [
        "wheels",
        "engine.colour",
        "name",
        "doors",
        "engine.power",
    ]


@pytest.mark.parametrize("values", [[], "name", 3, None])
def test_what_is_no_table_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="the garage does not describe a Car: it is no table of fields"):
        from_dict(Car, values, "the garage")


@pytest.mark.parametrize("text", ["", "{", '{"name": "a"'])
def test_broken_json_names_its_source(text: str) -> None:
    with pytest.raises(ValueError, match="the note is not valid JSON"):
        from_json(Car, text, "the note")


def test_a_toml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "car.toml"
    path.write_text('name = "süß"\n[engine]\npower = 2\n', encoding="utf-8")
    assert load_toml(Car, path) == Car(name="süß", engine=Engine(power=2.0))


def test_an_error_in_a_toml_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "car.toml"
    path.write_text("name = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"car\.toml does not describe a Car"):
        load_toml(Car, path)


@pytest.mark.parametrize("content", [b"name = ", b'name = "a"\nname = "b"', b"name = '\xff'"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "car.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"car\.toml is not valid TOML"):
        load_toml(Car, path)


def test_a_missing_file_says_where_configs_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*none\.toml.*configs/"):
        load_toml(Car, tmp_path / "none.toml")
