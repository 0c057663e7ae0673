"""The help of commands with many options: options in groups, with their defaults."""

from __future__ import annotations

from copy import copy

import click

# The groups in the order of the help, and their options. Options of no group come last.
GROUPS: dict[str, tuple[str, ...]] = {
    "Recipe": ("--recipe",),
    "What to write or to measure": (
        "--format", "--form", "--precision", "--runtime", "--layout", "--threads", "--repeats", "--layers",
    ),
    "What to keep, and what may be lost": (
        "--lambda", "--rank", "--bits", "--budget", "--max-drop", "--plan", "--include",
        "--exclude", "--basis", "--normalization", "--harmonic", "--no-normalize-first",
    ),
    "Calibration": (
        "--calibration-images", "--calibration-split", "--calibration-batch-size",
        "--calibration-memory", "--damping", "--allow-fallback",
    ),
    "Search under a budget": (
        "--trials", "--axes", "--frequencies", "--latency-batch", "--probes", "--save-plan", "--search-figure",
    ),
    "Data, and what is measured on it": (
        "--data", "--metric", "--compare", "--compare-checkpoint", "--labelled", "--data-dir", "--train-split",
        "--val-split", "--holdout", "--batch-size", "--workers", "--num-classes", "--seed",
    ),
    "Pre-processing": (
        "--input-size", "--img-size", "--preprocess", "--mean", "--std", "--interpolation", "--crop-pct",
    ),
    "Training": (
        "--epochs", "--lr", "--opt", "--momentum", "--weight-decay", "--sched",
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


def main_name(option: click.Parameter) -> str:
    """Return the name of an option in messages and in the help: its first long one."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0])


def is_given(context: click.Context, name: str | None) -> bool:
    """Return whether a parameter has a value from the command line or from a recipe file."""
    source = context.get_parameter_source(name or "")
    return source in (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)


class Renamed(click.Option):
    """An option whose other long names are earlier ones: they keep working, and the help shows only the present one."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the present name and the help."""
        present = copy(self)
        present.opts = [main_name(self)]
        return click.Option.get_help_record(present, ctx)

    @property
    def earlier_names(self) -> set[str]:
        """The names that messages do not use."""
        return {name for name in self.opts if name.startswith("--")} - {main_name(self)}


class Grouped(click.Command):
    """A command whose help shows its options in `GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        left = {
            main_name(option): record
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None
        }
        groups = {title: [left.pop(name) for name in names if name in left] for title, names in GROUPS.items()}
        for title, records in {**groups, "Other options": list(left.values())}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
