"""The actions of `forescale study`, each with the keys that it reads and its examples.

Invariant: an action gets only the keys named here; `section.*` stands for all keys of a section.
"""

from forescale.config.job import Action

# The keys that several actions read.
_STUDY = ("study", "studies")
_RUNS = ("input", "columns", "rows", "run.root")
_LAW = (
    "form", "method", "size", "cost", "delta", "residual", "weights", "drop_largest", "near",
    "bootstraps", "resample", "level", "seed",
)  # fmt: skip
_TARGET = ("target.parameters", "target.tokens", "target.flops", "target.far")
_OF_LAW = (*_TARGET, "target.expansion")
_LINK = ("metric", "link", "chance")
_TASK = ("task", *_LINK)

ACTIONS = {
    "plan": Action(
        "Choose and price the runs of a study, and simulate how precise its prediction will be.",
        (*_STUDY, "plan.*", *_LAW, "target.*"),
        (
            "study plan study=mine plan.cap=1e15 target.flops=4e15",
            "study plan study=mine plan.cap=1e18 -- data.path=DIR model.mlp=gelu   (of all runs)",
        ),
    ),
    "launch": Action(
        "Train the planned runs, here or in SLURM's queue; the same command again resumes them.",
        (*_STUDY, "launch.*"),
        (
            "study launch study=mine launch.at_once=2",
            "study launch study=mine launch.slurm=PROFILE -- slurm.time='2 h'   (as job arrays)",
        ),
    ),
    "status": Action(
        "Show the state, loss and cost of every run of a study.",
        (*_STUDY, "live"),
        ("study status study=mine --live",),
    ),
    "sync": Action(
        "Take all decisions that the results so far allow, and launch nothing.",
        (*_STUDY, "live"),
        ("study sync study=mine",),
    ),
    "exclude": Action(
        "Leave runs out of the fit, with a reason that is stored.",
        (*_STUDY, "cells", "why"),
        ("study exclude study=mine cells=[s2-n3] why='a faulty node'",),
    ),
    "next": Action(
        "Choose the additional runs that narrow the prediction most for their cost.",
        (
            *_STUDY, *_RUNS, *_LAW, *_TARGET, "target.device_hours", "cap", "add",
            "plan.arguments", "plan.model", "plan.vocab_size", "plan.sequence_length",
            "plan.micro_batch", "plan.ranks", "plan.rate", "plan.unique",
        ),
        ("study next study=mine cap=1e15 add=true",),
    ),
    "fit": Action(
        "Fit the scaling law to a study, to other runs or to a table, and predict the target.",
        (*_STUDY, *_RUNS, *_LAW, *_OF_LAW, *_TASK, "sensitivity", "reference", "json"),
        (
            "study fit study=mine",
            "study fit 'runs/*' target.flops=1e18",
            "study fit points.csv columns='{parameters: Model Size, flops: Training FLOP}'",
            "study fit points.csv form=over-training target.parameters=7e9 target.tokens=1e12",
            "study fit study=mine task=ability/copy/4 chance=0 target.flops=1e18",
            "study fit recipes.csv reference=adamw   (columns recipe, flops, learning_rate, loss)",
        ),
    ),
    "report": Action(
        "Write the fit, its figures and its doubts as one HTML file.",
        (*_STUDY, *_RUNS, *_LAW, *_OF_LAW, *_TASK, "reference", "to"),
        ("study report study=mine", "study report 'runs/*' target.flops=1e18 to=report.html"),
    ),
    "predict": Action(
        "Store a forecast of a run before it is trained.",
        (*_STUDY, *_RUNS, *_LAW, *_OF_LAW, *_TASK, "target.branches", "target.run"),
        ("study predict 'runs/small-*' target.run=big target.parameters=1e8 target.tokens=2e9",),
    ),
    "compare": Action(
        "Compare two recipes or datasets: how many times less compute reaches the same loss.",
        (*_STUDY, *_RUNS, *_LAW, *_TARGET, "by", "groups", "to", "json"),
        (
            "study compare old.csv new.csv target.flops=1e21 to=compare.html",
            "study compare 'runs/adamw-*' 'runs/muon-*'   (or two studies by name)",
            "study compare points.csv by=dataset groups=[c4,web]",
        ),
    ),
    "tasks": Action(
        "Predict the accuracy of tasks in two steps: N and D to a loss, the loss to the accuracy.",
        (*_STUDY, *_RUNS, *_LAW, *_OF_LAW, "tasks", "task_losses", *_LINK, "json"),
        (
            "study tasks runs.csv tasks='{arc: acc}' task_losses='{arc: bpb}' target.flops=1e24",
            "study tasks runs.csv tasks='{average: err_avg}' metric=error link=exponential",
            "study tasks runs.csv checkpoints.csv tasks='{arc: acc_arc}'   (step 2 by checkpoints)",
        ),
    ),
    "profile": Action(
        "Find how far E and each exponent can go before the fit becomes clearly worse.",
        (*_STUDY, *_RUNS, *_LAW, "json"),
        ("study profile study=mine", "study profile points.csv delta=null level=0.95"),
    ),
    "rates": Action(
        "Fit how the best learning rate and batch depend on N and D, from a table of sweeps.",
        (*_STUDY, *_RUNS, "size", "cost", "level", *_TARGET, "against", "json"),
        (
            "study rates sweeps.csv target.parameters=7e9 target.tokens=1e12",
            "study rates 'runs/*' against=[flops] target.flops=1e21",
        ),
    ),
    "backtest": Action(
        "Judge forecasts by finished studies: what each method would have said, and how far off.",
        (
            *_STUDY, *_RUNS, "form", "size", "cost", "delta", "residual", "near", *_TASK, "json",
        ),
        (
            "study backtest study=mine",
            "study backtest points.csv columns='{parameters: Model Size, budget: C}'",
            "study backtest 'tables/*.csv' --json   (of every table, and of all together)",
            "study backtest runs.csv task=acc_arc   (the metric of a task, by two steps)",
        ),
    ),
    "score": Action(
        "Compare the stored forecasts with the losses observed since.",
        (*_STUDY, *_RUNS, "json"),
        ("study score 'runs/*'",),
    ),
    "records": Action(
        "Print the runs as CSV, one row each.",
        (*_STUDY, *_RUNS),
        ("study records 'runs/*' > records.csv",),
    ),
}  # fmt: skip
