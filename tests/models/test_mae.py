"""MAE against transformers' of the same weights: the same patches hidden, the same pixels, the same loss."""

import pytest
import torch
from families import images
from hosts import HEADS, WIDTH, assert_near, transformers_model

from xformer_fast.models import MAE
from xformer_fast.models.mae import map_sinusoids, reconstruction_loss


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_pixels_and_loss(normalize):
    pytest.importorskip("transformers")
    host = transformers_model(
        "ViTMAEForPreTraining", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        image_size=24, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.6,
        decoder_num_attention_heads=2, decoder_intermediate_size=24, norm_pix_loss=normalize,
    )  # fmt: skip
    model, image = MAE.from_transformers(host).eval(), images(3, 24, 24)
    noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    (pixels, hidden), out = model(image, noise=noise), host(image, noise=noise)
    assert torch.equal(hidden, out.mask.bool()) and hidden.sum(1).tolist() == [6, 6, 6]
    assert_near(pixels, out.logits)
    assert_near(reconstruction_loss(pixels, hidden, image, normalize=normalize), out.loss)


def small(**choices):
    torch.manual_seed(0)
    sizes = {"dim": WIDTH, "depth": 1, "num_heads": HEADS, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MAE(image_size=(16, 24), patch=8, **sizes, **choices).eval()


@torch.no_grad()
def test_what_is_hidden_is_not_seen():
    model, image = small(mask_ratio=0.5), images(1, 16, 24)
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.7, 0.3]])
    pixels, hidden = model(image, noise=noise)
    assert hidden.tolist() == [[False, True, False, True, True, False]]
    changed = image.clone()
    changed[:, :, :8, 8:16] = changed[:, :, 8:, :16] = 9.0  # patches 1, 3 and 4
    assert torch.equal(model(changed, noise=noise)[0], pixels)
    perfect = image.unflatten(3, (3, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 3, 5, 1).reshape(1, 6, 192)
    wrong = torch.where(hidden[..., None], perfect, perfect + 1)
    assert reconstruction_loss(wrong, hidden, image) == 0  # what was shown does not count
    torch.testing.assert_close(reconstruction_loss(perfect + 2, hidden, image), torch.tensor(4.0))


@torch.no_grad()
def test_whole_images():
    x, kept = small().encode(images(2, 16, 24), mask_ratio=0)
    assert x.shape == (2, 7, WIDTH) and kept.sort(1).values.tolist() == [list(range(6))] * 2


def test_positions_tell_rows_and_columns():
    places = map_sinusoids(3, 4, 8)
    assert torch.equal(places[0], torch.zeros(8))
    grid = places[1:].view(3, 4, 8)
    assert torch.equal(grid[0, :, :4], grid[2, :, :4]) and torch.equal(grid[:, 0, 4:], grid[:, 3, 4:])
    assert len({tuple(place) for place in places.tolist()}) == 13


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"image must be \(B, channels, \*\(16, 24\)\), got shape \(1, 3, 24, 24\)"):
        small()(images(1, 24, 24))
