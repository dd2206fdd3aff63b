"""Make a trained model of your own faster: ``python examples/own_model.py [BUDGET] [RUN_DIRECTORY]``."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import netwright
from netwright.core.score import accuracy

budget, out = (*sys.argv[1:], *("60s", "runs/own-model")[len(sys.argv) - 1 :])

images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
y = torch.tensor(labels)[order]
train, val, test = (TensorDataset(x[part], y[part]) for part in (slice(1100), slice(1100, 1400), slice(1400, None)))

model = nn.Sequential(
    *(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
    *(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(100):  # a training loop as anyone has it
    batch = torch.randint(len(train), (64,))
    loss = cross_entropy(model(train.tensors[0][batch]), train.tensors[1][batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

task = netwright.Task("my-digits", model, netwright.Data(train, val, test), loss=cross_entropy, score=accuracy)
result = netwright.optimize(task, target="latency<=0.5x", keep="score>=-0.02", budget=budget, out=out)
print(result["explanation"])
