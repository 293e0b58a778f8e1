"""Training of the classifier: crops and steps."""

import torch

from base.classifier import ClassifierModule, random_crop
from evaluation.classifier import Classifier


def test_random_crops_are_shifts():
    images = torch.arange(100.0).view(1, 1, 10, 10).repeat(200, 1, 1, 1)
    cropped = random_crop(images, 2, torch.Generator().manual_seed(0))
    inner = {tuple((image[0, 4:6, 4:6] - 44).flatten().tolist()) for image in cropped}
    assert inner == {
        tuple(10 * i + j + offset for offset in (0, 1, 10, 11)) for i in range(-2, 3) for j in range(-2, 3)
    }


def test_steps_of_training_lower_the_loss():
    images = torch.cat([torch.randn(40, 3, 16, 16) * 0.2 + shift for shift in (-0.5, 0, 0.5)])
    batch = images, torch.arange(3).repeat_interleave(40)
    module = ClassifierModule(Classifier((4, 6, 5), num_classes=3), learning_rate=0.1, label_smoothing=0)
    module.log = lambda *args, **kwargs: None
    module.network.fit_whitening(images)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module._trainer = type("Trainer", (), {"current_epoch": 0, "global_rank": 0})()
    losses = []
    for index in range(30):
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
