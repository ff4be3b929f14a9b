"""Run by an interpreter that has vLLM, with MODEL PROMPTS.json OUT.json: greedy tokens and their log-probs."""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] -- of another environment

    model, prompts, out = sys.argv[1:]
    llm = LLM(model=model, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8)
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    answers = [output.outputs[0] for output in llm.generate(asked, sampling)]
    rows = [
        {"ids": list(a.token_ids), "logprobs": [d[t].logprob for d, t in zip(a.logprobs, a.token_ids, strict=True)]}
        for a in answers
    ]
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
