"""Tables of the data of a run."""

from rmkv_cli.config import MixConfig
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.markdown import table


def data_table(data: Manifest | MixConfig) -> str:
    """Return the table of the sources of a prepared or streamed mix, with the amount of each."""
    if isinstance(data, MixConfig):
        return table(["source", "weight"], [[source.name, f"{source.weight:g}"] for source in data.sources])
    rows = [
        [s.name, f"{s.documents:,}", f"{s.tokens:,}", f"{s.achieved:.1%}", str(s.epochs), f"{s.wanted:.1%}"]
        for s in data.sources
    ]
    return table(["source", "documents", "tokens", "share of tokens", "epochs", "wanted share"], rows)
