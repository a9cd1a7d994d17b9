"""Times, spans and numbers: the contract's rules, and that what is said agrees with the answer."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm_export.builtin.amounts import degrees, fraction, implied_unit, percent
from edge_llm_export.builtin.answer import CLOCK
from edge_llm_export.builtin.clock import clock_time, span, to_24h
from edge_llm_export.builtin.numerals import SMALL, TENS, number_of, say_tenths, spell


@pytest.mark.parametrize(
    ("hour", "minute", "part", "answer"),
    [
        (5, 0, "pm", "17:00"),
        (9, 0, "pm", "21:00"),
        (6, 30, "morning", "06:30"),
        (11, 0, "night", "23:00"),
        (6, 0, "night", "18:00"),
        (5, 59, "night", "05:59"),
        (12, 30, "night", "00:30"),
        (7, 0, None, "07:00"),
        (12, 0, None, "12:00"),
        (12, 45, None, "12:45"),
        (12, 15, "am", "00:15"),
        (12, 15, "pm", "12:15"),
        (12, 0, "afternoon", "12:00"),
        (3, 0, "afternoon", "15:00"),
        (8, 0, "evening", "20:00"),
        (8, 0, "tonight", "20:00"),
        (18, 30, None, "18:30"),
        (18, 30, "evening", "18:30"),
        (0, 5, None, "00:05"),
    ],
)
def test_rules_for_times(hour: int, minute: int, part: str | None, answer: str) -> None:
    assert to_24h(hour, minute, part) == answer


def test_named_times() -> None:
    said = dict(clock_time(random.Random(seed)) for seed in range(6000))
    assert said["noon"] == "12:00"
    assert said["midday"] == "12:00"
    assert said["midnight"] == "00:00"
    assert said["half past six"] == "06:30"
    assert said["quarter to eight"] == "07:45"
    assert all(CLOCK.fullmatch(answer) for answer in said.values())
    assert not any(words.startswith("half ") and "past" not in words for words in said)


def test_twelve_without_a_part_of_the_day_is_the_noon_hour() -> None:
    for seed in range(20_000):
        words, answer = clock_time(random.Random(seed))
        if re.fullmatch(r"12(:\d\d)?|twelve|half past (12|twelve)", words):
            assert answer.startswith("12:"), words


@given(st.integers(0, 999), st.booleans(), st.booleans(), st.booleans())
def test_spelt_numbers_add_up(number: int, hyphen: bool, article: bool, link: bool) -> None:
    words = spell(number, hyphen=hyphen, article=article, link=link).replace("-", " ").split()
    total = 0
    for word in words:
        if word == "hundred":
            total *= 100
        elif word in SMALL:
            total += SMALL.index(word)
        elif word in TENS[2:]:
            total += 10 * TENS.index(word)
        else:
            assert word in ("a", "and")
            total += word == "a"
    assert total == number


@given(st.integers(0, 9999), st.integers(0, 2**32))
def test_numbers_in_digits_are_the_answers(tenths: int, seed: int) -> None:
    said = say_tenths(random.Random(seed), tenths, spoken=0.0)
    assert said == str(number_of(tenths))


SPANS = {
    "half an hour": 1800,
    "an hour and a half": 5400,
    "a quarter of an hour": 900,
    "three quarters of an hour": 2700,
    "1h": 3600,
    "90 seconds": 90,
    "2h": 7200,
    "5 min": 300,
    "twenty minutes": 1200,
    "two and a half hours": 9000,
    "12 minutes": 720,
}
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def test_spans() -> None:
    said = dict(span(random.Random(seed)) for seed in range(60_000))
    assert {words: said.get(words) for words in SPANS} == SPANS
    for words, seconds in said.items():
        parts = re.findall(r"(\d+(?:\.\d+)?) ?([hms])[a-z]*", words)
        if parts and not re.search(r"half|quarter|couple|dozen|\b(an?|one|two|point)\b", words):
            spelt = re.search(r"[a-z]{3,} (hour|minute|second)", words)
            if not spelt:
                assert sum(float(n) * _SECONDS[u] for n, u in parts) == seconds, words


def test_amounts() -> None:
    fan = {
        fraction(random.Random(seed), "fan")[0].text: fraction(random.Random(seed), "fan")
        for seed in range(3000)
    }
    for word, value in {
        "low": 33,
        "medium": 66,
        "high": 100,
        "half": 50,
        "halfway": 50,
        "a quarter": 25,
        "three quarters": 75,
        "full": 100,
        "max": 100,
        "maximum": 100,
        "min": 0,
        "minimum": 0,
    }.items():
        assert (fan[word].value, fan[word].unit) == (value, "percent")
    for seed in range(2000):
        amount = percent(random.Random(seed), bare=True)
        signed = "%" in amount.said.text or "per" in amount.said.text
        assert amount.unit == ("percent" if signed else None)
        heat = degrees(random.Random(seed), "thermostat")
        if heat.unit is None:
            digits = re.fullmatch(r"[\d.]+", heat.said.text)
            assert digits is None or heat.said.text == str(heat.value)
        if heat.said.text.endswith(("degrees", "°")):
            assert heat.unit == "celsius"


def test_units_of_bare_numbers() -> None:
    for device in ("light", "blinds", "fan", "speaker"):
        assert implied_unit(device) == "percent"
    for device in ("thermostat", "ac", "heater", "oven"):
        assert implied_unit(device) == "celsius"
    assert implied_unit("tv") is None
