"""TRL's GRPOTrainer as its documentation uses it: the peer that grpo.py measures.

    .venv-trl/bin/python experiments/benchmarks/trl_grpo.py JOB.json     # `make bench-trl` makes .venv-trl

JOB.json holds model (a folder with the tokenizer), train (JSONL of OpenAI messages; the last one is the right answer),
config (GRPOConfig's arguments). The run folder, config's output_dir, holds metrics.jsonl once the trainer is made, and
there a row {"step", "samples", "generated_tokens"} as each step ends, with the most memory that a GPU had given out as
"memory_bytes". Imports nothing of this project.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # whose kernels.py is not the package that transformers asks for


def main(job: dict[str, Any]) -> None:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen: list[int] = []

    def exact(completions, completion_ids, answer, **columns):
        seen.extend(map(len, completion_ids))
        said = (completion[-1]["content"].strip() for completion in completions)
        return [float(one == wanted) for one, wanted in zip(said, answer, strict=True)]

    class Rows(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            row = {"step": state.global_step, "samples": len(seen), "generated_tokens": sum(seen)}
            seen.clear()
            if hasattr(device := torch.get_device_module(args.device), "max_memory_allocated"):
                row["memory_bytes"] = device.max_memory_allocated()
            with open(rows, "a") as file:
                file.write(json.dumps(row) + "\n")

    def question(row):
        return {"prompt": row["messages"][:-1], "answer": row["messages"][-1]["content"]}

    out = Path(job["config"]["output_dir"])
    out.mkdir(parents=True)
    rows = out / "metrics.jsonl"
    data = load_dataset("json", data_files={"train": job["train"]})["train"].map(question, remove_columns="messages")
    given = {"args": GRPOConfig(**job["config"]), "train_dataset": data, "callbacks": [Rows()]}
    trainer = GRPOTrainer(job["model"], exact, **given)
    rows.touch()
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
