"""What every experiment needs: a device, seeds, a world, a model, a training loop, meters, plots and recorded results."""

from course.lab.devices import device, seed_everything

__all__ = ["device", "seed_everything"]
