"""One training step of an image tokenizer, and all that it needs to be continued.

Reconstruction (L1 or L2) + commitment (VQ-VAE, equation 3) + optionally perceptual and adversarial losses. The codebook
follows the latents by exponential moving averages (VQ-VAE, appendix A.1) or by gradient, and codes that have fallen out
of use are set to latents of the batch (Dhariwal et al. 2020, "Jukebox", section 3.1). Codes may come in only when the
autoencoder without them has settled (Lancucki et al. 2020, "Robust training of vector quantized bottleneck models").

Each process holds the whole model and its part of the batch. Gradients are means and codebook statistics sums over all
processes, and codes are revived from the whole batch, so a run on several is the run on one, to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamug.data.random import uniform
from megamug.errors import UserError
from megamug.models.image_tokenizer.losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss
from megamug.models.image_tokenizer.model import AttentionBlock, ImageTokenizer, ImageTokenizerConfig, ResidualBlock


@dataclass(frozen=True)
class TrainingOptions:
    steps: int = 1000
    learning_rate: float = 1e-3  # at the end of warm-up; then a cosine down to a hundredth of it
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    reconstruction: str = "l2"  # l1 | l2
    commitment_weight: float = 0.25
    codebook: str = "ema"  # ema | gradient
    ema_decay: float = 0.99  # per step, of the codebook's averages and of the usage counts
    quantise_from: int = 0  # steps before: an autoencoder without codes; then a batch of its latents sets them all
    dead_below: float = 0.03  # codes used less than this share of the mean use are revived; 0: never
    perceptual_weights: str | None = None  # file of torchvision's VGG-16
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.0  # 0: no discriminator
    adversarial_from: int = 0  # step at which the discriminator's verdict begins to count
    dtype: str = "fp32"  # fp32 | bf16: of convolutions; weights, quantisation and losses stay fp32
    seed: int = 1


class CodebookStatistics:
    """Moving averages over the batches: `counts` [K] of each code's uses, and `sums` [K, w] of its latents."""

    def __init__(self, tokenizer: ImageTokenizer, options: TrainingOptions) -> None:
        self.book, self.options = tokenizer.quantize, options
        weight = self.book.embedding.weight
        self.counts = torch.zeros(len(weight), device=weight.device)
        self.sums = torch.zeros_like(weight, requires_grad=False)

    @torch.no_grad()
    def update(self, step: int, codes: Tensor, latents: Tensor) -> Tensor:
        """Take in codes [n] and latents [n, w] of this process's batch. Returns the codes that were revived, int64 [r].

        With `codebook="ema"` the codes become the means of their latents. Up to step `quantise_from` each batch sets
        all codes to latents of its own.
        """
        counts = torch.bincount(codes, minlength=len(self.counts)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        _sum_over_processes(counts, sums)
        decay = self.options.ema_decay
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        if self.options.codebook == "ema":
            self.book.embedding.weight.copy_(self._means())
        if step <= self.options.quantise_from:
            dead = torch.arange(len(self.counts), device=self.counts.device)
        else:
            dead = (self.counts < self.options.dead_below * counts.sum() / len(counts)).nonzero()[:, 0]
        if len(dead):
            self._revive(dead, codes, latents, step, counts.sum() / len(counts))
        return dead

    def _means(self) -> Tensor:
        """Mean latent of each code; a code never used stays where it is."""
        used = self.counts[:, None] > 1e-8
        means = torch.where(used, self.sums / self.counts[:, None].clamp(min=1e-8), self.book.embedding.weight)
        return F.normalize(means, dim=-1) if self.book.normalise else means

    def _revive(self, dead: Tensor, codes: Tensor, latents: Tensor, step: int, count: Tensor) -> None:
        """Dead codes become latents of the batch (of all processes), with the count of a code of mean use.

        A latent is drawn in proportion to its squared distance from its code (k-means++, Arthur and Vassilvitskii
        2007), so that codes go where they are missed. Where all codes are set anew, latents are all alike.
        """
        errors = torch.ones_like(latents[:, 0])
        if step > self.options.quantise_from:
            errors = (latents - self.book.lookup(codes)).square().sum(1) + 1e-12
        latents, errors = _gather(latents), _gather(errors)
        draws = torch.from_numpy(uniform(self.options.seed, "revive", step, dead.cpu().numpy(), 1)[:, 0])
        reached = errors.double().cumsum(0)
        rows = torch.searchsorted(reached, draws.to(reached.device) * reached[-1]).clamp(max=len(latents) - 1)
        self.book.embedding.weight[dead] = latents[rows]
        self.counts[dead] = count
        self.sums[dead] = latents[rows] * count

    def usage(self) -> tuple[float, float]:
        """(share of the codes in use, perplexity), over the last batches."""
        alive = self.counts > self.options.dead_below * self.counts.mean()
        return float(alive.float().mean()), perplexity(self.counts)


class ImageTokenizerTrainer:
    """Model, optimizers and codebook statistics. `step` counts the steps done."""

    def __init__(self, config: ImageTokenizerConfig, options: TrainingOptions, device: torch.device | str) -> None:
        self.config, self.options, self.device = config, options, torch.device(device)
        if options.adversarial_weight and config.image_size < 32:
            raise UserError(f"image tokenizer: {config.image_size} pixels a side are too few for the discriminator")
        self.perceptual = PerceptualLoss(options.perceptual_weights) if options.perceptual_weights else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = initialise(ImageTokenizer(config)).to(self.device)
            self.discriminator = PatchDiscriminator().to(self.device) if options.adversarial_weight else None
        self.model.quantize.embedding.weight.requires_grad_(options.codebook == "gradient")
        self.statistics = CodebookStatistics(self.model, options)
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        self.optimizers = {"model": self._optimizer(self.model)}
        if self.discriminator is not None:
            self.optimizers["discriminator"] = self._optimizer(self.discriminator)
        self.step = 0

    def _optimizer(self, module: torch.nn.Module) -> torch.optim.AdamW:
        parameters = [p for p in module.parameters() if p.requires_grad]
        rate, decay = self.options.learning_rate, self.options.weight_decay
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)

    def learning_rate(self) -> float:
        """Of the step to come."""
        options = self.options
        if self.step < options.warmup_steps:
            return options.learning_rate * (self.step + 1) / options.warmup_steps
        done = (self.step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
        return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def train_step(self, images: Tensor) -> dict[str, Tensor]:
        """One step on this process's images fp32 [b, 3, S, S] in [-1, 1]. Returns its losses, means over all processes.

        A step whose gradient is not finite changes nothing but the step counter; its "gradient norm" tells.
        """
        losses, codes, latents, made = self._losses(images)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
        norm = self._apply("model", self.model, losses["total"])
        if torch.isfinite(norm):
            revived = self.statistics.update(self.step, codes, latents)
            if self.options.codebook == "gradient":
                self._forget_moments(revived)
            if self.discriminator is not None:
                losses["discriminator"] = hinge_loss(self.discriminator(images), self.discriminator(made.detach()))
                self._apply("discriminator", self.discriminator, losses["discriminator"])
        self.step += 1
        packed = torch.stack([loss.detach().float() for loss in losses.values()])
        mean_over_processes(packed)
        return dict(zip(losses, packed, strict=True)) | {"gradient norm": norm}

    def _losses(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """(losses, codes [n], latents [n, w] without gradient, images made)."""
        model, options = self.model, self.options
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            latents = model.latents(images)  # [b, h, w, code_width]
            flat = latents.flatten(0, 2)
            codes = model.quantize.nearest(flat.detach())
            vectors = model.quantize.lookup(codes).view_as(latents)
            if self.step <= options.quantise_from:  # the codes are not set yet: this batch sets them
                vectors = latents
            made = model.images(latents + (vectors - latents).detach()).float()  # straight through
        pixels = made - images
        losses = {"reconstruction": pixels.abs().mean() if options.reconstruction == "l1" else pixels.square().mean()}
        losses["commitment"] = (latents - vectors.detach()).square().mean()
        total = losses["reconstruction"] + options.commitment_weight * losses["commitment"]
        if options.codebook == "gradient":
            total = total + (vectors - latents.detach()).square().mean()
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(made, images)
            total = total + options.perceptual_weight * losses["perceptual"]
        if self.discriminator is not None:
            losses["adversarial"] = -self.discriminator(made).mean()
            if self.step >= options.adversarial_from:
                last = model.decoder.conv_out.weight
                seen = losses["reconstruction"] + options.perceptual_weight * losses.get("perceptual", 0.0)
                weight = adaptive_weight(seen, losses["adversarial"], last, mean_over_processes)
                total = total + options.adversarial_weight * weight * losses["adversarial"]
        losses["total"] = total
        return losses, codes, flat.detach(), made

    def _apply(self, name: str, module: torch.nn.Module, loss: Tensor) -> Tensor:
        """Backward, mean over the processes, clip, step. Returns the gradient norm before clipping."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        if _processes() > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            mean_over_processes(flat)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.clip_grad or math.inf)
        if torch.isfinite(norm):
            optimizer.step()
        return norm

    def _forget_moments(self, codes: Tensor) -> None:
        """A revived code starts anew in the optimizer too."""
        state = self.optimizers["model"].state.get(self.model.quantize.embedding.weight, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][codes] = 0

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs for the next step to be what it would have been."""
        state = {
            "step": self.step, "model": self.model.state_dict(),
            "counts": self.statistics.counts, "sums": self.statistics.sums,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }  # fmt: skip
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.statistics.counts.copy_(state["counts"])
        self.statistics.sums.copy_(state["sums"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])


def initialise(model: ImageTokenizer) -> ImageTokenizer:
    """Convolutions that keep the scale of what they are given, in residual branches that begin as nothing.

    So the image goes through a new network undistorted (Zhang et al. 2019, "Fixup initialization"; the zeros as in
    Dhariwal and Nichol 2021's networks). Draws from torch's generator. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttentionBlock):
            torch.nn.init.zeros_(module.proj_out.weight)
    return model


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' distribution: K where all are used alike, 1 where only one is used."""
    shares = counts.double() / counts.double().sum().clamp(min=1e-12)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


@torch.no_grad()
def round_trip_error(model: ImageTokenizer, batches) -> dict[str, float]:
    """Error of the round trip over `batches` of (images in [-1, 1], valid bool [b]) of this process, of all together.

    "mse" of pixels in 0..1, "psnr" in dB (mean over the images), "usage" (share of the codes that occur), "perplexity".
    """
    device = model.quantize.embedding.weight.device
    counts = torch.zeros(model.config.codes, dtype=torch.float64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # squared error, PSNR, images
    for images, valid in batches:
        codes = model.encode(images)
        errors = ((model.decode(codes) - images.float()) / 2).square().mean((1, 2, 3)).double()[valid]
        sums += torch.stack([errors.sum(), (-10 * torch.log10(errors.clamp(min=1e-12))).sum(), valid.sum()])
        counts += torch.bincount(codes[valid].flatten(), minlength=len(counts))
    _sum_over_processes(counts, sums)
    images = max(float(sums[2]), 1.0)
    used = float((counts > 0).double().mean())
    return {
        "mse": float(sums[0]) / images, "psnr": float(sums[1]) / images,
        "usage": used, "perplexity": perplexity(counts), "images": int(sums[2]),
    }  # fmt: skip


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum_over_processes(*tensors: Tensor) -> None:
    if _processes() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _gather(tensor: Tensor) -> Tensor:
    """The rows of all processes, which have as many each, in the order of their ranks."""
    if _processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def mean_over_processes(tensor: Tensor) -> None:
    """In place."""
    _sum_over_processes(tensor)
    tensor /= _processes()
