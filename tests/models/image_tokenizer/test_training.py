"""Training an image tokenizer: the codebook's averages, revival, losses, gradients, going on where it stopped."""

import math

import pytest
import torch

from megamug.errors import UserError
from megamug.models.image_tokenizer.losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss
from megamug.models.image_tokenizer.model import ImageTokenizer, ImageTokenizerConfig
from megamug.models.image_tokenizer.training import (
    CodebookStatistics,
    ImageTokenizerTrainer,
    TrainingOptions,
    perplexity,
    round_trip_error,
)

CONFIG = ImageTokenizerConfig(
    image_size=16, channels=8, channel_multipliers=(1, 2), residual_blocks=1, attention_resolutions=(),
    latent_channels=6, code_width=3, codes=16, norm_groups=4,
)  # fmt: skip


def colours(step, count=8, side=16):
    """Pictures of two flat halves."""
    generator = torch.Generator().manual_seed(step)
    halves = torch.rand(count, 3, 1, 2, generator=generator) * 1.6 - 0.8
    return halves.repeat_interleave(side // 2, 3).expand(-1, -1, side, -1).contiguous()


def trainer(config=CONFIG, **options):
    options = TrainingOptions(steps=60, warmup_steps=5, learning_rate=3e-3, **options)
    return ImageTokenizerTrainer(config, options, "cpu")


def steps(trained, first, last):
    side = trained.config.image_size
    return [{k: float(v) for k, v in trained.train_step(colours(i, side=side)).items()} for i in range(first, last)]


def statistics(codes=4, width=2, **options):
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**{**vars(CONFIG), "codes": codes, "code_width": width}))
    return tokenizer.quantize, CodebookStatistics(tokenizer, TrainingOptions(**options))


def test_codes_become_the_moving_means_of_their_latents():
    book, found = statistics(ema_decay=0.5, dead_below=0.0)
    latents = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    found.update(1, torch.tensor([0, 0, 2]), latents)
    # counts 0.5 * (2, 0, 1, 0), sums 0.5 * ((4, 0), 0, (0, 2), 0); a code never used stays
    torch.testing.assert_close(found.counts, torch.tensor([1.0, 0.0, 0.5, 0.0]))
    before = book.embedding.weight.detach().clone()
    torch.testing.assert_close(before[[0, 2]], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    found.update(2, torch.tensor([0]), torch.tensor([[8.0, 4.0]]))
    # code 0: sum (2 + 8, 0 + 4) / 2 over count (1 + 1) / 2
    torch.testing.assert_close(book.embedding.weight[0], torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(book.embedding.weight[1:].detach(), before[1:])


def test_dead_codes_become_latents_of_the_batch():
    book, found = statistics(codes=8, ema_decay=0.5, dead_below=0.5)
    latents = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    assert len(found.update(0, book.nearest(latents), latents)) == 8  # the first batch sets all
    assert all((row == latents).all(1).any() for row in book.embedding.weight)
    far = torch.tensor([[100.0, 100.0]])  # where no code is; the others are all at code 0
    for step in range(1, 12):
        batch = torch.cat([book.embedding.weight[:1].detach().expand(31, 2), far])
        revived = found.update(step, torch.zeros(32, dtype=torch.int64), batch)
        if len(revived):
            break
    assert len(revived) and 0 not in revived
    # drawn by squared distance: the far latent, not one of the 31
    torch.testing.assert_close(book.embedding.weight[revived].detach(), far.expand(len(revived), 2))
    assert found.usage()[0] == 1.0


@pytest.mark.parametrize("codebook, normalise", [("ema", False), ("ema", True), ("gradient", False)])
def test_it_learns_a_batch(codebook, normalise):
    """The mean colour alone would be at 12.7 dB."""
    config = ImageTokenizerConfig(**{**vars(CONFIG), "normalise_codes": normalise})
    trained = trainer(config, codebook=codebook)
    for _ in range(60):
        trained.train_step(colours(0))
    error = round_trip_error(trained.model, [(colours(0), torch.ones(8, dtype=torch.bool))])
    assert error["psnr"] > 17 and error["usage"] > 0.3, error


def test_straight_through_gradient():
    """The encoder's gradient of the reconstruction is that at the codes, handed to the latents as it is."""
    trained = trainer(commitment_weight=0.0, reconstruction="l1")
    trained.step = 1
    images, model = colours(0), trained.model
    torch.nn.init.normal_(model.quantize.embedding.weight)
    losses, codes, _, _ = trained._losses(images)
    (found,) = torch.autograd.grad(losses["total"], model.quant_conv.weight)
    latents = model.latents(images)
    vectors = model.quantize.lookup(codes).view_as(latents).detach().requires_grad_()
    (towards,) = torch.autograd.grad((model.images(vectors) - images).abs().mean(), vectors)
    (wanted,) = torch.autograd.grad(latents, model.quant_conv.weight, towards)
    torch.testing.assert_close(found, wanted)


def test_codes_come_in_later():
    trained = trainer(quantise_from=2)
    free = trainer(quantise_from=9)
    assert steps(trained, 0, 3) == steps(free, 0, 3)  # no codes yet
    assert all(loss["commitment"] == 0 for loss in steps(free, 3, 5))
    (loss,) = steps(trained, 3, 4)
    assert loss["commitment"] > 0


@pytest.mark.parametrize("options", [{}, dict(codebook="gradient", adversarial_weight=0.5, adversarial_from=2)])
def test_going_on_is_bit_for_bit(options):
    config = ImageTokenizerConfig(**{**vars(CONFIG), "image_size": 32}) if "adversarial_weight" in options else CONFIG
    whole = trainer(config, **options)
    wanted = steps(whole, 0, 6)
    first = trainer(config, **options)
    steps(first, 0, 3)
    second = trainer(config, **options)
    second.load_state_dict(first.state_dict())
    assert steps(second, 3, 6) == wanted[3:]
    assert second.model.fingerprint() == whole.model.fingerprint()


def test_the_seed_decides():
    same, again, other = trainer(), trainer(), trainer(seed=2)
    assert same.model.fingerprint() == again.model.fingerprint() != other.model.fingerprint()
    assert steps(same, 0, 2) == steps(again, 0, 2)


def test_a_step_that_is_not_finite_changes_nothing():
    trained = trainer()
    steps(trained, 0, 2)
    before = trained.model.fingerprint()
    result = trained.train_step(colours(3) * math.nan)
    assert not torch.isfinite(result["gradient norm"]) and trained.step == 3
    assert trained.model.fingerprint() == before and torch.isfinite(trained.statistics.sums).all()


def test_perplexity_and_error():
    assert perplexity(torch.ones(16)) == pytest.approx(16) and perplexity(torch.eye(16)[0]) == pytest.approx(1)

    class Off(torch.nn.Module):  # a round trip that is off by 0.2 (of 2) everywhere, and uses codes 0 and 1
        config = CONFIG
        quantize = torch.nn.Module()
        quantize.embedding = torch.nn.Embedding(16, 3)

        def encode(self, images):
            self.images = images
            return (images[:, 0] > 0).long()

        def decode(self, codes):
            return self.images + 0.2

    valid = torch.tensor([True] * 3 + [False])
    images = torch.cat([torch.full((1, 3, 4, 4), -0.5), torch.full((3, 3, 4, 4), 0.5)])
    error = round_trip_error(Off(), [(images, valid), (images, ~valid)])
    assert error["mse"] == pytest.approx(0.01, rel=1e-5) and error["psnr"] == pytest.approx(20, rel=1e-5)
    assert error["images"] == 4 and error["usage"] == 2 / 16
    assert error["perplexity"] == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


def test_adversarial_parts():
    scores = PatchDiscriminator(8)(torch.zeros(2, 3, 64, 64))
    assert scores.shape == (2, 1, 6, 6)
    assert float(hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]))) == pytest.approx((0.25 + 0.5) / 2)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = adaptive_weight(weight.sum() * 6, weight.sum() * 2, weight, lambda tensor: None)
    assert float(ratio) == pytest.approx(3, rel=1e-3)
    trained = trainer(ImageTokenizerConfig(**{**vars(CONFIG), "image_size": 32}), adversarial_weight=0.5)
    before = [p.detach().clone() for p in trained.discriminator.parameters()]
    assert all(math.isfinite(loss["discriminator"]) for loss in steps(trained, 0, 2))
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.discriminator.parameters(), strict=True))
    with pytest.raises(UserError, match="16 pixels a side are too few"):
        trainer(adversarial_weight=0.5)


def test_perceptual_loss_is_vgg_of_torchvisions_names(tmp_path):
    widths = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    inward, layers = 3, []
    torch.manual_seed(0)
    for width in widths:  # as torchvision numbers them
        if width == "M":
            layers.append(torch.nn.MaxPool2d(2))
            continue
        layers += [torch.nn.Conv2d(inward, width, 3, padding=1), torch.nn.ReLU()]
        inward = width
    features = torch.nn.Sequential(*layers)
    tensors = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(tensors, tmp_path / "vgg16.pth")
    loss = PerceptualLoss(tmp_path / "vgg16.pth")
    made, original = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted, x, y = 0.0, ((made + 1) / 2 - mean) / std, ((original + 1) / 2 - mean) / std
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in (3, 8, 15, 22, 29):
                a, b = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
                wanted += float((a - b).square().sum(1).mean())
        assert float(loss(made, original)) == pytest.approx(wanted, rel=1e-4)
        assert float(loss(original, original)) == 0
    with pytest.raises(UserError, match="no such file"):
        PerceptualLoss(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="not a file of torch weights"):
        PerceptualLoss(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="features.0.weight is not that of torchvision's VGG-16"):
        PerceptualLoss(tmp_path / "other.pth")
