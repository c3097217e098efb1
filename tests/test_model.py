import math

import pytest
import torch

from conftest import real_tokens
from qwen_min import KVCache, Qwen
from qwen_min.loss import next_token_loss


def test_a_cache_remembers_its_padding(model, ids):
    """Left of a prompt, also after a truncation, and among the tokens after it."""
    cache, real = KVCache(model.config, 2, 12), torch.tensor([[1, 1, 1], [1, 0, 1]])
    model(ids[:, :6], cache, real_tokens(6, 4, 0))
    cache.truncate(5)
    model(ids[:, 5:8], cache, real)
    found, kept = model(ids[:, 8:], cache), torch.cat((ids[1:, :6], ids[1:, 7:]), dim=1)
    torch.testing.assert_close(found[0], model(ids[:1, 4:])[0, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], model(kept)[0, 7:], rtol=1e-5, atol=1e-5)


def test_a_full_cache_keeps_its_tokens_and_what_does_not_fit_is_refused(model, ids):
    cache = KVCache(model.config, batch_size=2, capacity=8)
    model(ids[:, :6], cache)
    with pytest.raises(ValueError, match=r"cache full: 6 \+ 6 > 8 tokens"):
        model(ids[:, 6:], cache)
    assert cache.length == 6
    with pytest.raises(ValueError, match="1 rows for a cache of 2"):
        model(ids[:1, :1], cache)
    with pytest.raises(ValueError, match="holds 6 tokens"):
        cache.truncate(7)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 11\), expected \(2, 12\)"):
        model(ids, attention_mask=torch.ones(2, 11))


def test_a_new_model_begins_with_the_loss_of_a_uniform_guess(config):
    torch.manual_seed(0)
    loss = next_token_loss(Qwen(config), torch.randint(0, config.vocab_size, (4, 64)))
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_compiles_as_one_graph(model, ids, dtype):
    assert torch._dynamo.explain(model.to(dtype))(ids).graph_break_count == 0
