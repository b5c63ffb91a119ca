"""Configs of models, training, mixes and synthetic data, read from presets, files and overrides."""

from rmkv_cli.config.exercises import (
    ArithmeticExercises,
    CountdownExercises,
    Exercises,
    ExerciseSource,
    ReasoningGymExercises,
    SortingExercises,
    SpellingExercises,
)
from rmkv_cli.config.load import (
    dump_toml,
    load_any,
    load_config,
    load_data_recipe,
    load_mix,
    load_recipe,
    parse,
    tunes_only,
)
from rmkv_cli.config.mix import FileSource, HubSource, MixConfig, NoiseSource, Phase, Source, Supervise, TextSource
from rmkv_cli.config.model import MemoryConfig, ModelConfig, QuantizationConfig, RopeConfig
from rmkv_cli.config.numbers import whole_number
from rmkv_cli.config.recipe import DataRecipe, Filters, Sampling, Slot, Writer
from rmkv_cli.config.resume import resumed_config
from rmkv_cli.config.section import Section
from rmkv_cli.config.shipped import data_recipe_path, list_data_recipes, list_mixes, list_presets, mix_path, preset_path
from rmkv_cli.config.tasks import (
    CopySource,
    FactsSource,
    NeedleSource,
    RecallSource,
    ReverseSource,
    TaskSource,
)
from rmkv_cli.config.train import AdapterConfig, Config, RolloutsConfig, Stage, TeacherConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "ArithmeticExercises",
    "Config",
    "CopySource",
    "CountdownExercises",
    "DataRecipe",
    "ExerciseSource",
    "Exercises",
    "FactsSource",
    "FileSource",
    "Filters",
    "HubSource",
    "MemoryConfig",
    "MixConfig",
    "ModelConfig",
    "NeedleSource",
    "NoiseSource",
    "Phase",
    "QuantizationConfig",
    "ReasoningGymExercises",
    "RecallSource",
    "ReverseSource",
    "RolloutsConfig",
    "RopeConfig",
    "Sampling",
    "Section",
    "Slot",
    "SortingExercises",
    "Source",
    "SpellingExercises",
    "Stage",
    "Supervise",
    "TaskSource",
    "TeacherConfig",
    "TextSource",
    "TrainConfig",
    "Writer",
    "data_recipe_path",
    "dump_toml",
    "list_data_recipes",
    "list_mixes",
    "list_presets",
    "load_any",
    "load_config",
    "load_data_recipe",
    "load_mix",
    "load_recipe",
    "mix_path",
    "parse",
    "preset_path",
    "resumed_config",
    "tunes_only",
    "whole_number",
]
