"""Ranks of test_peer.py: each learns as from srun on which node it is."""

import os
import signal


def train(words, nodes, kill=None):
    """`forescale train` on this rank. kill: of the last rank, in step 9 once all is saved ("late")
    or while its second snapshot arrives ("arrival"); of the first where it publishes one
    ("flush")."""
    from forescale.checkpoint import peer, saver, writer
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob
    from forescale.engine import ranks
    from forescale.engine.step import Engine
    from forescale.train.trainer import run_rank

    ranks.FANOUT = 2  # four ranks have no group of all for what they exchange in the background
    rank = int(os.environ["RANK"])
    is_last = rank == len(nodes) - 1
    os.environ["SLURMD_NODENAME"] = nodes[rank]

    def end(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    savers, init, step, blocks = [], saver.Saver.__init__, Engine.train_step, peer._blocks
    arrivals = []

    def register(self, *args, **kwargs):
        init(self, *args, **kwargs)
        savers.append(self)

    def late(self, batch, *args):
        if batch.step == 8:
            for each in savers:
                each.finish()
            if is_last:
                end()
        return step(self, batch, *args)

    def arrive(folder, sizes):
        arrivals.append(folder)
        return end() if len(arrivals) > 2 else blocks(folder, sizes)

    if kill == "late":
        saver.Saver.__init__, Engine.train_step = register, late
    elif kill == "arrival" and is_last:
        peer._blocks = arrive
    elif kill == "flush" and not rank:
        writer.publish_stage = end
    return run_rank(compose(TrainJob, words))


def ring(shift):
    """What each rank received of the one `shift` before it, by rank."""
    import torch

    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from tests.distributed.jobs import compose_job

    size = int(os.environ["WORLD_SIZE"])
    job = compose_job(["train.micro_batch=1", f"train.global_batch={size}"], size)
    world = join(deepspeed_config(job, size), size, 60.0)
    after, before = world.ring(shift)
    after.swap(before, torch.tensor([world.rank]), received := torch.tensor([-1]))
    return world.gather(int(received))
