"""One rank of a training run of an image tokenizer: prints what it came to.
python worker.py STEPS BATCH"""

import json
import os
import sys

import torch
import torch.distributed as dist

from megamug.models.image_tokenizer.model import ImageTokenizerConfig
from megamug.models.image_tokenizer.training import ImageTokenizerTrainer, TrainingOptions, round_trip_error

CONFIG = ImageTokenizerConfig(
    image_size=32, channels=4, channel_multipliers=(1, 2), residual_blocks=1, attention_resolutions=(),
    latent_channels=4, code_width=2, codes=8, norm_groups=2,
)  # fmt: skip


def main(steps: int, batch: int) -> None:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    part = slice(rank * batch // size, (rank + 1) * batch // size)
    trainer = ImageTokenizerTrainer(CONFIG, TrainingOptions(steps=steps, adversarial_weight=0.1), "cpu")
    losses, gradients = [], []
    for step in range(steps):
        images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
        losses.append({name: float(loss) for name, loss in trainer.train_step(images[part]).items()})
        gradients.append(trainer.model.encoder.conv_in.weight.grad.flatten().tolist())
    valid = torch.ones(batch, dtype=torch.bool)
    print(json.dumps({
        "fingerprint": trainer.model.fingerprint(), "losses": losses, "gradients": gradients,
        "codes": trainer.model.quantize.embedding.weight.flatten().tolist(),
        "error": round_trip_error(trainer.model, [(images[part], valid[part])]),
    }))  # fmt: skip
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
