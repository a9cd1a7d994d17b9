"""The generator: seeded pairs of request and answer, on one side of the held-out line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .changing import change_command, comparative_command, dimming_room_command
from .chatter import chatter
from .phrase import Rng, weighted
from .querying import bare_query, climate_query, clock_query, level_query, state_query
from .refusals import (
    colour_request,
    foreign_device,
    foreign_room,
    near_miss,
    other_errand,
    report,
)
from .reminding import (
    alarm_request,
    bare_request,
    cancel_request,
    reminder_request,
    timer_request,
)
from .sensing import sensor_message
from .setting import (
    climate_command,
    garage_halfway,
    preheat_command,
    set_command,
)
from .shapes import Draft, is_held
from .spoiling import clock_misuse, double, spoilt
from .switching import (
    cleaning_command,
    everything_command,
    music_command,
    pronoun_command,
    silence_command,
    switch_command,
)
from .wrapping import dress

Maker = Callable[[Rng, bool], Draft]


class Sample(NamedTuple):
    """One pair, with what the figures are reported by and what the split was decided by."""

    request: str
    answer: str
    kind: str
    shape: str
    combo: str


def _plain(make: Callable[[Rng], Draft]) -> Maker:
    return lambda rng, held: make(rng)


# The shares of the mixture in the stages of training. Later, what is hard to learn weighs
# more: near-misses, lengths of time, and above all the comparison of numbers in sensor messages.
MIXTURE: tuple[tuple[Maker, tuple[float, float, float, float, float]], ...] = (
    (_plain(switch_command), (17.0, 13.0, 13.0, 16.0, 16.0)),
    (_plain(everything_command), (1.0, 1.0, 1.0, 1.5, 1.5)),
    (_plain(music_command), (0.6, 0.9, 1.2, 1.2, 1.2)),
    (_plain(cleaning_command), (1.6, 1.3, 1.3, 1.3, 1.3)),
    (_plain(pronoun_command), (0.6, 0.6, 0.6, 0.8, 0.8)),
    (_plain(silence_command), (0.7, 0.7, 0.7, 0.7, 0.7)),
    (_plain(set_command), (8.0, 7.0, 7.0, 8.0, 8.0)),
    (_plain(climate_command), (3.5, 3.0, 3.0, 3.0, 3.0)),
    (_plain(dimming_room_command), (0.7, 0.7, 0.7, 0.7, 0.7)),
    (_plain(preheat_command), (0.7, 0.7, 0.7, 0.7, 0.7)),
    (_plain(garage_halfway), (0.15, 0.15, 0.15, 0.15, 0.15)),
    (_plain(change_command), (5.5, 4.5, 4.5, 5.0, 5.0)),
    (_plain(comparative_command), (2.5, 2.0, 2.0, 2.0, 2.0)),
    (timer_request, (8.0, 9.0, 9.0, 10.0, 10.0)),
    (alarm_request, (6.5, 6.5, 6.5, 7.5, 8.5)),
    (reminder_request, (10.0, 10.0, 10.0, 10.0, 10.0)),
    (cancel_request, (3.5, 3.5, 3.5, 4.0, 4.0)),
    (_plain(bare_request), (0.4, 0.4, 0.4, 0.4, 0.4)),
    (_plain(state_query), (3.6, 3.6, 5.0, 5.0, 6.0)),
    (_plain(level_query), (1.2, 1.2, 2.0, 2.0, 2.0)),
    (_plain(climate_query), (1.6, 1.6, 2.5, 2.5, 2.5)),
    (clock_query, (2.2, 2.2, 2.2, 2.2, 3.5)),
    (_plain(bare_query), (0.3, 0.3, 0.3, 0.5, 0.5)),
    (_plain(sensor_message), (6.0, 9.0, 26.0, 18.0, 34.0)),
    (spoilt, (4.5, 6.0, 6.0, 6.0, 6.0)),
    (double, (2.8, 4.0, 4.0, 4.0, 4.0)),
    (_plain(foreign_device), (2.2, 4.0, 4.5, 4.5, 5.0)),
    (_plain(foreign_room), (1.5, 2.5, 3.0, 3.0, 4.5)),
    (_plain(colour_request), (0.5, 0.6, 0.6, 0.6, 0.6)),
    (_plain(near_miss), (2.2, 3.5, 4.5, 4.5, 4.5)),
    (_plain(other_errand), (1.9, 2.5, 3.5, 3.5, 3.5)),
    (_plain(report), (0.5, 1.0, 1.0, 1.0, 1.0)),
    (clock_misuse, (1.6, 2.0, 2.0, 2.0, 2.0)),
    (_plain(chatter), (4.5, 4.5, 4.5, 4.5, 4.5)),
)


def samples(seed: int, *, held_out: bool = False, stage: int = 0) -> Iterator[Sample]:
    """An endless stream of pairs.

    Args:
        seed: Same seed, same stream.
        held_out: Draw from the held-out side: only shapes and combinations of action, device and
            room that the training side rejects, labels from words that it never uses.
        stage: Whose shares of the mixture to draw in, 0 to 4.

    Yields:
        Samples.
    """
    rng = random.Random(f"{seed}/{held_out}")
    shares = [(maker, weights[stage]) for maker, weights in MIXTURE]
    while True:
        maker = weighted(rng, shares)
        sample = _drawn(rng, maker, held_out)
        if sample is not None:
            yield sample


def _drawn(rng: Rng, maker: Maker, held_out: bool) -> Sample | None:
    """One sample of this maker, so that rejection does not change the mixture."""
    for _ in range(200):
        made = maker(rng, held_out)
        if is_held(made) == held_out:
            return Sample(dress(rng, made), made.answer, made.kind, made.shape, made.combo)
    return None
