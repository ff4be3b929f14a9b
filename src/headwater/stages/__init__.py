"""The methods: who samples, what signal, which loss. One loop each, read top to bottom.

| method | who samples | signal | density | loss | labels |
|---|---|---|---|---|---|
| `grpo` (teacher RL, student RL, direct baseline, replay) | the policy being trained | verifier reward -> group advantage | sparse | clipped policy gradient (+ KL to a reference) | yes |
| `warmup` | the frozen teacher | teacher distributions | dense | forward KL(teacher‖student) | 0 |
| `distill` | the student being trained | teacher distributions on the student's tokens | dense | reverse KL(student‖teacher) | 0 |
| `sft` (control) | the teacher, filtered or not; or a file of worked solutions | the tokens | dense | cross-entropy | 0 unless filtered |
"""  # noqa: E501 -- the method table, word for word as in docs/algorithms.md
