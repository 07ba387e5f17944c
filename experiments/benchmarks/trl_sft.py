"""TRL's SFTTrainer as its documentation uses it: the peer that sft_end_to_end.py and startup.py measure.

    .venv-trl/bin/python experiments/benchmarks/trl_sft.py JOB.json     # `make bench-trl` makes .venv-trl

JOB.json holds model (a folder with the tokenizer), train and eval (JSONL of OpenAI messages), config (SFTConfig's
arguments). The run folder, config's output_dir, shows how far it is, as our recipe's does: config.json once all is
imported, metrics.jsonl once the trainer is made, and there a row {"step", "trained_tokens"} as each step ends. Imports
nothing of this project: its virtual environment does not hold it.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # whose kernels.py is not the package that transformers asks for


def main(job: dict[str, Any]) -> None:
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Counted(SFTTrainer):
        trained = 0

        def compute_loss(self, model, inputs, *args, **options):
            if model.training:
                self.trained += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **options)

    class Rows(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            row = {"step": state.global_step, "trained_tokens": trainer.trained}
            trainer.trained = 0
            with open(rows, "a") as file:
                file.write(json.dumps(row) + "\n")

    out = Path(job["config"]["output_dir"])
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(job))
    rows = out / "metrics.jsonl"
    data = load_dataset("json", data_files={"train": job["train"], "eval": job["eval"]})
    trainer = Counted(
        job["model"], SFTConfig(**job["config"]), train_dataset=data["train"], eval_dataset=data["eval"],
        callbacks=[Rows()],
    )  # fmt: skip
    rows.touch()
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
