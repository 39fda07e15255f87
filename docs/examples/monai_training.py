"""A plain MONAI training loop - their network, their loss - that reads and paints through ftengine.

    python docs/examples/monai_training.py abdomen.zarr --preset abdomen --generator G.pt --judge S.pt --steps 1000

Without a generator tumours are painted with the fixed contrast of the configuration.
"""

import argparse
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch.utils.data import DataLoader

from ftengine import Config
from ftengine.adapters.torch_dataset import PatchDataset


def train(
    store: str | Path, config: Config, steps: int, generator: str | None = None, judge: str | None = None
) -> list[float]:
    """Train MONAI's UNet; returns the losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(3, 1, config.region.num_classes, channels=(16, 32, 64), strides=(2, 2), num_res_units=1).to(device)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses: list[float] = []
    with PatchDataset(store, config, batches=True, paint=True, generator=generator, judge=judge) as dataset:
        loader = DataLoader(dataset, batch_size=None)  # num_workers stays 0: the dataset has its own threads
        while len(losses) < steps:
            for batch in loader:  # an epoch
                loss = loss_function(network(batch["image"].to(device)), batch["label"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                print(f"step {len(losses)}: loss {losses[-1]:.4f}, painted {batch['passed'].float().mean():.0%}")
                if len(losses) == steps:
                    break
    return losses


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--preset", default="abdomen")
    parser.add_argument("--generator")
    parser.add_argument("--judge")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    train(given.store, Config.preset(given.preset), given.steps, given.generator, given.judge)


if __name__ == "__main__":
    main()
