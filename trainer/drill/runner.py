"""Run the scenarios on a tiny run, as real commands, and judge them.

    DIRECTORY/
      dataset/      some source code of this installation
      runs/NAME/    the run of each scenario, and runs without faults
      NAME.log      the output of its commands, with the second of each line

Invariant: nothing is written outside the directory, and no command outlives the drill. If the drill
itself gets SIGKILL, the current tiny run still ends by itself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.drill.judge import Command, Evidence, Interval, Judgement, Line, judge
from forescale.drill.scenarios import BASE, Scenario
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import check_table
from forescale.run.directory import Run
from forescale.run.rows import read_rows

_TOKENS = 30_000  # tokens of a shard


class Drill:
    """Tiny runs in `directory` (empty or missing), on `processes` ranks.

    limit: seconds after which a command is killed. Raises UserError if the directory isn't empty.
    """

    def __init__(self, directory: Path, processes: int, limit: float):
        self.directory, self.processes, self.limit = directory.absolute(), processes, limit
        if directory.exists() and any(directory.iterdir()):
            raise UserError(str(directory), "is not empty", "choose an empty directory with to=DIR")
        self._undisturbed: dict[tuple[str, ...], Evidence] = {}
        config = BuildConfig(
            vocab_size=512, validation=0.1, shard_tokens=_TOKENS, member_tokens=_TOKENS // 3
        )
        self.dataset = self.directory / "dataset"
        build_dataset(Files([Path(__file__).parents[1]]), self.dataset, config)

    def undisturbed(self, settings: Sequence[str] = ()) -> Evidence:
        """Return a run without faults; made once for the same settings.

        Raises UserError if it fails.
        """
        key = tuple(settings)
        if key not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed) + 1}"
            run, command = self._command(name, settings)
            finished = self._run(command, run, name)
            if finished.code != DONE:
                log = self.directory / f"{name}.log"
                problem = f"a run without faults ended with code {finished.code}"
                raise UserError(str(log), problem, "fix the error in this log first")
            self._undisturbed[key] = Evidence(run, [finished])
        return self._undisturbed[key]

    def run(self, scenario: Scenario) -> Judgement:
        undisturbed = self.undisturbed(scenario.settings)
        faults = f"faults=[{','.join(scenario.faults)}]"
        overrides = (*scenario.settings, *scenario.overrides, faults)
        run, command = self._command(scenario.name, overrides)
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
        arguments = (*where, *BASE, f"launch.processes={self.processes}", *overrides)
        return Run(root / name), [sys.executable, "-P", "-m", "forescale", "train", *arguments]

    def _run(
        self, command: list[str], run: Run, name: str, signal_at: int | None = None
    ) -> Command:
        """Run one command to its end or to the time limit."""
        self._signalled: float | None = None
        lines: list[Line] = []
        began, end = time.time(), time.monotonic() + self.limit
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
            },  # so that the time of a line is when it is printed
            start_new_session=True,  # so that Ctrl-C reaches only the drill
        )

        def listen() -> None:
            with open(self.directory / f"{name}.log", "a") as log:
                for line in process.stdout or ():
                    lines.append(Line(time.time(), line.rstrip("\n")))
                    log.write(f"{lines[-1].time - began:7.2f}  {line}")

        listener = Thread(target=listen)
        listener.start()
        try:
            while process.poll() is None and time.monotonic() < end:
                if signal_at is not None and read_rows(run.metrics, after=signal_at - 1):
                    # Before it is sent: on a busy machine the ranks may answer first.
                    self._signalled, signal_at = time.time(), None
                    process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
            code = process.poll()
        finally:
            process.kill()  # its ranks end with it
            process.wait()
            listener.join()
        torn = [f for s in run.checkpoint_steps() for f in check_table(run.checkpoint_path(s))]
        return Command(code, began, time.time(), lines, torn)
