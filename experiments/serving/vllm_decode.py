"""Generate with vLLM in a process of its own, for `decode.py`: runs in a virtual environment that has vLLM.

The first line of standard input says which model, every other line prompts and how to sample; the ids of all answers
come back as a line.
"""

import json
import os
import sys


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM writes its log to standard output
    import vllm

    job = json.loads(sys.stdin.readline())
    how = {"dtype": job["dtype"], "enforce_eager": job["eager"], "gpu_memory_utilization": job["share"]}
    how |= {"skip_tokenizer_init": True, "disable_log_stats": True}
    llm = vllm.LLM(job["model"], max_model_len=job["length"], max_num_seqs=job["slots"], **how)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        llm.reset_prefix_cache()  # prompts of the call before are the same
        asked = json.loads(line)
        sampling = vllm.SamplingParams(**asked["sampling"], ignore_eos=True, detokenize=False, logprobs=0)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps([list(one.outputs[0].token_ids) for one in found]), file=answers)


if __name__ == "__main__":
    main()
