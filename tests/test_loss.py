import pytest
import torch
import torch.nn.functional as F

from qwen_min.loss import head_cross_entropy, next_token_loss, token_losses


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Use chunks of 3 positions and 20 rows of the head, so that the loops run more than once."""
    monkeypatch.setattr("qwen_min.loss.CHUNK", (3, 20))


def test_next_token_loss_shifts_targets_and_ignores_padding(model, ids):
    logits = model(ids)[:, :-1]
    torch.testing.assert_close(next_token_loss(model, ids), F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    wanted = F.cross_entropy(torch.cat((logits[0, :7], logits[1])), torch.cat((ids[0, 1:8], ids[1, 1:])))
    padded = ids.clone()
    padded[0, 8:] = 0
    torch.testing.assert_close(next_token_loss(model, padded, torch.tensor([8, ids.shape[1]])), wanted)


def test_a_smaller_vocabulary_is_the_softmax_over_its_tokens(model, ids):
    vocabulary = ids.unique()
    logits = model(ids)[:, :-1, vocabulary].flatten(0, 1)
    targets = torch.searchsorted(vocabulary, ids[:, 1:].flatten())
    torch.testing.assert_close(next_token_loss(model, ids, None, vocabulary), F.cross_entropy(logits, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.3, 1, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_gradients_in_16_bits_are_as_precise_as_autograds(dtype, spread, scale):
    """The logits reach from 10 to 400. In fp16, a gradient scaled by GradScaler's 65536 has to stay finite."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=draw) for rows in (64, 97))
    hidden, weight, targets = (spread * hidden).to(dtype), weight.to(dtype), torch.randint(97, (64,), generator=draw)

    def gradients(loss, kind):
        inputs = [x.to(kind).requires_grad_() for x in (hidden, weight)]
        return [g.double() for g in torch.autograd.grad(scale * loss(*inputs), inputs)]

    def plain(h, w):
        return F.cross_entropy((h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), targets)

    exact = gradients(plain, torch.float64)
    autograds, ours = gradients(plain, dtype), gradients(lambda h, w: head_cross_entropy(h, w, targets), dtype)
    for found, theirs, wanted in zip(ours, autograds, exact, strict=True):
        if theirs.isfinite().all():
            assert found.isfinite().all()
            assert (found - wanted).norm() <= 1.3 * (theirs - wanted).norm() + 1e-12


@pytest.mark.parametrize("target", [-100, -1, 97])
def test_a_target_outside_the_vocabulary_is_refused(target):
    hidden, weight, targets = torch.ones(3, 5), torch.ones(97, 5), torch.tensor([0, target, 96])
    for loss in (head_cross_entropy, token_losses):
        with pytest.raises(ValueError, match="targets are"):
            loss(hidden, weight, targets)


REFUSED = [  # of the arguments of next_token_loss after the model, where `ids` has the tokens 0 to 11 in each row
    ({"lengths": [1, 1]}, "no token to predict"),
    ({"vocabulary": [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]}, "token 3 is to be predicted, but is not in the"),
    ({"vocabulary": [5, 3, 9]}, "expected ascending token ids"),
    ({"vocabulary": [-1, 3, 9]}, "expected ascending token ids"),
    *(({"lengths": lengths}, "lengths are") for lengths in ([13, 12], [-1, 5], [5], [5, 5, 5], [[5, 5]])),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_loss_is_refused(model, changes, message):
    ids = torch.arange(12).repeat(2, 1)
    with pytest.raises(ValueError, match=message):
        next_token_loss(model, ids, **{name: torch.tensor(value) for name, value in changes.items()})
