"""Checks of the outputs of convert, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from . import options, pages


def check(
    source: str, output: str, save_plan: str | None, report: str | None, search_figure: str | None, force: bool
) -> tuple[Path | None, tuple[Path, Path] | None]:
    """Return the paths of the page and the figure; raise UsageError or OutsideError if an output cannot be written."""
    from ..arguments import check_figure
    from ..files import check_output

    check_output(output, force, ".safetensors")
    if save_plan:
        check_output(save_plan, force)
    page = pages.checked(output, report, force)
    return page, check_figure(source, "search", search_figure, force) if search_figure else None


def check_probes(probes: str | None, output: str, source: str, needed: bool) -> str | None:
    """Return the file for the scores, and name it in the message of an interruption; None if there are no scores."""
    from ..files import check_output

    if needed and probes is None:
        probes = _probes_beside(output, source)
    if probes:
        check_output(probes, force=True)
        options.set_interruption_note(lambda: _saved_scores_note(probes))
    return probes


def _saved_scores_note(probes: str) -> str:
    """Return which files exist if a search is interrupted."""
    if not Path(probes).exists():
        return options.NOTHING_WRITTEN
    return (
        f"{options.NOTHING_WRITTEN}, but scores of layers are saved in {probes}: the same command continues from them"
    )


def _probes_beside(output: str, source: str) -> str:
    """Return the default file for scores: the same for every budget, so that the next search finds them."""
    from ..files import short_name

    return str(Path(output).parent / f"{short_name(source)}-harmonic.probes.json")
