"""TRL's GRPOTrainer on the benchmark's model and prompts. Run by an interpreter that has TRL; imports nothing
of this package.

Arguments: model folder, prompts file, prompts a step, samples a prompt, response tokens, steps. Prints wall and CPU
seconds between the ends of consecutive steps as one JSON list.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

import torch
from datasets import load_dataset  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def main() -> None:
    folder, prompts_file = sys.argv[1:3]
    prompts, samples, response_tokens, steps = map(int, sys.argv[3:7])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=load_dataset("json", data_files=prompts_file, split="train"),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=prompts * samples,
                num_generations=samples,
                max_completion_length=response_tokens,
                generation_kwargs={"min_new_tokens": response_tokens},
                max_steps=steps,
                learning_rate=1e-4,
                beta=0.0,
                gradient_checkpointing=False,  # on by default; costs a sixth of a step, and memory is not short here
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    print(json.dumps([[b - a for a, b in zip(*pair)] for pair in zip(clock.ends, clock.ends[1:])]))


if __name__ == "__main__":
    main()
