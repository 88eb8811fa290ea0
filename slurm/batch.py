"""The supervisor of a job, `python -P -m forescale.slurm.batch RUN JOB`, on its first node.

    preflight on every node -> ranks by srun -> their end -> policy -> the next life

Invariant: a job that ends here has said why, in its log and in the attempt; and what it decided
follows from the run's files, so that another life of the job decides alike.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.errors import CRASHED, DONE, INTERRUPTED, USER, UserError
from forescale.monitor.status import Status
from forescale.resilience import outcome
from forescale.resilience.launcher import ATTEMPT
from forescale.run.directory import Attempt, Run
from forescale.slurm import policy, queue, steps, verdicts
from forescale.slurm.preflight import Preflight, Report, Wanted
from forescale.slurm.submission import Submission

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_LOOK = 120.0  # seconds that the preflight may take
_LEAVE = 10.0  # seconds that nodes then have to leave
_PAUSE = 2.0  # seconds before ranks start again, twice as long after each crash


class Batch:
    """One life of a job. Made on the first of its nodes, inside of its batch script."""

    def __init__(self, run: Run, submission: Submission):
        self.run, self.submission, self.settings = run, submission, submission.settings
        self.job: TrainJob = thaw(TrainJob, run.config, trust=True)
        self.id = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.hosts = queue.hosts(os.environ["SLURM_JOB_NODELIST"])
        self.asked: str | None = None
        self._step: steps.Step | None = None
        self._deadline = float("inf")
        self._attempt: Attempt | None = None
        self._is_noted = False

    def live(self) -> int:
        """Until the job ends, or SLURM ends it. Returns the job's exit code."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)
        where = f"on {os.environ['SLURM_JOB_NODELIST']}"
        again = f", requeued {self.restart} times" if self.restart else ""
        self._say(f"Job {self.id} {where}{again}: run {self.run.path}.")
        if why := self._is_over():
            self._say(f"Nothing to do: {why}.")
            return DONE
        while True:
            code = self._attempt_once()
            past = policy.past(self.run, self._name)
            decision = policy.decide(
                code,
                past,
                self.hosts,
                is_stopped=self.submission.is_stopped,
                may_requeue=self.settings.requeue,
                state=self._state(),
                ill=queue.unusable(self.hosts) if code not in (DONE, INTERRUPTED, USER) else (),
            )
            self._say(f"{decision.why[0].upper()}{decision.why[1:]}.")
            if decision.deed == "end":
                return decision.code
            if decision.deed == "requeue":
                return self._requeue(decision)
            time.sleep(_PAUSE * 2 ** max(0, past.crashes - 1))

    @property
    def _name(self) -> str:
        return self.submission.name

    def _state(self) -> str:
        """SLURM's word for this life of the job. One whose node was cut off and is back must not
        act in the name of a job that runs elsewhere by now."""
        found = queue.show(self.id)
        lives_on = found.get("Restarts") == str(self.restart)
        return found.get("JobState", "") if lives_on else "overtaken"

    def _is_over(self) -> str | None:
        """Why no rank needs to start."""
        if self.submission.is_stopped:
            return "it was stopped while it waited"
        if Status(self.run).state == "complete":
            return f"the run is complete, {self.job.total_steps:,} steps"
        return None

    def _attempt_once(self) -> int:
        attempt = self.run.new_attempt()
        command = steps.ranks(self.submission, self.run.path, attempt.path, self._words())
        life: dict[str, Any] = {
            "job": self.id,
            "restart": self.restart,
            "submission": self._name,
            "nodes": self.hosts,
            # In the queue it was only before the first attempt of each life.
            "eligible": None if self._attempt else queue.eligible(self.id),
        }
        world = self.settings.nodes * self.settings.ranks_per_node
        outcome.begin(attempt.path, command, world, slurm=life)
        self._attempt = attempt
        if faults := self._preflight(attempt):
            return self._end(attempt, faults)
        if self.asked:
            return self._end(attempt, verdicts.Verdict(INTERRUPTED, 0, "interrupted before ranks"))
        self._say(f"Attempt {attempt.number}: {world} ranks; logs {attempt.path}/rank-*.log")
        port = str(_free_port())
        log = attempt.path / "srun.log"
        self._step = steps.Step(command, self._environment(attempt, port), log)
        code = self._step.wait(self._is_late, self._number)
        failed, self._step = self._step.failures, None
        return self._end(attempt, verdicts.judge(attempt.path, code, failed, bool(self.asked)))

    def _is_late(self) -> bool:
        """Whether the ranks were asked to end, and have had their time."""
        if self.asked and self._attempt and not self._is_noted:
            # So that an end that comes before ours is not taken for a crash.
            outcome.note(self._attempt.path, asked=self.asked)
            self._is_noted = True
        return time.monotonic() > self._deadline

    def _words(self) -> list[str]:
        return ["trust=true"] if self.submission.facts.get("trust") else []

    def _number(self) -> str:
        """JOB.STEP of the running step: ours are one after the other."""
        return queue.newest_step(self.id)

    def _environment(self, attempt: Attempt, port: str) -> dict[str, str]:
        """Of all ranks."""
        each = str(self.settings.ranks_per_node)
        found = {
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": each,
            ATTEMPT: str(attempt.path),
            # See forescale.resilience.launcher: threads that spin cost a busy node dearly.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        }
        if "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(self.settings.cpus_per_task or 1)
        return found

    def _end(self, attempt: Attempt, verdict: verdicts.Verdict) -> int:
        more = {"blamed": verdict.blamed, "unfit": verdict.unfit, "asked": self.asked}
        outcome.end(attempt.path, verdict.code, verdict.how, verdict.rank, **more)
        self._say(f"Attempt {attempt.number}: {verdict.how.rstrip('.')}.")
        return verdict.code

    def _preflight(self, attempt: Attempt) -> verdicts.Verdict | None:
        """Prepare all nodes and look at them; None where all is well."""
        facts = self.submission.facts
        wanted = Wanted(
            run=str(self.run.path),
            data=facts["data"],
            tasks=self.settings.ranks_per_node,
            gpus=self.settings.gpus_per_node,
            memory=facts.get("memory"),
            scratch=os.environ["FORESCALE_SCRATCH"],
            scratch_bytes=2**30,
            reduce=self.settings.allreduce,
            cuda=bool(self.settings.gpus_per_node),
        )
        log = attempt.path / "preflight.log"
        looks = Preflight(wanted, self.hosts, self.hosts[0])
        step = steps.Step(steps.nodes(self.submission), looks.environment, log)
        if self.settings.preflight:
            report = looks.collect(lambda: self._is_enough(step), _LOOK)
            (attempt.path / "preflight.json").write_text(json.dumps(asdict(report), indent=2))
        end = time.monotonic() + (_LEAVE if self.settings.preflight else _LOOK)
        code = step.wait(lambda: bool(self.asked) or time.monotonic() > end, self._number)
        if self.asked:
            return verdicts.Verdict(INTERRUPTED, 0, "interrupted while nodes were looked at")
        if self.settings.preflight:
            return self._judge(report)
        looks.close()
        how = f"the nodes could not be prepared (srun ended with code {code}, see {log})"
        return verdicts.Verdict(CRASHED, 0, how) if code else None

    def _is_enough(self, step: steps.Step) -> bool:
        return bool(self.asked) or step.is_over or step.has_failed

    def _judge(self, report: Report) -> verdicts.Verdict | None:
        for note in report.notes:
            self._say(f"Note: {note}")
        if not report.faults:
            rate = f", all-reduce {report.gb_per_second:.2f} GB/s" if report.gb_per_second else ""
            self._say(f"{len(self.hosts)} nodes are well ({report.seconds:.1f} s{rate}).")
            return None
        for fault in report.faults:
            self._say(fault.sentence)
        common, unfit = report.common, report.of_nodes
        if common and len(self.hosts) == 1 and not policy.past(self.run, self._name).unfit:
            # Whether another node would be better nobody can tell from one: it is tried once.
            unfit = {self.hosts[0]: "; ".join(f.what for f in common)}
        elif common:
            # That nobody came, or met another, is no fault of the config: srun may have failed.
            mute = all(f.kind in ("silent", "network") for f in common)
            return verdicts.Verdict(CRASHED if mute else USER, 0, common[0].sentence)
        # Seen before anything was lost: such a node is left out at once.
        how = "; ".join(f"{host}: {what}" for host, what in unfit.items())
        return verdicts.Verdict(CRASHED, 0, f"preflight: {how}", unfit=unfit)

    def _requeue(self, decision: policy.Decision) -> int:
        """Ask for the next life. SLURM ends this one while we wait."""
        out = decision.exclude
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        try:
            if out and queue.num_usable(partition, out) < len(self.hosts):
                self._say(f"Without {', '.join(out)} too few nodes are left; not left out.")
                out = ()
            queue.requeue(self.id, [*self.settings.exclude, *out] if out else ())
        except UserError as e:
            self._say(f"{e} Submit the run again to go on.")
            return decision.code
        time.sleep(300)
        return decision.code

    def _hear(self, number: int, frame: object) -> None:
        """The time limit is near, or SLURM or a user wants the job to end."""
        if self.asked is None:
            self.asked = signal.Signals(number).name
            grace = self.job.launch.grace.seconds or 0.0
            self._deadline = time.monotonic() + grace + 10
            self._say(f"{self.asked}: ranks save and end, in at most {grace:.0f} s.")
        if self._step is not None:
            self._step.tell()

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def main(words: Sequence[str]) -> int:
    faulthandler.register(signal.SIGUSR2)  # scancel -b -s USR2: its log shows where it is
    try:
        return Batch(Run(words[0]), Submission(Path(words[1]))).live()
    except UserError as e:
        print(f"forescale: {e}", file=sys.stderr)
        return e.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
