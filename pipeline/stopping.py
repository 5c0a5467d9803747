"""Being asked to stop: a signal to any rank, or a file that anyone can touch."""

import signal
from pathlib import Path
from types import FrameType

from pipeline.distributed import World, sum_over_ranks
from pipeline.errors import StopNow
from pipeline.heartbeat import STOP_FILE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """SIGTERM, SIGUSR1 or Ctrl-C to this rank, or a file `STOP` in the run directory.

    A rank that got a signal touches the file, so that the others, busy with something long, see it too.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes over the signals of this process."""
        self._file = run_dir / STOP_FILE
        self._asked = False
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def asked(self) -> bool:
        """What this rank knows. Not collective."""
        known = self._file.exists()
        if self._asked and not known:
            self._file.touch()
        return self._asked or known

    def agreed(self, world: World) -> bool:
        """Collective. True on every rank as soon as one was asked."""
        return sum_over_ranks([float(self.asked())], world.device)[0] > 0

    def clear(self) -> None:
        """The request was met, or is of an earlier run."""
        self._file.unlink(missing_ok=True)

    def ask(self) -> None:
        """As a signal does."""
        self._asked = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.ask()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait


def stop_at_once() -> None:
    """Lets the signals end a stage that keeps its work in finished files: it raises StopNow where it is."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise StopNow("stopped on request; the same command goes on with what is missing")

    for number in SIGNALS[:2]:
        signal.signal(number, leave)
