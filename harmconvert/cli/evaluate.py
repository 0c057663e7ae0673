"""harmconvert evaluate"""

from __future__ import annotations

from typing import Any

import click

from . import options, training_options


@click.command(name="evaluate")
@click.argument("source")
@training_options.data_options
@click.option(
    "--holdout",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    show_default=True,
    help="Where the data has one split only: test on this share of it, as finetune does; 0: on all of it.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the hold-out.")
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=256, show_default=True, help="Images at once.")
@click.option("--compare", metavar="SOURCE", help="A second network to agree with, such as the uncut one.")
@click.option(
    "--amp",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    is_flag=False,
    flag_value="bfloat16",
    default="float32",
    help="Precision of the forward; --amp alone: bfloat16.",
)
@options.device
@options.network_options
@options.common
def command(source: str, batch_size: int, compare: str | None, amp: str, as_json: bool, **given: Any) -> None:
    """Say how right the network SOURCE is on labelled images: top-1 with its 95 % interval, top-5, loss, images/s.

    \b
    Example:
      harmconvert evaluate resnet50-harmonic-progressive.safetensors --data-dir imagenet/val
      harmconvert evaluate sample:resnet_mnist5k --dataset sample:mnist5k
    """
    from ..data.loading import evaluation_batches
    from ..data.preprocessing import color_mode, evaluation_transform
    from ..distributed import joined, rank
    from ..evaluation import evaluate
    from ..report import tables
    from ..sources import open_source
    from ..training.finetuning import check_classes
    from ..training.learner import autocast

    given |= {"no_channels_last": False, "torchcompile": False, "no_sync_bn": False}
    with joined():
        machine = training_options.machine_from(given)
        network = options.opened(source, given, form="dense")
        other = open_source(compare, form="dense").model.to(machine.device) if compare else None
        data = training_options.data_from(given, given["seed"], ("test",))
        assert data.test is not None
        if data.labelled:
            check_classes(data, network.model)
        config = training_options.preprocessing_from(given, network.model)
        loading = evaluation_batches(
            data.test,
            evaluation_transform(config),
            color_mode(config),
            batch_size,
            workers=training_options.workers_from(given),
            pin_memory=machine.device.type == "cuda",
        )
        with options.progress() as progress:
            seen, total = 0, loading.steps or 0

            def count(images: int) -> None:
                nonlocal seen
                seen += 1
                progress(seen, total, "batches")

            found = evaluate(
                network.model.to(machine.device),
                loading.epoch(0),
                other,
                autocast=lambda: autocast(amp, machine.device),
                progress=count,
            )
        if note := loading.unread(found.images + len(found.unreadable)):
            options.say(note)
        if rank() > 0:
            return
    if as_json:
        options.print_json({"source": str(network.source), "preprocessing": config, **found.to_json()})
        return
    for line in tables.evaluation_lines(found):
        options.console().print(line, markup=False)
