"""How much is sent and how often something is killed: one share of the tasks for each kill."""

import random
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    tasks: int
    kills: int
    # Copies of the worker of lane default, and of the dispatcher.
    copies: int
    # Seconds from, to: between the moment that a burst's victim is at work and its kill, until it
    # is started again, and from then to the next burst.
    kill_after_s: tuple[float, float]
    down_s: tuple[float, float]
    up_s: tuple[float, float]
    # Nothing moved for so long: no more comes.
    quiet_s: float


# A share of the victims is killed without a look at whether it works: at its start, for one.
BLIND = 0.2
# A worker is at work when it runs so many tasks.
AT_WORK = 3
# So long a burst waits for its victim to come back and work.
WORK_S = 15.0


class Bursts:
    """Lets through an equal share of the tasks for each kill."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self.share = size.tasks / size.kills
        self.begun = 0
        self.dice = random.Random(seed)

    def may_send(self, number: int) -> bool:
        return number < self.begun * self.share

    def is_sent(self, sent: Sized) -> bool:
        """What was let through has been sent."""
        return len(sent) >= min(self.size.tasks, int(self.begun * self.share))

    def run(
        self,
        victims: Iterable[str],
        kill: Callable[[str], object],
        start: Callable[[str], object],
        wait_for_work: Callable[[str], object],
        wait_until_sent: Callable[[], object],
    ) -> None:
        """A burst and a kill in its middle, for each victim; then the rest of the burst."""
        for name in victims:
            self.begun += 1
            if self.dice.random() >= BLIND:
                wait_for_work(name)
            time.sleep(self.dice.uniform(*self.size.kill_after_s))
            kill(name)
            time.sleep(self.dice.uniform(*self.size.down_s))
            start(name)
            time.sleep(self.dice.uniform(*self.size.up_s))
            wait_until_sent()


def victims(names: list[str], kills: int, seed: int) -> list[str]:
    """Whom to kill, in order: each once, then at random."""
    dice = random.Random(seed)
    return [names[n] if n < len(names) else dice.choice(names) for n in range(kills)]
