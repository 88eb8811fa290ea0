"""Lets the scenarios happen to a tiny run, as real commands, and has them judged.

    DIRECTORY/
      dataset/      a few tokens of this installation's own source
      runs/NAME/    a run each, undisturbed ones too
      NAME.log      what its commands printed, with the second of each line

Invariant: nothing outside the directory is written, and no command outlives the drill, unless that
itself gets SIGKILL; then the tiny run comes to its end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import forescale
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.drill.judge import Command, Evidence, Interval, Told, Verdict, judge
from forescale.drill.scenarios import BASE, Scenario
from forescale.errors import DONE, UserError
from forescale.run.directory import Run, read_rows
from forescale.storage import check_table

_TOKENS = 30_000  # a shard


class Drill:
    """Of tiny runs in `directory` (empty, or not there yet), on `processes` ranks. limit: seconds
    that a command may take; what goes on for longer hangs."""

    def __init__(self, directory: Path, processes: int, limit: float):
        self.directory, self.processes, self.limit = directory.absolute(), processes, limit
        if directory.exists() and any(directory.iterdir()):
            raise UserError(str(directory), "is not empty", "give a drill a directory of its own")
        self._undisturbed: dict[tuple[str, ...], Evidence] = {}
        config = BuildConfig(
            vocab_size=512, validation=0.1, shard_tokens=_TOKENS, member_tokens=_TOKENS // 3
        )
        self.dataset = self.directory / "dataset"
        build_dataset(Files([Path(next(iter(forescale.__path__)))]), self.dataset, config)

    def undisturbed(self, settings: Sequence[str] = ()) -> Evidence:
        """A run that nothing happens to; made once for the same settings. Raises UserError where
        even that one fails."""
        key = tuple(settings)
        if key not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed) + 1}"
            run, command = self._command(name, settings)
            made = self._run(command, run, name)
            if made.code != DONE:
                log = self.directory / f"{name}.log"
                what = f"a run that nothing happens to ends with code {made.code}"
                raise UserError(str(log), what, "mend what it says, then drill")
            self._undisturbed[key] = Evidence(run, [made])
        return self._undisturbed[key]

    def run(self, scenario: Scenario) -> Verdict:
        """Let it happen; what became of the run."""
        undisturbed = self.undisturbed(scenario.settings)
        faults = f"faults=[{','.join(scenario.faults)}]"
        given = (*scenario.settings, *scenario.overrides, faults)
        run, command = self._command(scenario.name, given)
        commands: list[Command] = []
        signalled = None
        for code in scenario.codes:
            at = scenario.signal_at if not commands else None
            commands.append(self._run(command, run, scenario.name, at))
            signalled = signalled or self._signalled
            if commands[-1].code != code:
                break

        def fresh(skipped: Sequence[Interval]) -> Evidence:
            pairs = ",".join(f"[{first},{end}]" for first, end in skipped)
            return self.undisturbed(
                (*scenario.settings, *scenario.overrides, f"data.skip=[{pairs}]")
            )

        return judge(scenario, Evidence(run, commands, signalled), undisturbed, fresh)

    def _command(self, name: str, overrides: Sequence[str]) -> tuple[Run, list[str]]:
        root = self.directory / "runs"
        where = (f"run.root={root}", f"run.name={name}", f"data.path={self.dataset}")
        words = (*where, *BASE, f"launch.processes={self.processes}", *overrides)
        return Run(root / name), [sys.executable, "-P", "-m", "forescale", "train", *words]

    def _run(
        self, command: list[str], run: Run, name: str, signal_at: int | None = None
    ) -> Command:
        """One command, to its end or to the limit."""
        self._signalled: float | None = None
        said: list[Told] = []
        began = time.time()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # a line's time is when it is said
            start_new_session=True,  # Ctrl-C is for the drill
        )

        def listen() -> None:
            with open(self.directory / f"{name}.log", "a") as log:
                for line in process.stdout or ():
                    said.append(Told(time.time(), line.rstrip("\n")))
                    log.write(f"{said[-1].time - began:7.2f}  {line}")

        listener = Thread(target=listen)
        listener.start()
        try:
            while process.poll() is None and time.time() < began + self.limit:
                if signal_at is not None and self._has_made(run, signal_at):
                    process.send_signal(signal.SIGTERM)
                    self._signalled, signal_at = time.time(), None
                time.sleep(0.01)
            code = process.poll()
        finally:
            process.kill()  # its ranks go with it
            process.wait()
            listener.join()
        torn = [f for s in run.checkpoint_steps() for f in check_table(run.checkpoint_path(s))]
        return Command(code, began, time.time(), said, torn)

    @staticmethod
    def _has_made(run: Run, step: int) -> bool:
        return any(row.get("step", 0) >= step for row in read_rows(run.metrics))
