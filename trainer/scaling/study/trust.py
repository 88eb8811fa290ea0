"""Whether a study's files may be run: what they name, and a command of the user's does not.

Invariant: launching does what the command says, and not what a file says that another may have
written.
"""

import re

from forescale.config.compose import compose
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.errors import PREFIX, UserError
from forescale.scaling.study.directory import Study


def expect_no_code(study: Study) -> None:
    """Raise UserError if the study's files name classes of the user's own, or read the environment
    by a resolver such as ${oc.env:NAME}, or a secret by its name: launching would do what a file
    says, and not the command. The job of each cell is judged again where it is composed."""
    for cell in study.plan.cells:
        for text in study.arguments(cell):
            if re.search(r"\$\{.*:", text) or f"${PREFIX}" in text:
                problem = f"the stored argument {text} reads more than the study's own files"
                todo = "give launch.trust=true if you trust the study"
                raise UserError(str(study.folder), problem, todo)
    each = [r.arguments for r in study.plan.recipes] or [()]
    jobs = [compose(TrainJob, [*study.job.plan.shared, *own]) for own in each]
    if named := {k: v for job in jobs for k, v in targets(job).items()}:
        key, target = next(iter(named.items()))
        problem = f"plan.arguments names code to run, {key}={target}"
        todo = "give launch.trust=true if you trust the study"
        raise UserError(str(study.folder / "study.yaml"), problem, todo)
