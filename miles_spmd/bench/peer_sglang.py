"""Plain ``sglang.Engine`` on the benchmark's requests. Imports nothing of this package.

Argument: a JSON file with server_args, prompts (token ids), response_tokens, repeats. Prints the median seconds last.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path


def main() -> None:
    import sglang

    job = json.loads(Path(sys.argv[1]).read_text())
    settings = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "disable_prefill_cuda_graph": True,
        "log_level": "error",
        **job["server_args"],
    }
    engine = sglang.Engine(**settings)
    sampling = {"temperature": 1.0, "max_new_tokens": job["response_tokens"], "ignore_eos": True}
    engine.generate(input_ids=job["prompts"][:4], sampling_params=sampling, return_logprob=True)
    seconds = []
    for _ in range(job["repeats"]):
        engine.flush_cache()
        began = time.perf_counter()
        outputs = engine.generate(input_ids=job["prompts"], sampling_params=sampling, return_logprob=True)
        seconds.append(time.perf_counter() - began)
        assert all(len(output["output_ids"]) == job["response_tokens"] for output in outputs)
    engine.shutdown()
    print(statistics.median(seconds))


if __name__ == "__main__":
    main()
