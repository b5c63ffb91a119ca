"""Make files of each kind that people exchange, and read from each the result that damage must not change unnoticed."""

import json
import shutil
from dataclasses import asdict

from small_model import with_adapter
from small_run import TEXT, save_small_model

from rmkv_cli.cli.loading import find_and_load
from rmkv_cli.config import MixConfig, dump_toml, load_config, load_mix, preset_path
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import Lanes
from rmkv_cli.data.mix import prepare
from rmkv_cli.evaluation.kept import DocumentsReport, Evaluation, keep_evaluation
from rmkv_cli.evaluation.measure import PositionLoss, Score
from rmkv_cli.files import sha256
from rmkv_cli.generation import SamplingConfig, generate, load_notes, read_prompt, save_notes, save_start
from rmkv_cli.generation.lines import _begin, read_lines
from rmkv_cli.huggingface import export_folder, import_folder
from rmkv_cli.model import RMKV, State
from rmkv_cli.model.adapter_file import save_adapter
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.report.run import read_run
from rmkv_cli.training.data import open_data
from rmkv_cli.training.memory import require_memory

GREEDY = SamplingConfig(temperature=0)


class Kinds:
    """Files of each kind in a folder. `read` maps each file's path to a function that returns the file's content."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.tokenizer = save_small_model(folder / "plain")
        prompt = read_prompt(self.model, self.tokenizer, "the cat sat")
        save_notes(folder / "notes.rmkv", prompt, self.model, self.tokenizer)
        save_start(folder / "memory.safetensors", self.model, self.tokenizer)
        prompt.state.save(folder / "state.safetensors")
        shutil.copytree(folder / "plain", folder / "whole")
        write_checksums(folder / "whole")
        export_folder(folder / "plain", folder / "exported")
        (folder / "adapter").mkdir()
        adapted = with_adapter(RMKV.from_pretrained(folder / "plain"))
        save_adapter(adapted, folder / "adapter", folder / "plain", sha256(folder / "plain" / "model.safetensors"))
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(40)))
        sources = [
            {"kind": "files", "name": "text", "weight": 1, "files": ["texts.jsonl"]},
            {"kind": "recall", "name": "recall", "weight": 1, "keys": 4, "values": 4, "noise": 4, "segment_length": 8},
        ]
        mix = MixConfig(validation=0.2, tokens=4000, sources=sources)
        (folder / "mix.toml").write_text(dump_toml(mix))
        prepare(mix, folder, self.tokenizer, folder / "data", workers=1)
        self._run(folder / "run")
        (folder / "prompts.jsonl").write_text('{"prompt": "the"}\n{"messages": [{"role": "user", "content": "who"}]}\n')
        lines = [{"job": "a job"}, [[0, 0], {"text": "cat"}], [[1, 0], {"text": "dog"}]]
        (folder / "texts.jsonl.part").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.read = {
            "notes.rmkv": self.notes,
            "memory.safetensors": lambda: self.notes("memory.safetensors"),
            "state.safetensors": self.state,
            **{f"whole/{path.name}": self.checked_model for path in sorted((folder / "whole").iterdir())},
            **{f"plain/{path.name}": self.plain_model for path in sorted((folder / "plain").iterdir())},
            **{f"exported/{n}": self.exported for n in ("config.json", "model.safetensors", "tokenizer.json")},
            **{f"data/{path.name}": self.data for path in sorted((folder / "data").iterdir())},
            **{f"adapter/{path.name}": self.adapted for path in sorted((folder / "adapter").iterdir())},
            "run/config.toml": self.config,
            "run/metrics.jsonl": self.run,
            "run/evaluations/validation.json": self.run,
            "mix.toml": lambda: dump_toml(load_mix(folder / "mix.toml")),
            "prompts.jsonl": lambda: read_lines(folder / "prompts.jsonl"),
            "texts.jsonl.part": lambda: _begin(folder / "texts.jsonl.part", "a job"),
        }

    CHECKED = ("notes.rmkv", "memory.safetensors", "state.safetensors", "whole/", "data/")
    """Kinds with a checksum: after damage the result is the same, or the damage is detected."""

    def _run(self, run):
        config = load_config(preset_path("tiny"), [f"train.data={self.folder / 'data'}", "train.device=cpu"])
        (run / "evaluations").mkdir(parents=True)
        (run / "config.toml").write_text(dump_toml(config))
        records = [{"step": i, "tokens": 8 * i, "loss": 3.0, "validation": {"loss": 2.5}} for i in range(1, 9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        score = Score(documents=1, tokens=9, bytes=30, loss=2.0, perplexity=7.4, bits_per_byte=None)
        places = [PositionLoss(first=0, last=8, tokens=9, loss=2.0)]
        report = DocumentsReport(
            **asdict(score),
            by_source={"text": score},
            by_position=places,
            cut=0,
            available_documents=1,
            available_tokens=9,
            memory=None,
        )
        keep_evaluation(run, "validation", Evaluation(8, "rmkv eval", report))

    def notes(self, name="notes.rmkv"):
        read = load_notes(self.folder / name, self.model, self.tokenizer)
        return _said(read.logits), "".join(generate(self.model, self.tokenizer, read, GREEDY, 9))

    def state(self):
        return {name: _said(x) for name, x in State.load(self.folder / "state.safetensors").tensors().items()}

    def checked_model(self):
        return self._model("whole")

    def plain_model(self):
        return self._model("plain")

    def _model(self, name):
        _, model, tokenizer = find_and_load(self.folder / name, "cpu")
        return "".join(generate(model, tokenizer, "the cat sat", GREEDY, 9))

    def adapted(self):
        _, model, tokenizer = find_and_load(self.folder / "plain", "cpu", adapter=self.folder / "adapter")
        return "".join(generate(model, tokenizer, "the cat sat", GREEDY, 9))

    def exported(self):
        out = self.folder / "imported"
        shutil.rmtree(out, ignore_errors=True)
        import_folder(self.folder / "exported", out)
        return _said(RMKV.from_pretrained(out).memory)

    def data(self):
        """Return what training and evaluation read: all documents, and rows of them."""
        folder, answer = self.folder / "data", []
        config = load_config(preset_path("tiny"), [f"train.data={folder}", "model.vocab_size=300"])
        with open_data(config, self.folder / "no-run") as data:
            lanes = Lanes(data.queue, 3, data.tokenizer.eod)
            answer += [x.tolist() for _ in range(9) for x in vars(lanes.next(64)).values()]
        for split in ("train", "validation"):
            documents = Documents.open(folder, split)
            answer += [[x.tolist() for x in (documents.sizes, documents.sources, documents.counts)]]
            answer += [x.tolist() for x in documents]
            answer += [None if (x := documents.counted(i)) is None else x.tolist() for i in range(len(documents))]
        return answer

    def config(self):
        config = load_config(self.folder / "run/config.toml")
        require_memory(config, config.train.segments_max, "cpu")
        return dump_toml(config)

    def run(self):
        run = read_run(self.folder / "run")
        return run.records, run.points("loss"), run.points("loss", "validation"), repr(run.evaluations)


def _said(x):
    return x.tolist()
