"""Generate docs/configuration.md from the config's fields; `--check` fails if the page is out of date."""

import ast
import inspect
import json
from collections.abc import Container, Iterator
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from make_cli_reference import write
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rmkv_cli.config import (
    AdapterConfig,
    Config,
    DataRecipe,
    Filters,
    MemoryConfig,
    MixConfig,
    ModelConfig,
    Phase,
    QuantizationConfig,
    RolloutsConfig,
    RopeConfig,
    Sampling,
    Section,
    Slot,
    Stage,
    TaskSource,
    TeacherConfig,
    TextSource,
    TrainConfig,
    Writer,
    list_presets,
    load_config,
    preset_path,
)
from rmkv_cli.config.load import EXERCISES, SOURCES

START = """\
# Configuration: every key

A run's config has two sections: `[model]` is the shape of the model, `[train]` how to train it. Use a preset, or write
a TOML file with only the keys that differ from the defaults; `--set` overrides single keys. The run's folder stores the
complete config as config.toml. The mix of training data has its own file.

```console
$ rmkv config list                                                    # the presets
$ rmkv config show --preset tiny --set model.memory.slots=32 > my.toml
$ rmkv config validate my.toml                                        # every error at once, each with its key
```

Whole numbers can have units in configs, with `--set` and in options: `5k`, `1.5M`, `2G` (or `2B`), `1T`, `1e6`,
`2_000_000`. In a TOML file, a number with a unit is a string: `tokens = "5M"`.

The column "in presets" shows values that differ from the default. Unknown keys are errors. `make docs` generates this
page from the classes in `rmkv_cli/config`, which also validate configs.
"""
SHARED: dict[type[Section], str] = {TextSource: "`files` and `hub`", TaskSource: "tasks"}
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def descriptions(section: type[Section]) -> dict[str, str]:
    """Return the docstrings of a section's fields, including those of base classes."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if cls is not Section and issubclass(cls, Section):
            body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
            for field, after in pairwise(body):
                match field, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.split()).replace("<", "\\<")
    return found


def type_of(annotation: Any, constraints: list[Any]) -> str:
    """Return a type and its bounds as text."""
    if get_origin(annotation) is Annotated:
        inner, *inner_constraints = get_args(annotation)
        return type_of(inner, [x for c in inner_constraints for x in getattr(c, "metadata", [c])])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return " or ".join(type_of(kind, constraints) for kind in kinds)
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
        case origin if origin is list:
            return f"list of {type_of(arguments[0], [])}"
        case origin if origin is dict:
            return f"table of {type_of(arguments[1], [])}"
    bounds = [(sign, getattr(c, name)) for c in constraints for kind, (name, sign) in BOUNDS.items() if type(c) is kind]
    return ", ".join([annotation.__name__, *(f"{sign} {value}" for sign, value in bounds)])


def value_of(value: Any) -> str:
    """Return a value in TOML's form, with separators in large numbers."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000:
        return f"`{value:_}`"
    return "none" if value is None else "`{}`".format(json.dumps(value).replace("|", "\\|"))


def default_of(field: FieldInfo) -> str:
    """Return a field's default, or "required"."""
    default = field.get_default(call_default_factory=True)
    return "required" if default is PydanticUndefined else value_of(default)


def row(name: str, field: FieldInfo, meaning: str, in_presets: str | None = None) -> str:
    """Return a key's row of the table."""
    cells = [f"`{name}`", type_of(field.annotation, field.metadata), default_of(field)]
    cells += [meaning] if in_presets is None else [in_presets, meaning]
    return f"| {' | '.join(cells)} |\n"


def classes(annotation: Any) -> list[type]:
    """Return the classes in a type, such as both of `X | None`."""
    return [kind for kind in (annotation, *get_args(annotation)) if inspect.isclass(kind)]


def table(section: type[Section], exclude: Container[str] = (), presets: dict[str, Section] | None = None) -> str:
    """Return a table of a section's keys, except tables and `exclude`, with their values in presets if given."""
    heads = ["key", "type", "default", *(["in presets"] if presets else []), "meaning"]
    text = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    meanings = descriptions(section)
    for name, field in section.model_fields.items():
        if name in exclude or any(issubclass(kind, Section) for kind in classes(field.annotation)):
            continue
        values = {preset: getattr(config, name) for preset, config in (presets or {}).items()}
        shown = ", ".join(f"{preset} {value_of(x)}" for preset, x in values.items() if x != field.default)
        text += row(name, field, meanings[name], shown if presets else None)
    return text


def page() -> Iterator[str]:
    """Yield the parts of the page."""
    configs = {name: load_config(preset_path(name)) for name in list_presets()}
    yield START
    yield "\n## The run\n"
    models: dict[str, Section] = {name: config.model for name, config in configs.items()}
    memories: dict[str, Section] = {name: config.model.memory for name, config in configs.items()}
    trains: dict[str, Section] = {name: config.train for name, config in configs.items()}
    assert Config.model_fields.keys() == {"model", "train"}
    yield f"\n### [model]\n\n{table(ModelConfig, presets=models)}"
    yield f"\n### [model.memory]\n\n{table(MemoryConfig, presets=memories)}"
    yield f"\n### [model.rope]\n\n{inspect.getdoc(RopeConfig)}\n\n{table(RopeConfig)}"
    yield f"\n### [model.quantization]\n\n{inspect.getdoc(QuantizationConfig)}\n\n{table(QuantizationConfig)}"
    yield f"\n### [train]\n\n{table(TrainConfig, ('stages',), presets=trains)}"
    yield f"\n### [train.adapter]\n\n{inspect.getdoc(AdapterConfig)}\n\n{table(AdapterConfig)}"
    yield f"\n### [train.teacher]\n\n{inspect.getdoc(TeacherConfig)}\n\n{table(TeacherConfig)}"
    yield f"\n### [train.rollouts]\n\n{inspect.getdoc(RolloutsConfig)}\n\n{table(RolloutsConfig, ('tasks',))}"
    yield f"\n### [[train.rollouts.tasks]]\n\n{descriptions(RolloutsConfig)['tasks']} Its keys depend on its "
    yield "`kind`: the memory tasks have those of [[[sources]]](#sources) of the same kind, without `text`.\n"
    for kind, task in EXERCISES.items():
        if not issubclass(task, TaskSource):
            keys = table(task, ("kind",))
            yield f'\n### [[train.rollouts.tasks]]: kind = "{kind}"\n\n{inspect.getdoc(task)}\n\n{keys}'
    yield f"\n### [[train.stages]]\n\n{inspect.getdoc(Stage)}\n\n{table(Stage)}"
    yield f"\n## The mix\n\n[data.md](data.md) describes mixes.\n\n{table(MixConfig, ('phases', 'sources'))}"
    yield f"\n### [[phases]]\n\n{descriptions(MixConfig)['phases']}\n\n{table(Phase)}"
    yield f"\n### [[sources]]\n\n{descriptions(MixConfig)['sources']} Its keys depend on its `kind`.\n"
    for base, kinds in SHARED.items():
        yield f"\n### [[sources]]: keys that {kinds} share\n\n{inspect.getdoc(base)}\n\n{table(base)}"
    for kind, source in SOURCES.items():
        assert issubclass(source, Section)
        base = next((base for base in SHARED if issubclass(source, base)), Section)
        more = f"In addition to the keys that {SHARED[base]} share:\n\n" if base in SHARED else ""
        keys = table(source, {"kind", *base.model_fields})
        yield f'\n### [[sources]]: kind = "{kind}"\n\n{inspect.getdoc(source)}\n\n{more}{keys}'
    yield "\n## A recipe for synthetic data\n\n[synthetic.md](synthetic.md) describes recipes.\n\n"
    yield table(DataRecipe, ("slots",))
    yield f"\n### [writer]\n\n{inspect.getdoc(Writer)}\n\n{table(Writer)}"
    yield f"\n### [slots.NAME]\n\n{inspect.getdoc(Slot)}\n\n{table(Slot)}"
    yield f"\n### [sampling]\n\n{inspect.getdoc(Sampling)}\n\n{table(Sampling)}"
    yield f"\n### [filters]\n\n{inspect.getdoc(Filters)}\n\n{table(Filters)}"


if __name__ == "__main__":
    write("configuration.md", "".join(page()))
