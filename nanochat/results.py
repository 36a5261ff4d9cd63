"""Results of an evaluation's finished tasks on disk, so that the same command goes on where it was interrupted."""

import json
from pathlib import Path

from nanochat import ranks


class FinishedTasks:
    """Name -> result of each finished task: a file with a line of settings, then one line a task.

    With other settings it starts afresh. Rank 0 reads and writes; `done` is the same on all ranks.
    """

    def __init__(self, path: Path, settings: dict, is_main: bool):
        self.path, self.is_main, self.done = path, is_main, {}
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.done = self._read(settings)
            lines = [json.dumps(settings), *(json.dumps({name: result}) for name, result in self.done.items())]
            path.write_text("".join(line + "\n" for line in lines))
        self.done = json.loads(ranks.gather(json.dumps(self.done))[0])

    def _read(self, settings: dict) -> dict:
        done = {}
        try:
            first, *lines = self.path.read_text().splitlines()
            if json.loads(first) == json.loads(json.dumps(settings)):
                for line in lines:
                    done |= json.loads(line)
        except (OSError, ValueError):  # none yet, or a line that a crash cut off
            pass
        return done

    def add(self, name: str, result: dict) -> None:
        self.done[name] = result
        if self.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps({name: result}) + "\n")

    def close(self) -> None:
        """All tasks are finished: the next run begins anew."""
        if self.is_main:
            self.path.unlink(missing_ok=True)
