"""Jobs that wait for a row, in the order in which they shall get one."""

from __future__ import annotations

import time
from collections.abc import Iterator

from edge_llm.engine.job import Job
from edge_llm.errors import QueueFullError

__all__ = ["WaitingJobs"]

AGING_SECONDS = 5.0
"""After waiting this much longer, a job comes before one whose priority is higher by 1."""


class WaitingJobs:
    """At most so many jobs: by priority, and of the same priority in the order of their coming.

    A job's rank rises while it waits, so that no stream of more important ones holds it off for
    ever. Not safe for threads: the engine's lock guards it.

    Args:
        limit: Most jobs that wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: object) -> bool:
        return job in self._jobs

    def __iter__(self) -> Iterator[Job]:
        """The jobs, the next one first; any may be removed meanwhile."""
        now = time.perf_counter()
        return iter(
            sorted(self._jobs, key=lambda job: (job.created - now) / AGING_SECONDS - job.priority)
        )

    def add(self, job: Job, *, free: int = 0) -> None:
        """Let a job wait.

        Args:
            job: Which.
            free: Rows that stand ready: so many jobs go as soon as the engine sees them, and are
                not counted.

        Raises:
            QueueFullError: There are as many as may be.
        """
        if len(self._jobs) >= self.limit + free:
            raise QueueFullError(self.limit)
        self._jobs.append(job)

    def remove(self, job: Job) -> bool:
        """Let a job wait no longer; False where it did not."""
        try:
            self._jobs.remove(job)
        except ValueError:
            return False
        return True

    def clear(self) -> None:
        """Let none wait any longer."""
        self._jobs.clear()
