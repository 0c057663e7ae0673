"""The help of commands with many options: options in groups, with their defaults."""

from __future__ import annotations

import click

# The groups in the order of the help, and their options. Options of no group come last.
GROUPS: dict[str, tuple[str, ...]] = {
    "What to keep": (
        "--lambda", "--rank", "--bits", "--budget", "--max-drop", "--metric", "--labelled", "--plan", "--include",
        "--exclude", "--basis", "--normalization", "--harmonic", "--no-normalize-first",
    ),
    "Calibration": (
        "--calibrate", "--calibration-images", "--calibration-split", "--calibration-batch-size",
        "--calibration-memory", "--damping", "--allow-fallback",
    ),
    "Search under a budget": (
        "--trials", "--axes", "--frequencies", "--latency-batch", "--probes", "--save-plan", "--search-figure",
    ),
    "Data": (
        "--data-dir", "--dataset", "--train-split", "--val-split", "--holdout", "--workers", "--num-classes", "--seed"),
    "Pre-processing": (
        "--input-size", "--img-size", "--preprocess", "--mean", "--std", "--interpolation", "--crop-pct",
    ),
    "Recipe (default of finetune: the paper's 5 epochs; of train: that of --recipe)": (
        "--recipe", "--epochs", "--batch-size", "--lr", "--opt", "--momentum", "--weight-decay", "--sched",
        "--warmup-epochs", "--decay-epochs", "--decay-milestones", "--decay-rate", "--min-lr", "--clip-grad",
        "--model-ema-decay", "--smoothing", "--mixup", "--cutmix", "--freeze-bn", "--train-only", "--recode", "--loss",
    ),
    "Augmentation": (
        "--crop", "--padding", "--scale", "--ratio", "--hflip", "--vflip", "--color-jitter", "--aa", "--reprob",
    ),
    "Distillation": ("--distill", "--distill-temperature", "--teacher"),
    "The machine": (
        "--device", "--amp", "--torchcompile", "--no-channels-last", "--no-sync-bn", "--grad-accum-steps",
    ),
    "The network of SOURCE": (
        "--model-kwargs", "--checkpoint", "--checkpoint-key", "--strip-prefix", "--model", "--trust-code",
    ),
    "Output": ("--output", "--report", "--force", "--dtype", "--save-every", "--resume", "--log"),
    "Messages": ("--json", "--quiet", "--verbose", "--debug", "--help"),
}  # fmt: skip


class Grouped(click.Command):
    """A command whose help shows its options in `GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        left = {
            max(option.opts, key=len): record
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None
        }
        groups = {title: [left.pop(name) for name in names if name in left] for title, names in GROUPS.items()}
        for title, records in {**groups, "Other options": list(left.values())}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
