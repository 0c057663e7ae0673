"""What reports and figures show of the space axis: the frequencies that the layers keep and use.

What belongs here: everything in a report that depends on frequencies: the facts about a layer, its spectrum, the filter
bank, the heat maps of the page, and the drawings of these in `figures`. What does not: the data of a report (`facts`),
the page, and all other charts and tables. They ask this folder for values and texts.

`figures` needs matplotlib, so this file does not import it.
"""

from .facts import block_facts, kept_text, planned_facts, with_spectra
from .filters import FilterBank, filter_bank
from .heat_maps import HeatMap, heat_maps
from .spectrum import Spectrum, spectrum

__all__ = [
    "FilterBank",
    "HeatMap",
    "Spectrum",
    "block_facts",
    "filter_bank",
    "heat_maps",
    "kept_text",
    "planned_facts",
    "spectrum",
    "with_spectra",
]
