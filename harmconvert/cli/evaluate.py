"""harmconvert evaluate"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, options, training_options, types


@click.command(name="evaluate", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@training_options.evaluation_options
@options.input_size
@click.option("--compare", type=inputs.SourceText(), help="A second network to agree with, such as the uncut one.")
@click.option("--compare-checkpoint", "rival_weights", type=inputs.InputFile(), help="Weights of that second network.")
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
def command(source: str, compare: str | None, rival_weights: str | None, amp: str, as_json: bool, **given: Any) -> None:
    """Say how right the network SOURCE is on labelled images: top-1 with its 95 % interval, top-5, loss, images/s.

    \b
    Example:
      harmconvert evaluate resnet50-harmonic-progressive.safetensors --data-dir imagenet/val
      harmconvert evaluate sample:resnet_mnist5k --dataset sample:mnist5k
    """
    inputs.check_run(given)
    from dataclasses import replace

    from ..data.variety import Variety
    from ..errors import UsageError
    from ..network.distributed import joined, rank
    from ..report import tables
    from ..sources.opening import made_by_code, open_rival
    from ..storage.precision import in_float32
    from ..training.evaluation import evaluate
    from ..training.learner import autocast

    if rival_weights and not compare:
        raise UsageError("--compare-checkpoint is of use only with --compare SOURCE")

    given |= {"no_channels_last": False, "torchcompile": False, "no_sync_bn": False}
    with joined():
        machine = training_options.machine_from(given)
        code = given["code"]
        if compare and not made_by_code(source):
            given["code"] = None  # it is for the other one
        network = options.opened(source, given, form="dense")
        other = None
        if compare:
            known = network.source
            if network.header is None and known.scheme != "code":  # other weights of one architecture may be compared
                known = replace(known, sha256=None)
            with options.busy(f"loading {compare}"):
                rival = open_rival(
                    compare,
                    known,
                    "give them with --compare-checkpoint FILE",
                    weights=rival_weights,
                    trust_code=given["trust_code"],
                    code=code,
                )
            other = in_float32(rival.model.to(machine.device))
        loading, config = training_options.evaluation_loading(given, network.model, machine)
        with options.progress() as progress:
            seen, variety = 0, Variety()

            def count(images: int) -> None:
                nonlocal seen
                seen += 1
                progress(seen, loading.steps or 0, "batches")

            found = evaluate(
                in_float32(network.model.to(machine.device)),
                loading.epoch(0),
                other,
                autocast=lambda: autocast(amp, machine.device),
                variety=variety,
                progress=count,
            )
        if remark := variety.remark():
            options.say(f"warning: {remark}", urgent=True)
        if note := loading.unread(found.images + len(found.unreadable)):
            options.say(note)
        if rank() > 0:
            return
    if as_json:
        options.print_json({"source": str(network.source), "preprocessing": config, **found.to_json()})
        return
    for line in tables.evaluation_lines(found):
        options.console().print(line, markup=False)
