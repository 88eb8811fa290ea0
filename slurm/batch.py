"""The supervisor of a job, `python -P -m forescale.slurm.batch RUN JOB`, on its first node. The
batch script passes SLURM's signals on to it, and requeues the job if the supervisor is killed.

    preflight on every node -> srun starts tasks, which fork ranks -> ranks end -> policy
        -> next attempt (of the same tasks, where no node is suspected) or requeue

A job with spare nodes has more than an attempt: the others replace lost and faulty ones. Where the
number of nodes is a range, an attempt has as many as are there and well.

Invariant: whenever the job ends, its log and the attempt contain the reason. Decisions depend on
the run's files alone, so every start of the job decides alike.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

from forescale.checkpoint.mirror import mirror_of
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.ground.console import span
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, USER, UserError
from forescale.ground.rendezvous import free_port
from forescale.monitor.status import Status
from forescale.resilience import outcome
from forescale.resilience.launcher import ATTEMPT
from forescale.resilience.rank_log import remove_old
from forescale.run.directory import Attempt, Run
from forescale.slurm import policy, queue, steps
from forescale.slurm.growth import growth_of
from forescale.slurm.preflight.collect import Preflight
from forescale.slurm.preflight.findings import PreflightReport, Requirements
from forescale.slurm.submission import Submission
from forescale.slurm.warm import WarmStep

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_LEAVE = 10.0  # seconds that their processes then have to end
_PAUSE = 2.0  # seconds before ranks start again, doubled after each crash or refusal of SLURM
_LONGEST_PAUSE = 64.0
_STANDBYS = 2  # nodes beside the first that watch it: both may be lost with it
_GROWTH = "growth"  # in the place of a signal: the attempt ends, to get more nodes
_SLOW = 5  # as so many refusals counts one that takes slurm.start_time


class Batch:
    """Supervises one start of a job, in its batch script on its first node."""

    def __init__(self, run: Run, submission: Submission):
        self.run, self.submission, self.settings = run, submission, submission.settings
        self.job: TrainJob = thaw(TrainJob, run.config, trust=True)
        self.id, self.name = queue.own_job(), submission.name
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.job_hosts = queue.hosts(os.environ["SLURM_JOB_NODELIST"])  # the first is this one
        # Numbers of nodes that the run can use, the largest first.
        self.sizes = submission.sizes
        self.hosts = self.job_hosts[: self.sizes[0]]  # those of the attempt
        self.stop_signal: str | None = None
        self._step: WarmStep | None = None  # of the ranks; between attempts, if its tasks wait
        self._standbys: dict[str, steps.JobStep] = {}  # by node
        self._deadline = float("inf")
        self._attempt: Attempt | None = None
        self._is_noted = False
        self._how = ""  # how the last attempt ended
        self._limit = ""  # why the attempt has no more nodes
        self._may_grow = True

    def supervise(self) -> int:
        """Run attempts until the job ends or SLURM ends it. Return the job's exit code."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)
        where = f"on {os.environ['SLURM_JOB_NODELIST']}"
        again = f", requeued {self.restart} times" if self.restart else ""
        self._log(f"Job {self.id} {where}{again}: run {self.run.path}.")
        if over := self._is_over():
            return self._say(over)
        mirror = mirror_of(self.run, self.job, self._log)
        if mirror:
            mirror.start()
        while True:
            code = self._attempt_once()
            past = policy.past(self.run, self.name)
            decision = self._decide(code, past)
            self._say(decision)
            if decision.action != "restart":
                self._end_step()
            if decision.action == "end":
                if not self.submission.is_stopped:
                    reason = "" if decision.code == DONE else f"; {decision.why}"
                    outcome.notify(self.run, decision.code, f"{self._how}{reason}.", self._log)
                if mirror:
                    mirror.close(lambda: time.monotonic() > self._deadline)
                return decision.code
            if decision.action == "requeue":
                out = decision.exclude
                try:
                    exclude = [*self.settings.exclude, *out] if out else ()
                    queue.requeue(self.id, exclude, decision.pause)
                except UserError as e:
                    if self.stop_signal == _GROWTH:
                        self._log(f"{e} It goes on with the nodes that it has.")
                        self.stop_signal, self._deadline = None, float("inf")
                        self._is_noted = self._may_grow = False
                        continue
                    self._log(f"{e} Submit the run again to resume.")
                else:
                    time.sleep(300)  # SLURM ends this start meanwhile
                return decision.code
            times = max(past.crashes - 1, past.refusals)  # none after one crash
            pause = _PAUSE * 2 ** (times - 1) if times > 0 else 0.0
            end = time.monotonic() + min(pause, _LONGEST_PAUSE)
            while time.monotonic() < end and not self.stop_signal:
                time.sleep(0.1)

    def _say(self, decision: policy.JobDecision) -> int:
        self._log(f"{decision.why[0].upper()}{decision.why[1:]}.")
        return decision.code

    def _decide(self, code: int, past: policy.Past) -> policy.JobDecision:
        out = tuple(past.excluded)
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        least = self.sizes[-1] + self.settings.spares  # nodes without which the job can't start
        may_be_lost = code not in (DONE, INTERRUPTED, USER)
        return policy.decide(
            code,
            past,
            self.hosts,
            is_stopped=self.submission.is_stopped,
            may_requeue=self.settings.requeue,
            state=self._state(),
            others=[host for host in self.job_hosts if host not in self.hosts],
            down=queue.lost(self.id, self.job_hosts) if may_be_lost else (),
            sizes=self.sizes,
            enough=not out or queue.num_usable(partition, out) >= least,
            most=self.settings.max_requeues,
        )

    def _state(self) -> str:
        """Return SLURM's state of this start of the job, or "" if the job started again: after a
        network failure, an old supervisor may still run while the job runs elsewhere."""
        facts = queue.show(self.id)
        is_current = facts.get("Restarts") == str(self.restart)
        return facts.get("JobState", "") if is_current else ""

    def _is_over(self) -> policy.JobDecision | None:
        """Return why no rank needs to start, and the exit code of the job; or None. A job that was
        stopped ends as one that was stopped later: jobs that wait for its success must not start.
        """
        if self.submission.is_stopped:
            why = "nothing to do: the job was stopped while it waited"
            return policy.JobDecision("end", INTERRUPTED, why)
        if Status(self.run).state == "complete":
            why = f"nothing to do: the run is complete, {self.job.total_steps:,} steps"
            return policy.JobDecision("end", DONE, why)
        # SLURM requeues by itself, too: of that only the next start can count.
        return policy.give_up(policy.past(self.run, self.name), self.settings.max_requeues)

    def _choose_nodes(self) -> None:
        """Set the nodes of the next attempt, and start standbys on two of them."""
        settings = self.settings
        if not (settings.spares or settings.nodes.is_range):
            return
        out = policy.past(self.run, self.name).excluded
        down = queue.lost(self.id, self.job_hosts)
        before = self.hosts
        self.hosts = policy.chosen(before, self.job_hosts, out, down, self.sizes)
        gone = [host for host in before if host not in self.hosts]
        new = [host for host in self.hosts if host not in before]
        rest = [host for host in self.job_hosts if host not in (*self.hosts, *out, *down)]
        why = {host: out.get(host, "it is down") for host in gone if host not in rest}
        for old, spare in zip(gone, new, strict=False):
            self._log(f"Node {spare} takes the place of {old} ({why.pop(old)}).")
        if settings.nodes.is_range:
            without = "".join(f", without {host} ({reason})" for host, reason in why.items())
            self._limit = f"{len(self.hosts)} of the job's {len(self.job_hosts)} nodes{without}"
            if rest[self.settings.spares :] or (rest and len(self.hosts) < self.sizes[0]):
                idle = f"{', '.join(rest)} {'are' if rest[1:] else 'is'} idle"
                count = len(self.hosts) + len(rest)
                self._limit += f"; {idle}: {count} nodes is no size of this run"
            self._log(f"It trains on {self._limit}; slurm.nodes={settings.nodes}.")
        # Not on the first node of the job, which they watch.
        others = [host for host in self.job_hosts[1:] if host not in down]
        others.sort(key=lambda host: host in self.hosts)
        standbys = {host: step for host, step in self._standbys.items() if not step.is_over}
        for host in others[: -_STANDBYS - 1 : -1] if settings.outlives_nodes else ():
            if len(standbys) < _STANDBYS and host not in standbys:
                words = [self.id, str(self.restart), "requeue" if settings.requeue else "cancel"]
                command = steps.standby(self.submission, host, words)
                log = self.submission.path / f"{steps.STANDBY}.log"
                standbys[host] = steps.JobStep(command, {}, log)
        self._standbys = standbys

    def _attempt_once(self) -> int:
        self._choose_nodes()
        attempt = self.run.new_attempt()
        Thread(target=remove_old, args=[[a.path for a in self.run.attempts()]], daemon=True).start()
        words = ["trust=true"] if self.submission.facts.get("trust") else []
        command = steps.ranks(self.submission, self.hosts, self.run.path, attempt.path, words)
        start: dict[str, Any] = {
            "job": self.id,
            "restart": self.restart,
            "submission": self.name,
            "nodes": self.hosts,
            # The job waited in the queue only before the first attempt of each start.
            "eligible": None if self._attempt else queue.eligible(self.id),
        }
        world = len(self.hosts) * self.settings.ranks_per_node
        limit = {"limit": self._limit} if len(self.hosts) < self.sizes[0] else {}
        outcome.record_start(attempt.path, command, world, slurm=start, **limit)
        self._attempt = attempt
        if self._step and not (self._step.is_warm and self._step.hosts == self.hosts):
            self._end_step()
        if not self._step and (faults := self._preflight(attempt)):
            return self._end(attempt, faults)
        if self.stop_signal:
            how = "interrupted before ranks"
            return self._end(attempt, policy.AttemptOutcome(INTERRUPTED, 0, how))
        steps_over = [step for step in self._standbys.values() if step.is_over]
        if steps_over and len(steps_over) == len(self._standbys):
            todo = "if this node is lost, cancel the job and submit the run again"
            self._log(f"Note: the standby has ended (see {steps_over[0].log}): {todo}.")
        each = steps.cpus_per_rank(self.settings)
        cpus = f" of {each} CPUs" if each > 1 else ""
        self._log(f"Attempt {attempt.number}: {world} ranks{cpus}; logs {attempt.path}/node-*.log")
        environment = self._environment(attempt, str(free_port()))
        log = attempt.path / "srun.log"
        self._step = step = self._step or WarmStep(command, environment, log, self.hosts, world)
        is_over = Event()
        if self._may_grow and len(self.hosts) < self.sizes[0]:
            Thread(target=self._grow, args=[is_over], daemon=True).start()
        if self.settings.outlives_nodes:
            Thread(target=self._release, args=[attempt, is_over, step], daemon=True).start()
        code = step.train(attempt.path, environment, self._is_late, self.id)
        is_over.set()
        stopped, observed = bool(self.stop_signal), (step.lost_node, step.refusal)
        end = policy.outcome_of(attempt.path, code, step.failures, stopped, *observed)
        if not step.is_warm or end.needs_preflight:
            self._end_step()
        return self._end(attempt, end)

    def _end_step(self) -> None:
        """End the tasks that wait for another attempt."""
        step, self._step = self._step, None
        if step and not step.is_over:
            step.finish(self._is_late, self.id)

    def _release(self, attempt: Attempt, is_over: Event, step: WarmStep) -> None:
        """Once ranks wait for others, give up the nodes that can't be reached: SLURM would hold the
        steps on all nodes until it does so itself, after SlurmdTimeout. For a thread.

        Only nodes that have answered before (a site may close the port), and that don't answer at
        two looks in a row. Where this node is cut off, SLURM doesn't answer either."""
        answered: set[str] | None = None
        silent, problem = list[str](), ""
        while not is_over.wait(2.0):
            try:
                if answered is None:
                    answered = {*self.hosts}.difference(queue.unreachable(self.hosts))
                hangs = outcome.hang_of(attempt.path)
                gone = [h for h in queue.unreachable(self.hosts) if h in answered] if hangs else []
                before, silent = silent, gone
                if not gone or gone != before:
                    continue
                left = [host for host in self.job_hosts if host not in gone]
                left = [host for host in left if host not in queue.lost(self.id, left)]
            except Exception as e:  # such as a controller that is away; the next look may succeed
                if not isinstance(e, UserError) and problem != (problem := _sentence(e)):
                    self._log(f"Note: whether nodes can be reached isn't known now: {problem}")
                continue
            if is_over.is_set():
                return
            names = ", ".join(gone)
            try:
                queue.keep_nodes(self.id, left)
            except Exception as e:
                why = _sentence(e)
                self._log(f"{names} can't be reached, but SLURM doesn't take nodes back: {why}")
                return
            self._log(f"Given up, because it can't be reached: {names}.")
            step.process.kill()  # srun would wait for them; what it leaves ends with its step
            return

    def _grow(self, is_over: Event) -> None:
        """While the attempt runs, look from time to time whether to end it, and to requeue the job
        for more nodes. For a thread."""
        interval = self.settings.grow.seconds if self.settings.grow else None
        while interval and not (is_over.wait(interval) or self.stop_signal):
            try:
                lost = queue.lost(self.id, self.job_hosts)
                held = [host for host in self.job_hosts if host not in lost]
                now = len(self.hosts)
                growth = growth_of(self.run, self.submission, self.job, self.id, now, held)
                if growth and not is_over.is_set():
                    gain, price = span(growth.gain), span(growth.price)
                    why = f"they save {gain}, and the restart takes {price}"
                    self._log(f"{growth.nodes} nodes could be used, now it has {now}: {why}.")
                    self._stop(_GROWTH)
            except Exception as e:  # such as a controller that is away; the next look may succeed
                self._log(f"Note: whether more nodes are free isn't known now: {_sentence(e)}")

    def _is_late(self) -> bool:
        """True if the ranks got a signal to end and their time is over."""
        if self.stop_signal and self._attempt and not self._is_noted:
            # If the supervisor is killed now, the attempt must not count as a crash.
            outcome.add_to_launch(self._attempt.path, stop_signal=self.stop_signal)
            self._is_noted = True
        return time.monotonic() > self._deadline

    def _environment(self, attempt: Attempt, port: str) -> dict[str, str]:
        """Return environment variables for all ranks."""
        variables = {
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": str(self.settings.ranks_per_node),
            ATTEMPT: str(attempt.path),
            # See resilience/launcher.py: threads that spin slow down a busy node.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        }
        if "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(steps.cpus_per_rank(self.settings))
        return variables

    def _end(self, attempt: Attempt, end: policy.AttemptOutcome) -> int:
        facts = {"blamed": end.blamed, "faulty": end.faulty, "stop_signal": self.stop_signal}
        refused = {"refused": end.refused} if end.refused else {}
        self._how = f"Attempt {attempt.number}: {end.how.rstrip('.')}"
        self._log(f"{self._how}.")
        try:
            outcome.record_end(attempt.path, end.code, end.how, end.rank, **facts, **refused)
        except UserError as e:  # such as a full disk; the decision is made by now
            self._log(f"Its end could not be recorded: {e}")
        return end.code

    def _preflight(self, attempt: Attempt) -> policy.AttemptOutcome | None:
        """Prepare and check the attempt's nodes. Return an outcome if ranks can't start, else None.
        A spare node is checked when it takes the place of another: its faults, or its silence, must
        not hold up an attempt that doesn't need it."""
        facts = self.submission.facts
        requirements = Requirements(
            run=str(self.run.path),
            data=facts["data"],
            tasks=self.settings.ranks_per_node,
            gpus=self.settings.gpus,
            memory=facts.get("memory"),
            scratch=os.environ["FORESCALE_SCRATCH"],
            scratch_bytes=2**30,
            reduce=self.settings.allreduce,
            cuda=self.settings.has_gpus,
        )
        log = attempt.path / "preflight.log"
        command = steps.nodes(self.submission, self.hosts, self.job_hosts)
        preflight = Preflight(requirements, self.hosts, self.job_hosts[0])
        step = steps.JobStep(command, preflight.environment, log)
        start_time = self.settings.start_time.seconds or 0.0
        if self.settings.preflight:
            report = preflight.collect(
                lambda: bool(self.stop_signal) or step.is_over or step.has_failed,
                self.settings.check_time.seconds or 0.0,
                start_time,
                step.phase_of,
            )
            with suppress(OSError):  # a record for people; its faults are logged below
                (attempt.path / "preflight.json").write_text(json.dumps(asdict(report), indent=2))
            silent = {fault.host for fault in report.faults if fault.kind == "silent"}
            # As srun waits for nodes that it has asked in vain, it says nothing.
            never_began = silent.issuperset(self.hosts) and step.has_not_begun(self.id)
        end = time.monotonic() + (_LEAVE if self.settings.preflight else start_time)
        code = step.wait(lambda: bool(self.stop_signal) or time.monotonic() > end, self.id)
        if self.stop_signal:
            return policy.AttemptOutcome(INTERRUPTED, 0, "interrupted during the preflight")
        if refusal := step.refusal:
            return policy.refused(refusal)
        if self.settings.preflight and never_began:
            return policy.refused(f"no step was created in {start_time:.0f} s", _SLOW)
        if self.settings.preflight:
            return self._judge(report)
        preflight.close()
        how = f"the nodes could not be prepared (srun ended with code {code}; see {log})"
        return policy.AttemptOutcome(CRASHED, 0, how) if code else None

    def _judge(self, report: PreflightReport) -> policy.AttemptOutcome | None:
        for note in report.notes:
            self._log(f"Note: {note}")
        if not report.faults:
            rate = f", all-reduce {report.gb_per_second:.2f} GB/s" if report.gb_per_second else ""
            summary = f"{len(self.hosts)} nodes passed the preflight"
            self._log(f"{summary} ({report.seconds:.1f} s{rate}).")
            return None
        for fault in report.faults:
            self._log(fault.sentence)
        common, faulty = report.common, report.of_nodes
        if common and len(self.hosts) == 1 and not policy.past(self.run, self.name).faulty:
            # One node alone can't tell whether another would work: try another one once.
            faulty = {self.hosts[0]: "; ".join(f.problem for f in common)}
        elif common:
            # If no node answers or connects, srun may have failed: not a problem of the config.
            mute = all(f.kind in ("silent", "network") for f in common)
            return policy.AttemptOutcome(CRASHED if mute else USER, 0, common[0].sentence)
        # No training was lost: exclude such a node at once.
        how = "; ".join(f"{host}: {problem}" for host, problem in faulty.items())
        return policy.AttemptOutcome(CRASHED, 0, f"preflight: {how}", faulty=faulty)

    def _receive(self, number: int, frame: object) -> None:
        """Handle a signal: the time limit is near, or SLURM or a user wants the job to end."""
        self._stop(signal.Signals(number).name)

    def _stop(self, why: str) -> None:
        """Let the ranks save and end. why: recorded as the signal that ended the attempt, or
        _GROWTH, in the place of which a signal comes."""
        if self.stop_signal in (None, _GROWTH):
            self.stop_signal = why
            grace = self.job.launch.grace.seconds or 0.0
            self._deadline = time.monotonic() + grace + 10
            lead = "To get more nodes," if why == _GROWTH else f"{why}:"
            self._log(f"{lead} ranks save and end within {grace:.0f} s.")
        if self._step is not None:
            self._step.request_stop()

    def _log(self, text: str) -> None:
        with suppress(OSError):  # the log lies on the run's disk, too, which may be full
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _sentence(e: Exception) -> str:
    return str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}."


def main(arguments: Sequence[str]) -> int:
    """Supervise the job RUN JOB and return its exit code."""
    faulthandler.register(signal.SIGUSR2)  # scancel -b -s USR2 writes the stack to the log
    try:
        return Batch(Run(arguments[0]), Submission(Path(arguments[1]))).supervise()
    except UserError as e:
        with suppress(OSError):
            print(f"forescale: {e}", file=sys.stderr, flush=True)
        return e.code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)  # Python itself would end with 120 where the log can't be written
