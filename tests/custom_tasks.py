"""Files of custom tasks for lm-evaluation-harness, for tests."""

import json

QUESTIONS = [
    {"question": f"the {animal} sat on", "choices": [" the mat", " the log, and the dog", " a"], "answer": i % 3}
    for i, animal in enumerate(["cat", "dog", "mat", "log", "<eod>", "cat and the dog", "cat"])
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "prose": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
num_fewshot: 0
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "writing": """
output_type: generate_until
doc_to_text: question
doc_to_target: written
generation_kwargs: {until: [" "], max_gen_toks: 6}
num_fewshot: 0
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def make_custom_tasks(folder, written):
    """Write the tasks own_choice, own_prose and own_writing, whose right answers to the questions are `written`."""
    rows = [question | {"written": answer} for question, answer in zip(QUESTIONS, written, strict=True)]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}/cache}}"
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{source}\ntest_split: test\n{task}")
