"""What the tests of a mirror share."""

from dataclasses import replace

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob


def mirror_job(run, place):
    """The job of the run, mirrored."""
    job = thaw(TrainJob, run.config)
    here = replace(job.run, root="runs")
    return replace(job, run=here, checkpoint=replace(job.checkpoint, mirror=str(place)))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
