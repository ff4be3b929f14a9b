import pytest
import torch

from headwater.losses import numerics
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.scoring.log_probs import View, top_k_scores


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_top_k_are_those_of_the_whole_distribution(make_model, problems, monkeypatch, temperature: float):
    """Over chunks, lots and micro-batches, against a log-softmax of every token's logits."""
    model = make_model(0, trained=False)
    monkeypatch.setattr(numerics, "CACHED", 3 * model.vocab_size)
    batch = Batch.of(TransformersSampler(model).sample(problems[:4], Sampling(("test",), 2, 8)))
    scored = top_k_scores(model, batch, 5, View(temperature, max_tokens=60, chunk_tokens=7))
    for row in range(len(batch)):
        ids = torch.tensor([batch.prompts[row] + batch.completions[row]])
        with torch.no_grad():
            logits = model.logits(model.hidden(ids)[0, len(batch.prompts[row]) - 1 : -1])
        expected = (logits.double() / temperature).log_softmax(1).topk(5)
        assert torch.equal(scored.fields["teacher_ids"][row], expected.indices)
        torch.testing.assert_close(scored.fields["teacher_logprobs"][row].double(), expected.values, rtol=0, atol=1e-5)
