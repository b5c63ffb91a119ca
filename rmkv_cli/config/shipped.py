"""Shipped presets, mixes, and recipes for synthetic data."""

from pathlib import Path

from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.files import require_file


def _presets() -> Path:
    package = Path(__file__).parents[1]
    shipped = package / "presets"  # in a wheel; in a checkout they are next to the package
    return shipped if shipped.is_dir() else package.parent / "presets"


def list_presets() -> dict[str, str]:
    """Return the presets' names, smallest model first, with one-line descriptions."""
    paths = sorted(_presets().glob("*.toml"), key=lambda path: (path.stem != "tiny", path.stem))
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in paths}


def preset_path(name: str) -> Path:
    """Return a preset's file; raise `UserError` with the nearest name if there is no such preset."""
    known = list_presets()
    if name not in known:
        raise UserError(f"--preset {name}: no such preset{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return _presets() / f"{name}.toml"


def list_mixes() -> list[str]:
    """Return the shipped mixes' names."""
    return _shipped("mixes")


def mix_path(name: str) -> Path:
    """Return the file of a shipped mix, or `name` itself if it ends in .toml.

    Raises:
        UserError: there is no such mix; the message has the nearest name.
    """
    return _find(name, "mix", "mixes")


def list_data_recipes() -> list[str]:
    """Return the names of the shipped recipes for synthetic data."""
    return _shipped("recipes")


def data_recipe_path(name: str) -> Path:
    """Return the file of a shipped recipe for synthetic data, like `mix_path`."""
    return _find(name, "recipe", "recipes")


def _shipped(folder: str) -> list[str]:
    return sorted(path.stem for path in (_presets() / folder).glob("*.toml"))


def _find(name: str, kind: str, folder: str) -> Path:
    if name.endswith(".toml"):
        require_file(Path(name))
        return Path(name)
    known = _shipped(folder)
    if name not in known:
        raise UserError(f"{kind} '{name}': no such {kind}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return _presets() / folder / f"{name}.toml"
