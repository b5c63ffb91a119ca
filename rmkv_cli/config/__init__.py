"""What a run is, as frozen data: the model, the training, the mix; read from presets, files and overrides."""

from rmkv_cli.config.load import dump_toml, list_presets, load_any, load_config, load_mix, parse, preset_path
from rmkv_cli.config.mix import FileSource, MixConfig, NoiseSource, Source
from rmkv_cli.config.model import MemoryConfig, ModelConfig
from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import (
    CopySource,
    FactsSource,
    NeedleSource,
    RecallSource,
    ReverseSource,
    TaskSource,
)
from rmkv_cli.config.train import Config, TrainConfig

__all__ = [
    "Config",
    "CopySource",
    "FactsSource",
    "FileSource",
    "MemoryConfig",
    "MixConfig",
    "ModelConfig",
    "NeedleSource",
    "NoiseSource",
    "RecallSource",
    "ReverseSource",
    "Section",
    "Source",
    "TaskSource",
    "TrainConfig",
    "dump_toml",
    "list_presets",
    "load_any",
    "load_config",
    "load_mix",
    "parse",
    "preset_path",
]
