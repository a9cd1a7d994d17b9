"""Sensor messages: the contract's rows verbatim, and the rulings of the model card."""

from __future__ import annotations

import pytest

from edge_llm_export.builtin.sensors import UNREADABLE, is_sensor, sentence


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "sensor: kitchen temperature=31.5C limit=30C",
            "Kitchen temperature is 31.5 °C, above the 30 °C limit.",
        ),
        (
            "sensor: attic humidity=45% limit=70%",
            "Attic humidity is 45 %, within the 70 % limit.",
        ),
        (
            "sensor: living_room temperature=15C min=16C",
            "Living room temperature is 15 °C, below the 16 °C minimum.",
        ),
        (
            "sensor: office humidity=50% min=30%",
            "Office humidity is 50 %, above the 30 % minimum.",
        ),
        ("sensor: garden temperature=68F", "Garden temperature is 68 °F."),
        ("sensor: basement water=yes", "Water detected in the basement."),
        ("sensor: basement water=no", "No water in the basement."),
        ("sensor: hallway motion=yes since=22:10", "Motion in the hallway since 22:10."),
        ("sensor: hallway motion=no", "No motion in the hallway."),
    ],
)
def test_rows_of_the_contract(message: str, said: str) -> None:
    assert sentence(message) == said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "sensor: office humidity=70% limit=70%",
            "Office humidity is 70 %, within the 70 % limit.",
        ),
        (
            "sensor: office humidity=70% limit=70.0%",
            "Office humidity is 70 %, within the 70.0 % limit.",
        ),
        (
            "sensor: office humidity=30% min=30%",
            "Office humidity is 30 %, above the 30 % minimum.",
        ),
        (
            "sensor: garden temperature=-4.50C min=-5C",
            "Garden temperature is -4.50 °C, above the -5 °C minimum.",
        ),
        (
            "sensor: attic temperature=9C limit=10C since=08:00",
            "Attic temperature is 9 °C, within the 10 °C limit since 08:00.",
        ),
        ("sensor: attic temperature=20", "Attic temperature is 20."),
        ("SENSOR: KIDS_ROOM MOTION=YES", "Motion in the kids room."),
        ("  sensor:   garden   water=no ", "No water in the garden."),
    ],
)
def test_rulings(message: str, said: str) -> None:
    assert sentence(message) == said


@pytest.mark.parametrize(
    "message",
    [
        "sensor:",
        "sensor: hello",
        "sensor: kitchen",
        "sensor: kitchen temperature",
        "sensor: kitchen temperature=hot",
        "sensor: kitchen temperature=",
        "sensor: pantry temperature=20C",
        "sensor: all temperature=20C",
        "sensor: kitchen pressure=1013",
        "sensor: kitchen humidity=20C",
        "sensor: kitchen temperature=20C limit=70F",
        "sensor: kitchen temperature=20C limit=30C min=10C",
        "sensor: kitchen temperature=20C since=25:00",
        "sensor: kitchen temperature=20C since=9:00",
        "sensor: kitchen water=maybe",
        "sensor: kitchen water=yes limit=3",
        "sensor: kitchen temperature=20,5C",
        "sensor: kitchen temperature=20C please",
    ],
)
def test_anything_else_is_unreadable(message: str) -> None:
    assert sentence(message) == UNREADABLE


def test_what_counts_as_a_sensor_message() -> None:
    assert is_sensor("sensor: attic motion=no")
    assert is_sensor(" Sensor: x")
    assert not is_sensor("is the sensor: on")
