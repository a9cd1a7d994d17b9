"""The built-in model's answers: their order, their domains, their one line of JSON."""

from __future__ import annotations

import pytest

from edge_llm.errors import ArgumentError
from edge_llm_export.builtin.answer import ACTIONS, DEVICES, NONE, ROOMS, Answer, label_of, parse

# The rows of the contract, verbatim.
ROWS = [
    '{"action":"on","device":"light","room":"kitchen"}',
    '{"action":"set","device":"light","room":"living_room","value":30,"unit":"percent"}',
    '{"action":"set","device":"thermostat","room":"bedroom","value":21,"unit":"celsius",'
    '"time":"06:30"}',
    '{"action":"increase","device":"heater","value":2,"unit":"celsius"}',
    '{"action":"off","device":"fan","delay_s":600}',
    '{"action":"start","device":"vacuum","room":"hallway","duration_s":5400}',
    '{"action":"timer","duration_s":720,"label":"pasta"}',
    '{"action":"reminder","time":"17:00","label":"call mum"}',
    '{"action":"query","device":"garage"}',
    '{"action":"cancel","device":"alarm"}',
    '{"action":"none"}',
]


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_contract_survive_reading_and_writing(row: str) -> None:
    assert parse(row).to_json() == row


def test_domains_are_those_of_the_contract() -> None:
    assert len(ACTIONS) == 18
    assert len(DEVICES) == 20
    assert len(ROOMS) == 13
    assert NONE.to_json() == '{"action":"none"}'


def test_every_key_in_order_and_text_unescaped() -> None:
    full = Answer("set", "light", "all", 12.5, "percent", "09:05", 60, 120, "café")
    assert full.to_json() == (
        '{"action":"set","device":"light","room":"all","value":12.5,"unit":"percent",'
        '"time":"09:05","delay_s":60,"duration_s":120,"label":"café"}'
    )
    assert parse(full.to_json()) == full


@pytest.mark.parametrize(
    "line",
    [
        "",
        "turn on",
        "[]",
        "{}",
        '{"device":"light"}',
        '{"action":"on","colour":"red"}',
        '{"action":"explode"}',
        '{"action": "on"}',
        '{"device":"light","action":"on"}',
        '{"action":"on","device":"kettle"}',
        '{"action":"on","room":"pantry"}',
        '{"action":"set","value":"30"}',
        '{"action":"set","value":30.0}',
        '{"action":"set","value":true}',
        '{"action":"set","unit":"kelvin"}',
        '{"action":"on","time":"24:00"}',
        '{"action":"on","time":"7:00"}',
        '{"action":"on","delay_s":1.5}',
        '{"action":"on","duration_s":-1}',
        '{"action":"timer","label":""}',
        '{"action":"timer","label":"Pasta"}',
        '{"action":"timer","label":"caf\\u00e9"}',
    ],
)
def test_anything_else_is_refused(line: str) -> None:
    with pytest.raises(ArgumentError):
        parse(line)


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("the pasta", "pasta"),
        ("to call mum", "call mum"),
        ("water my plants", "water my plants"),
        ("about the a cappella show", "cappella show"),
        ("that The Cake is ready", "cake is ready"),
        ("for an  hour of Yoga", "hour of yoga"),
        ("my eggs", "my eggs"),
        ("theatre tickets", "theatre tickets"),
        ("tofu", "tofu"),
    ],
)
def test_labels_lose_what_leads_and_keep_the_rest(said: str, label: str) -> None:
    assert label_of(said) == label
