"""Train a Vision Mamba on your own images, fuse tokens, save it, load it: python examples/train_your_own.py IMAGES OUT.

IMAGES holds a folder for each class. A third argument is the number of epochs. Needs famba[hub], which saves and loads.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from famba import VisionMamba, create_model, schedule, set_schedule
from famba.data import normalise, read_image
from famba.params import IMAGENET_MEAN, IMAGENET_STD

images_dir, out, *epochs = sys.argv[1:]
files = sorted(Path(images_dir).resolve().glob("*/*"))
if not files:
    raise SystemExit(f"{images_dir}: no <class>/<image> there")
classes = sorted({file.parent.name for file in files})
images = normalise(torch.stack([read_image(file, 32) for file in files]), IMAGENET_MEAN, IMAGENET_STD)
labels = torch.tensor([classes.index(file.parent.name) for file in files])

torch.manual_seed(0)
model = create_model("vim_micro", num_classes=len(classes), depth=4, d_model=32, drop_path_rate=0.05)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(int(*epochs or [20])):
    for rows in torch.randperm(len(files)).split(32):
        loss = cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

set_schedule(model, schedule("upper", depth=4, r=8, first_layer=2))
model.save_pretrained(out)
model = VisionMamba.from_pretrained(out)
correct = (model(images).argmax(1) == labels).float().mean()
print(f"{100 * correct:.0f} % of the training images, {model.token_counts[0]} tokens fused to {model.token_counts[-1]}")
