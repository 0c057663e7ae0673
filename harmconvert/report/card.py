"""The model card of a checkpoint: a README with what its file records, for a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from huggingface_hub import ModelCardData

from ..errors import counted
from ..storage.source import Source
from .facts import Report, StageFacts
from .text import megabytes, millions

# What the files of a repository are.
_FILES = {
    "harmonic.safetensors": "the network as harmconvert wrote it, with the record of what was done",
    "model.safetensors": "the same network with plain weights, for timm",
    "config.json": "the configuration for timm",
    "README.md": "this card",
}
_IDENTIFIER = re.compile(r"[a-z0-9.-]+")


def model_card(report: Report, repository: str, license: str, sizes: Mapping[str, int], timm_name: str | None) -> str:
    """Return the text of a model card, made only from a report and the files of the repository.

    Args:
        report: of the harmonic checkpoint.
        repository: ``USER/REPO``.
        license: of the weights; the hub's identifier, if there is one.
        sizes: the bytes of each file, by name.
        timm_name: the architecture, if stock timm or timm with harmconvert reads the files; None: it does not.
    """
    sections: dict[str, Iterable[str]] = {
        "Load it": _loading(repository, timm_name) if _anyone_can_open(report) else _loading_own_code(repository),
        "What was kept": _kept(report),
        "Size": _size(report, sizes),
        "Accuracy": _accuracy(report, repository),
        "Calibration": _calibration(report),
        "Licence": [
            f"The publisher names the licence `{license}`, as that of the network from which the weights were made."
        ],
    }
    bodies = {title: "\n".join(lines) for title, lines in sections.items()}
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in bodies.items() if body)
    source = f"`{report.source}`" if report.source else "a network of the author's own code"
    first = f"{source}, made smaller with harmconvert: {report.share:.0%} of its parameters" + (
        f", {report.bits:.2f} bits per coded weight." if report.bits is not None else "."
    )
    front = _front_matter(report, license, timm_name)
    return f"---\n{front}\n---\n\n# {repository.partition('/')[2]}\n\n{first}\n\n{text}\n"


def _front_matter(report: Report, license: str, timm_name: str | None) -> str:
    identifier = license.lower()
    known = _IDENTIFIER.fullmatch(identifier) is not None
    base = base_model(report.source) if report.source else None
    data = ModelCardData(
        license=identifier if known else "other",
        license_name=None if known else license,
        base_model=base,
        base_model_relation="quantized" if base and report.bits is not None else None,
        library_name="timm" if timm_name else "harmconvert",
        tags=["harmconvert", "model-compression"],
    )
    return data.to_yaml().strip()


def base_model(source: Source) -> str | None:
    """Return the repository of the hub that holds the original network; None if it is not known.

    >>> base_model(Source("timm", "resnet50", weights={"tag": "a1_in1k"})), base_model(Source("sample", "x"))
    ('timm/resnet50.a1_in1k', None)
    """
    if source.scheme == "hf-hub":
        return source.name.partition("@")[0]
    tag = (source.weights or {}).get("tag")
    return f"timm/{source.name.partition('.')[0]}.{tag}" if source.scheme == "timm" and tag else None


def _loading(repository: str, timm_name: str | None) -> Iterator[str]:
    yield from ("```python", "import harmconvert as hc", "")
    yield f'network = hc.open_source("hf-hub:{repository}").model  # in harmonic form, for fine-tuning'
    yield "plain = hc.fuse(network)  # plain layers, as fast as the original"
    if timm_name:
        yield from ("```", "", "Without harmconvert:" if _stock(timm_name) else "With timm:", "", "```python")
        yield "import timm"
        if not _stock(timm_name):
            yield "import harmconvert  # timm itself does not have this architecture"
        yield f'\nnetwork = timm.create_model("hf-hub:{repository}", pretrained=True)'
    yield "```"


def _anyone_can_open(report: Report) -> bool:
    """Return whether a reader can make the network without code of the author."""
    return report.source is not None and report.source.scheme != "code"


def _loading_own_code(repository: str) -> Iterator[str]:
    yield from ("The code of the author makes the network. It is not in this repository:", "", "```python")
    yield from ("from huggingface_hub import hf_hub_download", "", "import harmconvert as hc", "")
    yield f'file = hf_hub_download("{repository}", "harmonic.safetensors")'
    yield 'network = hc.load(file, model=make(), form="dense")  # make() returns the network before the conversion'
    yield "```"


def _stock(timm_name: str) -> bool:
    """Return whether an architecture is in timm itself."""
    import timm

    return str(timm.model_entrypoint(timm_name).__module__).startswith("timm.")


def _kept(report: Report) -> Iterator[str]:
    yield from _table("layer by layer", "layers")
    for text, number in Counter(str(layer) for layer in report.plan.layers).most_common():
        yield f"| {text} | {number} |"
    for why, number in Counter(skip.why for skip in report.plan.skipped).most_common():
        yield f"| not converted: {why} | {number} |"
    yield f"\nPlan: `{report.plan.policy[:200]}`; basis: {report.bases}."


def _size(report: Report, sizes: Mapping[str, int]) -> Iterator[str]:
    dense, harmonic, factored = (report.form(name) for name in ("dense", "harmonic", "factored"))
    yield from _table("", "original", "this network")
    yield f"| parameters | {dense.parameters:,} | {harmonic.parameters:,} |"
    yield f"| bytes of the tensors | {megabytes(dense.bytes)} | {megabytes(harmonic.bytes)} |"
    if dense.macs is not None and factored.macs is not None:
        yield f"| multiply-adds of one example | {millions(dense.macs)} | {millions(factored.macs)}, factored form |"
    yield ""
    yield from _table("file", "size", "content")
    for name, size in sizes.items():
        yield f"| `{name}` | {megabytes(size)} | {_FILES[name]} |"
    yield f"| `README.md` | | {_FILES['README.md']} |"


def _accuracy(report: Report, repository: str) -> Iterator[str]:
    known = [stage for stage in report.stages if stage.top1 is not None or stage.agreement is not None]
    if not known:
        yield "The file records no accuracy. Measure it on your images:"
        more = "" if _anyone_can_open(report) else " --model FILE.py:FUNCTION"
        yield f"\n```sh\nharmconvert evaluate hf-hub:{repository}{more} --data FOLDER\n```"
        return
    yield from _table("network", "images", "top-1 (95 % interval)", "same top-1 as the original", "KL divergence")
    for stage in known:
        row = (stage.name, stage.images, _top1(stage), _share(stage.agreement), _number(stage.divergence))
        yield f"| {' | '.join(map(str, row))} |"
    if data := measured_on(report):
        yield f"\nMeasured on {data}."


def measured_on(report: Report) -> str:
    """Return the data on which the accuracies were measured, if the file names it; folders without their path."""
    words = [str(word) for run in report.training for word in (run.get("command") or {}).get("words", [])]
    named = {words[i]: words[i + 1] for i in range(len(words) - 1)}
    if "--dataset" in named:
        return f"`{named['--dataset']}`"
    folder = named.get("--data-dir")
    return f"a folder `{folder.rstrip('/').rpartition('/')[2]}`" if folder else "images that the file does not name"


def _calibration(report: Report) -> Iterator[str]:
    record = report.calibration
    if record is None:
        return
    yield f"The weights were refitted on {counted(record['inputs'], 'input')} without labels, and without training."
    before, after = record.get("plain_divergence"), record.get("divergence")
    if before is not None and after is not None:
        yield (
            f"On the {record['held_back']} of them that were held back, the divergence of the outputs from the "
            f"original's is {_number(after)}, and {_number(before)} without calibration."
        )
    if record.get("agreement") is not None:
        yield f"The top-1 class is the original's on {_share(record['agreement'])} of these."


def _table(*headings: str) -> Sequence[str]:
    return f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"


def _top1(stage: StageFacts) -> str:
    if stage.top1 is None:
        return ""
    low, high = stage.top1_interval or (None, None)
    return _share(stage.top1) + (f" ({100 * low:.1f}-{100 * high:.1f})" if low is not None and high is not None else "")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
